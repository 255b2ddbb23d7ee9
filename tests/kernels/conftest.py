"""What tests of kernels share."""

from __future__ import annotations

import pytest


@pytest.fixture
def as_if_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels think that they are interpreted: nothing but the call itself can be refused."""
    common = pytest.importorskip("hf_sparse_attn.kernels.triton_common")
    monkeypatch.setattr(common, "runs_interpreted", lambda: True)
