#!/usr/bin/env bash
# transformers 5.23.0 (MiniMaxM3VLForCausalLM), seen 2026-12-01: a prompt padded on the left gives other logits than the
# same prompt alone, although the attention mask tells where the padding is.
#
# Expected: the mask settles it. The documentation of text generation asks for padding on the left and for the attention
# mask with it; other decoders then agree with the prompt alone up to rounding.
# Seen: layers of the type "minimax_m3_sparse" cut the cache into blocks of slots, but tell what a query may see by its
# position without the padding. With 7 tokens of padding the blocks of the query are looked for 7 slots too early:
# logits are off by several times their standard deviation, alike in "eager" and "sdpa". Padding on the right changes
# nothing at all.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

PADDING, TOKENS = 7, 23
config = MiniMaxM3VLTextConfig(
    vocab_size=97, hidden_size=64, intermediate_size=32, dense_intermediate_size=64, shared_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=16, rotary_dim=8,
    index_n_heads=2, index_head_dim=16, index_block_size=4, index_topk_blocks=2,
    layer_types=["minimax_m3_sparse"] * 2, mlp_layer_types=["dense"] * 2, pad_token_id=0,
)
torch.manual_seed(1)
model = MiniMaxM3VLForCausalLM(config).eval()
for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else torch.nn.init.zeros_(weight)
ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(5))
pad = torch.zeros(1, PADDING, dtype=torch.long)


@torch.no_grad()
def logits(ids, real):
    found = model(input_ids=ids, attention_mask=real.long()[None]).logits
    return found[:, real]


alone = logits(ids, torch.ones(TOKENS, dtype=torch.bool))
place = torch.arange(TOKENS + PADDING)
left = (logits(torch.cat([pad, ids], 1), place >= PADDING) - alone).abs().max() / alone.std()
right = (logits(torch.cat([ids, pad], 1), place < TOKENS) - alone).abs().max() / alone.std()
print(f"transformers {transformers.__version__}: off by {left:.2f} standard deviations padded left, {right:.5f} right")
assert left > 0.5 and right < 1e-4, "left padding no longer changes the result"
PYTHON
