#!/usr/bin/env bash
# transformers 5.23.0 (DeepseekV4ForCausalLM), seen 2026-12-01: with an attention implementation of one's own whose mask
# is boolean, the compressed entries that the indexer chose are hidden and all others are shown.
#
# Expected: the kind of mask is one's own choice. The documentation of the attention interface: a function registered
# with AttentionInterface gets the masks of the function of the same name in AttentionMaskInterface, for which it gives
# `sdpa_mask`, which makes boolean ones, as the example.
# Seen: the compressor's bias of 0 (keep) and -inf (drop) is cast to the dtype of the mask before both are joined; in a
# boolean mask 0 becomes False (hidden) and -inf True (visible). The same function gives the logits of "eager" with an
# additive mask (difference 0) and others with a boolean one.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.masking_utils import eager_mask, sdpa_mask


def attention(module, query, key, value, attention_mask, scaling, **_):
    """Plain attention with learned sinks that reads a mask of either kind as documented."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query @ key.mT * scaling
    if attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    else:
        logits = logits + attention_mask
    sinks = module.sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), None


for name, mask in (("additive", eager_mask), ("boolean", sdpa_mask)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
config = DeepseekV4Config(
    vocab_size=97, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
    q_lora_rank=16, n_routed_experts=4, num_experts_per_tok=2, layer_types=["compressed_sparse_attention"] * 2,
    mlp_layer_types=["moe"] * 2, sliding_window=8, o_groups=2, o_lora_rank=16, index_n_heads=16, index_head_dim=16,
    index_topk=4, hc_mult=2,
)
torch.manual_seed(0)
model = DeepseekV4ForCausalLM(config).eval()
for weight in model.parameters():
    if weight.ndim > 1:
        torch.nn.init.normal_(weight, std=0.2)
found = {}
for name in ("eager", "additive", "boolean"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        found[name] = model(input_ids=torch.arange(3, 60)[None]).logits
off = {name: float((x - found["eager"]).abs().max() / found["eager"].std()) for name, x in found.items()}
print(f"transformers {transformers.__version__}: off from eager, in standard deviations: {off}")
assert off["additive"] < 1e-3 and off["boolean"] > 0.5, "both kinds of mask now give the same"
PYTHON
