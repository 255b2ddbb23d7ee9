"""The name of old of hf_sparse_attn.cli.demo."""

from hf_sparse_attn.cli.demo import *  # noqa: F403
