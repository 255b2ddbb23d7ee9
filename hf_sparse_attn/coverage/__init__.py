"""Which model classes of the installed libraries can be patched.

May import levels 0 to 10 of .github/ARCHITECTURE.md; running tiny instances of them belongs to tests/.
"""

from hf_sparse_attn.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Coverage": "hf_sparse_attn.coverage.listing",
        "diffusers_classes": "hf_sparse_attn.coverage.of_diffusers",
        "coverage_table": "hf_sparse_attn.coverage.listing",
        "coverage_counts": "hf_sparse_attn.coverage.listing",
        "coverage_summary": "hf_sparse_attn.coverage.listing",
        "STATUSES": "hf_sparse_attn.coverage.listing",
    },
)
