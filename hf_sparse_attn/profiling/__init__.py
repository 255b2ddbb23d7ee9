"""Measures candidates head by head and chooses among them under a budget."""

from hf_sparse_attn.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "profile": "hf_sparse_attn.profiling.run",
        "from_measurements": "hf_sparse_attn.profiling.run",
    },
)
