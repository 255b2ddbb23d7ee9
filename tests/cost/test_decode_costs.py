"""When calls of few queries are worth not being the model's own: by the bytes that they read."""

from __future__ import annotations

import pytest
import torch

from hf_sparse_attn.cost.decoding import pays_exact, sparse_gain


@pytest.fixture(autouse=True)
def one_thread_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def cache(
    kv_heads: int, dim: int, keys: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> torch.Tensor:
    return torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)[0].expand(1, kv_heads, keys, dim)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, keys, pays",
    [
        (9, 3, 64, 128, False),
        (9, 3, 64, 512, True),
        (32, 8, 128, 64, True),
        (32, 32, 128, 16384, False),
    ],
)
def test_exact_pays_where_heads_share_keys_and_there_are_enough(
    heads: int, kv_heads: int, dim: int, keys: int, pays: bool
) -> None:
    assert pays_exact(torch.zeros(1, heads, 1, dim), kv_heads, keys) == pays
    assert not pays_exact(torch.zeros(1, heads, 1, dim, device="meta"), kv_heads, keys)


def test_what_was_measured_is_what_is_predicted() -> None:
    # An eighth of the pages: 9/3 heads of 64 in bfloat16 lost at 4096 keys and won at 8192; 32/8 of 128 won at 2048.
    assert sparse_gain(*[cache(3, 64, 4096)] * 2, 1 / 8) < 1 < sparse_gain(*[cache(3, 64, 8192)] * 2, 1 / 8)
    assert sparse_gain(*[cache(8, 128, 2048)] * 2, None) > 1
    assert sparse_gain(*[cache(3, 64, 2048, torch.float32)] * 2, 1 / 8) < 1
    assert sparse_gain(*[cache(3, 64, 4096, torch.float32)] * 2, 1 / 8) > 1


def test_the_gain_grows_with_the_length_and_falls_with_the_share() -> None:
    lengths = [sparse_gain(*[cache(8, 128, n)] * 2, 1 / 8) for n in (1024, 4096, 16384, 65536)]
    shares = [sparse_gain(*[cache(8, 128, 16384)] * 2, share) for share in (1 / 32, 1 / 8, 1 / 2, 1.0)]
    assert lengths == sorted(lengths) and shares == sorted(shares, reverse=True)
    assert shares[-1] < 1
    # What is no CPU reads so fast that choosing is worth it for far more keys.
    assert sparse_gain(*[cache(8, 128, 16384, device="meta")] * 2, 1 / 8) < 1
