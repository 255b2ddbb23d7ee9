"""Sparse attention that models are trained with, as differentiable functions: MoBA, NSA and DSA.

All take q, k and v as [batch, heads, tokens, dim]; what they choose is a constant of the backward. The methods `moba`,
`nsa` and `dsa` run them in models.
"""

from hf_sparse_attn.trained.dsa import dsa_attention as dsa_attention
from hf_sparse_attn.trained.dsa import dsa_select_tokens as dsa_select_tokens
from hf_sparse_attn.trained.moba import moba_attention as moba_attention
from hf_sparse_attn.trained.nsa import nsa_attention as nsa_attention
from hf_sparse_attn.trained.nsa import nsa_compressed as nsa_compressed
from hf_sparse_attn.trained.nsa import nsa_select_blocks as nsa_select_blocks
from hf_sparse_attn.trained.nsa import nsa_selected as nsa_selected
