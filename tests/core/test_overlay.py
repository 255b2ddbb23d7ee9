"""Attributes over one another: they come off in any order, and what was before shows again."""

from __future__ import annotations

from typing import Any

import pytest

from hf_sparse_attn.overlay import Overlay, own_value


class Owner:
    name = "of the class"


@pytest.mark.parametrize("first", ["lower", "upper"])
@pytest.mark.parametrize("before", ["absent", "own"])
def test_overlays_come_off_in_any_order(first: str, before: str) -> None:
    owner: Any = Owner()
    if before == "own":
        owner.name = "own"
    was = dict(owner.__dict__)
    lower = Overlay(owner, "name", "lower")
    upper = Overlay(owner, "name", "upper")
    assert own_value(owner, "name") == ("own" if before == "own" else "of the class")
    (lower if first == "lower" else upper).lift()
    assert owner.name == ("upper" if first == "lower" else "lower")
    (upper if first == "lower" else lower).lift()
    assert owner.__dict__ == was
    upper.lift()
    assert owner.__dict__ == was


def test_an_overlay_in_the_middle_comes_off() -> None:
    owner: Any = Owner()
    one, two, three = (Overlay(owner, "name", n) for n in (1, 2, 3))
    two.lift()
    assert owner.name == 3
    three.lift()
    assert owner.name == 1
    one.lift()
    assert not owner.__dict__


def test_an_overlay_that_yields_leaves_what_was_set_since() -> None:
    owner: Any = Owner()
    firm, yielding = Overlay(owner, "name", 1), Overlay(owner, "other", 2, yields=True)
    owner.name, owner.other = "mine", "mine"
    firm.lift()
    yielding.lift()
    assert owner.__dict__ == {"other": "mine"}
