"""Training: the loop, tasks, losses, and what they read and write.

May import levels 0 to 10 of .github/ARCHITECTURE.md; what one recipe alone needs belongs to recipes/.
"""

from hf_sparse_attn.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "train": "hf_sparse_attn.training.loop",
        "Interrupted": "hf_sparse_attn.training.loop",
        "peak_memory": "hf_sparse_attn.training.loop",
    },
)
