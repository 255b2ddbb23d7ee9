"""The name of old of hf_sparse_attn.shipped.corpus."""

from hf_sparse_attn.shipped.corpus import *  # noqa: F403
