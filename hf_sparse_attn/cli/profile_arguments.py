"""The options of `hf-sparse-attn profile`; without torch, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hf_sparse_attn.shipped import SHIPPED


def add(parser: argparse.ArgumentParser, numbers: Callable[[str], tuple[int, ...]]) -> None:
    """The options of the command; `numbers` parses ints separated by commas."""
    parser.add_argument(
        "model", help=f"folder or Hub id of a language model or video pipeline; or {', '.join(SHIPPED)}"
    )
    parser.add_argument("--data", metavar="FILE", help="text to calibrate on; for a pipeline one prompt per line")
    parser.add_argument("--length", type=numbers, metavar="N,N", help="tokens of a calibration text: 4096")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="texts of each length, or prompts: 4")
    parser.add_argument("--budget", type=float, default=0.25, metavar="X", help="share of the dense cost: 0.25")
    parser.add_argument(
        "--per", choices=("density", "time"), default="density", help="what the budget counts: density"
    )
    parser.add_argument("--metric", help="what damage is, as hsa.profile takes it; layer_error if not given")
    parser.add_argument("--candidates", metavar="FILE", help='JSON: [{"method": "svg", "params": {...}}, ...]')
    parser.add_argument("--passes", type=int, default=1, help="2: measure again with the choice in force")
    parser.add_argument(
        "--steps", metavar="X,X", help="edges of step ranges that get choices of their own: 0.3 or 0.2,0.6"
    )
    parser.add_argument("--call", metavar="JSON", help='arguments of the pipeline: {"num_frames": 81, "height": 480}')
    parser.add_argument(
        "--query-blocks", type=int, metavar="N", help="runs of 128 queries measured per call; automatic"
    )
    parser.add_argument("--max-plans-per-layer", type=int, metavar="N", help="most distinct methods in a layer")
    parser.add_argument("--same-in-group", action="store_true", help="one method for the heads of a key/value head")
    parser.add_argument("--state", metavar="FILE", help="keep what was measured here, and go on from it")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16: auto")
    parser.add_argument("--seed", type=int, default=0, help="0")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the profile goes")
