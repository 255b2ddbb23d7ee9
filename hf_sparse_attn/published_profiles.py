"""The name of old of hf_sparse_attn.profiles.published."""

from hf_sparse_attn.profiles.published import *  # noqa: F403
