"""The shipped table of a CPU is of one with matrix units for bfloat16 where it has them, else of one without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.cost.table import Shape

CPU = torch.device("cpu")
LONG = Shape(4096, 4096, True, 8, 64, "bfloat16")


@pytest.fixture(autouse=True)
def another_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cost, "device_name", lambda device: "unheard of")
    cost.forget()
    yield
    cost.forget()


def _table(monkeypatch: pytest.MonkeyPatch, *features: str) -> cost.Table:
    monkeypatch.setattr(cost, "cpu_features", lambda: frozenset(features))
    cost.forget()
    return cost.table_for(CPU)


def test_there_is_one_table_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with_units, without = _table(monkeypatch, "avx2", "amx_bf16"), _table(monkeypatch, "avx2")
    assert with_units.origin == without.origin == "shipped"
    plain = LONG._replace(dtype="float32")
    assert with_units.dense_seconds(LONG) < 0.6 * with_units.dense_seconds(plain)
    assert without.dense_seconds(LONG) > 0.8 * without.dense_seconds(plain)


def test_what_a_method_estimates_does_not_get_faster_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(monkeypatch, "amx_bf16")
    assert table.choosing_seconds(LONG, 1e6) == table.choosing_seconds(LONG._replace(dtype="float32"), 1e6)


def test_only_a_cpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "cpu_features", lambda: frozenset({"amx_bf16"}))
    assert cost.has_matrix_units(CPU) and not cost.has_matrix_units(torch.device("meta"))
