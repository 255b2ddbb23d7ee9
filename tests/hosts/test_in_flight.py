"""Patches that come and go while a forward is at work: it ends as it began, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest

from hf_sparse_attn.hosts.transformers_forward import forwards_here
from tests.support.served import DENSE, MODELS, InTheMiddle, Served, learnt

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=MODELS)
def served(request: Any) -> Served:
    return learnt(request.param)


# Of models of images `rope_deltas` is the last call's.
_LEFT_OUT = {"_modules", "_parameters", "_buffers", "rope_deltas"}


def attributes(model: Any) -> list[Any]:
    """All attributes that stand in a model, in its processors and in its configs."""
    found = []
    for name, module in model.named_modules():
        for one in (module, getattr(module, "processor", None), getattr(module, "config", None)):
            values = {k: str(v) for k, v in getattr(one, "__dict__", {}).items() if k not in _LEFT_OUT}
            found.append((name, type(one), values))
    return found


@pytest.fixture(autouse=True)
def as_before(served: Served) -> Iterator[None]:
    before = attributes(served.model)
    yield
    assert attributes(served.model) == before
    assert served.found(0, served.run(0)) == [DENSE]


def test_a_patch_that_is_removed_meanwhile(served: Served) -> None:
    patch = served.patch("window")
    one = InTheMiddle(served)
    patch.remove()
    # Dense to the bit from now on, and free to be patched.
    assert served.found(1, served.run(1)) == [DENSE]
    assert served.found(0, one.end()) == ["window"]


def test_a_patch_that_is_put_on_meanwhile(served: Served) -> None:
    one = InTheMiddle(served)
    with served.patch("window") as patch:
        assert served.found(1, served.run(1)) == ["window"]
        calls = patch.report().to_dict()
        # Strict: what began dense is no fallback, nor is it counted.
        assert served.found(0, one.end()) == [DENSE]
        assert patch.report().to_dict() == calls


@pytest.mark.parametrize("last", ["old", "new"])
def test_a_patch_that_is_followed_by_another(served: Served, last: str) -> None:
    """Whichever of them ends last."""
    first = served.patch("window")
    one = InTheMiddle(served)
    first.remove()
    second = served.patch("top")
    two = InTheMiddle(served, 1)
    assert served.found(2, served.run(2)) == ["top"]
    if last == "new":
        assert served.found(0, one.end()) == ["window"]
    second.remove()
    assert served.found(2, served.run(2)) == [DENSE]
    assert served.found(1, two.end()) == ["top"]
    if last == "old":
        assert served.found(0, one.end()) == ["window"]


def test_a_patch_that_is_removed_by_its_own_forward(served: Served) -> None:
    patch = served.patch("top")
    handle = served.layer.register_forward_pre_hook(lambda *_: patch.remove())
    assert served.found(0, served.run(0)) == ["top"]
    handle.remove()
    assert served.found(0, served.run(0)) == [DENSE]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_exception_leaves_nothing_patched(served: Served, error: BaseException) -> None:
    """Not even while it is handled: its traceback holds all that the forward had."""

    def stop(*_: Any) -> None:
        raise error

    before = attributes(served.model)
    handle = served.layer.register_forward_pre_hook(stop)
    inside = attributes(served.model)
    with pytest.raises(type(error)) as caught:
        with served.patch("top"):
            served.run(0)
    assert attributes(served.model) == inside and caught.value is error
    handle.remove()
    assert attributes(served.model) == before
    # A forward that an interrupt left behind is forgotten by the next one.
    with served.patch("top"):
        served.run(0)
    assert not forwards_here()


def test_after_an_interrupt_in_another_thread(served: Served) -> None:
    patch, interrupt = served.patch("top"), KeyboardInterrupt()

    def stop(*_: Any) -> None:
        raise interrupt

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            served.run(0)
        handle.remove()
        assert served.found(1, served.run(1)) == ["top"]
        ran.append(True)

    ran: list[bool] = []
    handle = served.layer.register_forward_pre_hook(stop)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran
    before = attributes(served.model)
    patch.remove()
    assert attributes(served.model) != before and served.found(0, served.run(0)) == [DENSE]


def test_one_pauses_and_the_other_does_not(served: Served) -> None:
    with served.patch("window") as patch:
        with patch.paused():
            one = InTheMiddle(served)
            assert served.found(1, served.run(1)) == [DENSE]
        assert served.found(0, one.end()) == ["window"]
        # The other way round: what began outside of the pause is not in it.
        two, found = InTheMiddle(served), []
        with patch.paused():
            found = served.found(0, two.end())
        assert found == ["window"]


def test_two_that_patch_at_a_time(served: Served) -> None:
    gate, made = threading.Barrier(4), []

    def put_on() -> None:
        gate.wait()
        try:
            made.append(served.patch("window"))
        except ValueError as error:
            assert "patched already" in str(error)

    threads = [threading.Thread(target=put_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and served.found(0, served.run(0)) == ["window"]
    made[0].remove()


def test_a_patch_keeps_no_model_alive(served: Served) -> None:
    made = next(m for name, m in MODELS.items() if type(m().model) is type(served.model))()
    with made.patch("window"):
        one = InTheMiddle(made)
        alive = ref(made.model)
    one.end()
    del made, one
    gc.collect()
    assert alive() is None
