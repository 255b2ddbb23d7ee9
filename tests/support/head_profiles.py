"""Head profiles of random choices, and a reader of the HTML that shows them."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import numpy as np

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles.head_profile import HeadProfile, StepPlan
from hf_sparse_attn.profiles.measurements import Case, HeadMap, Measurements
from hf_sparse_attn.sharing.fingerprint import Fingerprint

HOSTILE = '<script src="http://evil.example/x.js">alert(1)</script>\'"&$\\frac{1}$'
CANDIDATES = (
    hsa.get_method("dense")(),
    hsa.get_method("sliding_window")(window=64, sink=16),
    hsa.get_method("sliding_window")(window=256, sink=16),
    hsa.get_method("vertical_slash")(vertical=30, slash=100),
    hsa.get_method("radial")(decay=0.2),
)
VIDEO = ((0.0, 0.25), (0.25, 1.0))


def make(
    layers: int = 3, heads: int = 5, steps: Any = ((0.0, 1.0),), measured: bool = True, **given: Any
) -> HeadProfile:
    """A profile of random choices among four of the candidates (radial is left out), with what was measured."""
    draw = np.random.default_rng(layers * heads)
    shape = (len(steps), layers, heads)
    figures = {n: draw.uniform(0.01, 1, (*shape, 5)).astype(np.float32) for n in ("density", "seconds", "recall")}
    figures["output_error"] = draw.uniform(0.01, 0.5, (*shape, 5)).astype(np.float32)
    figures["output_error_p95"] = 2 * figures["output_error"]
    figures["density"][..., 0], figures["recall"][..., 0], figures["output_error"][..., 0] = 1, 1, 0
    for values in figures.values():
        values[:, 0, heads - 1, 3] = math.nan
    kept = draw.random((5, 6, 6)) > 0.5
    maps = [
        HeadMap(case, layer, heads - 1, draw.random((6, 6), np.float32), kept)
        for case in range(len(steps))
        for layer in range(layers)
    ]
    cases = tuple(Case(333, s) for s in steps)
    names = tuple(f"layers.{i}" for i in range(layers))
    found = Measurements(CANDIDATES, names, heads, 1, cases, figures, {"radial(decay=0.2)": HOSTILE}, maps)
    choice = draw.integers(0, 4, shape)
    choice[:, 0, heads - 1] = 1
    at = np.indices(shape)
    picked = {n: v[at[0], at[1], at[2], choice] for n, v in figures.items() if n != "seconds"}
    picked["damage"] = picked["output_error"].copy()
    parts: dict[str, Any] = dict(
        model=Fingerprint("LlamaModel", "llama", layers, heads, 1, 64, "abc", "def"), methods=CANDIDATES[:4],
        plans=tuple(StepPlan(s, choice[i]) for i, s in enumerate(steps)), figures=picked, metric="output_error",
        budget={"density": 0.25}, calibration={"batches": 3, "lengths": [512, 1024], "note": None},
        pareto=((0.1, 9.0), (0.25, 4.0), (0.9, 0.0)), versions={"torch": "2.13"},
        measurements=found if measured else None,
    )  # fmt: skip
    return HeadProfile(**{**parts, **given})


class Page(HTMLParser):
    """Tags with attributes, and the text of the page; every tag must be closed in order."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "
