"""How the attention of a host library is reached, eager and compiled, and put back."""
