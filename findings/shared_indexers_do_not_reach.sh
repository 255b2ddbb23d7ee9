#!/usr/bin/env bash
# transformers 5.23.0 (Glm5NextTextModel), seen 2026-12-01: schedules of shared indexers that the configuration makes
# itself raise in the forward.
#
# Expected: a layer marked "shared" reuses what the last full one chose. The documentation of the configuration:
# `indexer_types`, "Per-layer DSA indexer mode. Values are "full" (run the indexer) or "shared" (reuse the previous full
# layer's top-k selection)"; index_topk_freq=4 writes such a list, three shared layers after each full one.
# Seen: one shared layer right after a full one runs. A second one, or one with a layer of linear attention between,
# raises ValueError, for the selection is handed on to the next layer only. So the schedule that the configuration makes
# for index_topk_freq=4 does not run, neither among indexed layers alone nor in the default mix of layers.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

FULL, SHARED, INDEXED, LINEAR = "full", "shared", "indexed_attention", "linear_attention"


def runs(layers, **roles):
    """What a tiny model of these layers says to a forward of 37 tokens."""
    config = Glm5NextTextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=len(layers), layer_types=layers,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, v_head_dim=16,
        qk_nope_head_dim=16, index_topk=8, index_head_dim=16, index_n_heads=16, index_kpool=4, linear_head_dim=16,
        linear_num_heads=4, mlp_layer_types=["dense"] * len(layers), pad_token_id=0, **roles,
    )
    try:
        with torch.no_grad():
            Glm5NextTextModel(config).eval()(input_ids=torch.arange(3, 40)[None])
    except ValueError as error:
        return str(error)
    return "runs"


found = {
    "one shared": runs([INDEXED] * 3, indexer_types=[FULL, SHARED, FULL]),
    "two shared": runs([INDEXED] * 3, indexer_types=[FULL, SHARED, SHARED]),
    "linear between": runs([INDEXED, LINEAR, INDEXED], indexer_types=[FULL, FULL, SHARED]),
    "index_topk_freq=4": runs([INDEXED] * 6, index_topk_freq=4),
}
print(f"transformers {transformers.__version__}: {found}")
assert found.pop("one shared") == "runs", "a single shared layer no longer runs"
assert all("Shared DSA layers require" in said for said in found.values()), "shared layers are reached now"
PYTHON
