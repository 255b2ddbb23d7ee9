"""How the attention of a host library is reached, eager and compiled, and put back."""

# Before the name of a method: its implementation of attention in transformers, without a patch.
NATIVE_PREFIX = "hsa:"
# The implementation that was replaced is part of the name: a copied or shared config still tells what to fall back to.
PATCHED_PREFIX = "hsa:patched+"
