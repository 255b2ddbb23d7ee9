"""The benchmark: suites, options, tables and plots, and the calibration of a machine.

May import levels 0 to 10 of .github/ARCHITECTURE.md; figures of quality belong to evaluation/, tests of kernels to
tests/.
"""

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
