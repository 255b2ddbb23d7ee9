"""The benchmark: suites, options, tables and plots."""

from hf_sparse_attn.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "run": "hf_sparse_attn.bench.harness",
        "Options": "hf_sparse_attn.bench.harness",
        "make_options": "hf_sparse_attn.bench.harness",
        "SUITES": "hf_sparse_attn.bench.harness",
        "DTYPES": "hf_sparse_attn.bench.harness",
    },
)
