"""How time and memory of models that select their own keys grow, in processes of their own."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support import tiny_natively_sparse as tiny
from tests.support.processes import run_code

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("deepseek_v32" not in tiny.NAMES, reason="not in this transformers"),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows tells no peak of memory this way"),
]

_RUN = """
import json, resource, sys, time
import torch
import hf_sparse_attn as hsa
from tests.support import tiny_natively_sparse as tiny

torch.set_num_threads(1)
model = tiny.build("{name}", "sdpa", num_hidden_layers={layers}, index_topk=64)
if {patched}:
    hsa.patch(model, "native")

def peak():
    # Bytes on a Mac, kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

with torch.no_grad():
    model(input_ids=tiny.ids(64))
    before, start = peak(), time.process_time()
    model(input_ids=tiny.ids({tokens}), use_cache=False, logits_to_keep=1)
print(json.dumps({{"seconds": time.process_time() - start, "bytes": peak() - before}}))
"""


def measured(tokens: int, how: str, name: str = "deepseek_v32", layers: int = 2) -> dict[str, float]:
    done = run_code(_RUN.format(tokens=tokens, patched=how == "native", name=name, layers=layers))
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_quarter_of_the_memory_and_a_fraction_of_the_time() -> None:
    own, native = measured(2048, "own"), measured(2048, "native")
    assert native["bytes"] <= 0.25 * own["bytes"]
    assert native["seconds"] <= 0.35 * own["seconds"]


# With a layer that sees a window alone.
SIZES = [(name, layers) for name, layers in (("deepseek_v32", 2), ("dots3_note", 3)) if name in tiny.NAMES]


@pytest.mark.parametrize(("name", "layers"), SIZES)
def test_memory_grows_with_the_length(name: str, layers: int) -> None:
    """Twice the tokens take about twice the memory, where all pairs would take four times as much."""
    short, long = (measured(tokens, "native", name, layers) for tokens in (3072, 6144))
    assert long["bytes"] <= 2.5 * short["bytes"]
