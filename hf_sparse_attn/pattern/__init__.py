"""BlockPattern, the value that passes from a method to a kernel, and what is computed with it."""

from hf_sparse_attn.pattern.block_pattern import BlockPattern as BlockPattern
