"""How the attention of a host library is reached, eager and compiled, and put back.

May import levels 0 to 5 of .github/ARCHITECTURE.md; what holds for one model family alone belongs to patches/.
"""

# Before the name of a method: its implementation of attention in transformers, without a patch.
NATIVE_PREFIX = "hsa:"
# The implementation that was replaced is part of the name: a copied or shared config still tells what to fall back to.
PATCHED_PREFIX = "hsa:patched+"
# After it, where the model selects keys by itself: the hook then is that of natively_sparse_hook.
SELECTING = "selecting+"
