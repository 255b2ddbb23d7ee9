# The name of old of two files.
from hf_sparse_attn.cli.demo import *  # noqa: F403
from hf_sparse_attn.shipped.byte_llama import *  # noqa: F403
