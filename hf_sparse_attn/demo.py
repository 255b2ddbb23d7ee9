"""The name of old of hf_sparse_attn.cli.demo and hf_sparse_attn.shipped.byte_llama."""

from hf_sparse_attn.cli.demo import *  # noqa: F403
from hf_sparse_attn.shipped.byte_llama import *  # noqa: F403
