#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0 (CPU), seen 2026-11-30: a Flux pipeline in bfloat16 tells its transformer one and the
# same time in different steps.
#
# Expected: as many times as steps. The scheduler keeps its 50 timesteps, all different, in float32; the documentation
# of the transformer's `timestep` says that it indicates the denoising step.
# Seen: with shift=10 and 50 steps the transformer is given 45 different times, five of them twice: the pipeline
# rounds the scheduler's time to the dtype of the latents before it hands it on, and neighbours near the beginning
# become equal. In those steps the model removes noise of a level that is not there; and whatever tells steps by the
# value of `timestep` (caches of blocks or attention, schedules of guidance) loses count. In float32 it is given 50.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import warnings
from collections import Counter

import diffusers
import torch

warnings.simplefilter("ignore")
diffusers.utils.logging.set_verbosity_error()
STEPS = 50


def times(dtype):
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=10.0),
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.1),
        transformer=transformer, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    ).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    transformer.register_forward_pre_hook(lambda m, a, given: seen.append(float(given["timestep"][0])), with_kwargs=True)
    pipe(
        prompt_embeds=torch.ones(1, 4, 16, dtype=dtype), pooled_prompt_embeds=torch.ones(1, 8, dtype=dtype),
        height=16, width=16, num_inference_steps=STEPS, output_type="latent",
    )
    assert len(pipe.scheduler.timesteps.unique()) == STEPS
    return Counter(seen)


print(f"diffusers {diffusers.__version__}, torch {torch.__version__}")
whole, half = times(torch.float32), times(torch.bfloat16)
for name, seen in (("float32", whole), ("bfloat16", half)):
    print(f"{name}: {sum(seen.values())} steps, {len(seen)} different times, one of them {max(seen.values())} times")
assert sum(half.values()) == STEPS and len(whole) == STEPS, "the premise no longer holds"
assert len(half) == 45, "the number of different times has changed"
PYTHON
