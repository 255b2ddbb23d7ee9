"""The benchmark: suites, options, tables and plots."""

from hf_sparse_attn.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "run": "hf_sparse_attn.bench.harness",
        "Options": "hf_sparse_attn.bench.options",
        "make_options": "hf_sparse_attn.bench.options",
        "SUITES": "hf_sparse_attn.bench.options",
        "DTYPES": "hf_sparse_attn.bench.options",
    },
)
