"""BlockPattern, the value that passes from a method to a kernel, and what is computed with it.

May import level 0 of .github/ARCHITECTURE.md; how keys are chosen belongs to methods/ and selection.py, running a
pattern to kernels/.
"""

from hf_sparse_attn.pattern.block_pattern import BlockPattern as BlockPattern
