"""Measures candidates head by head and chooses among them under a budget.

May import levels 0 to 9 of .github/ARCHITECTURE.md; what a profile is and how it is saved belongs to profiles/.
"""

from hf_sparse_attn.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "profile": "hf_sparse_attn.profiling.run",
        "from_measurements": "hf_sparse_attn.profiling.run",
    },
)
