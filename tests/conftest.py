"""What holds for every test: no hub, quiet libraries, few threads."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

# Processes that share a machine share its cores; torch reads this when it is imported.
if (_WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
# Tables have the width of a terminal, which not every test process has.
os.environ["COLUMNS"] = "140"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


import pytest
import torch

from tests.support import real_weights


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed to processes in their order: by their numbers of tests, those that take longest come last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for the modules that ask for it: with tiny tensors more of them only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing was compiled before, and nothing that the test compiles is there after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN, so that a place nobody wrote shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _no_own_costs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever runs the tests may have calibrated the machine: the tests use the table that is shipped."""
    from huggingface_hub import constants

    from hf_sparse_attn.pretrained import smollm2

    # What takes long to make and is the same for all stays where the user has it.
    shared = smollm2.cache_folder()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(smollm2, "cache_folder", lambda: shared)
        patched.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, or the packages of real weights, where there is none, and says so."""
    lacks = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "real": real_weights.why_not(),
    }
    for item in items:
        for name, reason in lacks.items():
            if reason is not None and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _interpret() -> None:
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process whose Triton interprets: Triton decides that when it is imported, and here it may have been."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret) as pool:
        yield pool
