"""Whether a call of few queries pays for not being the model's own: exact attention by groups of heads, or sparse.

Such a call reads its keys and values and computes next to nothing, so that bytes, and what is done around them, are
all that counts. Measured on one thread of an Intel Xeon with AMX, with 9 heads of 64 for 3 and 32 of 128 for 8, in
float32 and bfloat16; what is no CPU is assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of the queries' heads, times keys, from which on reading keys once for a group of heads beats the attention
# of torch, which repeats them for each head on a CPU. (With whole heads it is as fast.)
_GROUPED = 150_000
# Bytes per second and thread at which keys and values are read, and threads from which on more of them do not help.
_RATE, _THREADS = 14e9, 4
_RATE_ELSEWHERE = 2e12
# Seconds that choosing takes besides reading, for its many small operators, and what is done around it.
_AROUND, _AROUND_ELSEWHERE = 2.3e-4, 4e-4
# Reading pages here and there takes so much longer than reading all in a row; two numbers in float32 for each channel
# of a page of 16 keys are read to choose.
_SCATTERED = 1.3
_READ_TO_CHOOSE = 2 * 4 / 16
# What is kept where the method does not say.
_USUAL_SHARE = 1 / 8


def pays_exact(q: Tensor, kv_heads: int, keys: int) -> bool:
    """Whether exact attention of the few queries `q` [batch, heads, queries, dim] beats the model's own."""
    return q.device.type == "cpu" and q.shape[1] != kv_heads and q.numel() * keys >= _GROUPED


def sparse_gain(k: Tensor, v: Tensor, share: float | None) -> float:
    """Predicted seconds of reading all keys for one query over those of choosing some of them and reading these.

    Args:
        k, v: [batch, kv_heads, keys, dim].
        share: of the keys that is read; None where the method does not say.
    """
    cpu = k.device.type == "cpu"
    rate = _RATE * min(torch.get_num_threads(), _THREADS) if cpu else _RATE_ELSEWHERE
    exact = (k.numel() * k.element_size() + v.numel() * v.element_size()) / rate
    around = _AROUND if cpu else _AROUND_ELSEWHERE
    chosen = exact * min(1.0, _SCATTERED * (_USUAL_SHARE if share is None else share))
    return exact / (around + chosen + k.numel() * _READ_TO_CHOOSE / rate)
