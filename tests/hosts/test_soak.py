"""A short soak; `python -m tests.soak` is the whole one."""

from __future__ import annotations

import pytest

from tests.soak import soak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_many_calls_in_many_threads_while_patches_come_and_go() -> None:
    pytest.importorskip("diffusers")
    found = soak(calls=400, threads=8)
    assert (found.wrong, found.errors, found.grown) == ([], [], {})
    assert found.calls == 400 and found.changes > 20 and min(found.ways.values()) > 20
