"""From how many keys on a call of few queries pays for not being the model's own, exact or sparse.

Such a call reads its keys and computes next to nothing, so that bytes and the seconds around them are all that counts.
"""

from __future__ import annotations

from functools import lru_cache

import torch

# Keys from which on folding the heads of a group beats the attention of torch, which repeats keys and values for each
# of them on a CPU: measured in whole decoding steps of 9 heads for 3, where both took as long.
_FOLDED = 192
# Keys from which on choosing pages has paid for itself, measured with one query and an eighth of the pages kept; on
# what is no CPU small operators wait for one another, where an exact call is one kernel.
_CHOSEN = {"cpu": 4096}
_CHOSEN_ELSEWHERE = 16384


@lru_cache(maxsize=256)
def fewest_exact(device_type: str, heads: int, kv_heads: int) -> int | None:
    """Fewest keys from which on exact attention of few queries beats the model's own; None where it never does.

    Args:
        device_type: as "cpu".
        heads, kv_heads: of queries and of keys.
    """
    return _FOLDED if device_type == "cpu" and heads != kv_heads else None


@lru_cache(maxsize=256)
def fewest_sparse(device_type: str) -> int:
    """Fewest keys from which on choosing some of them for one query beats reading all."""
    return _CHOSEN.get(device_type, _CHOSEN_ELSEWHERE)


def pays_exact(q: torch.Tensor, kv_heads: int, keys: int) -> bool:
    """Whether exact attention of the few queries `q` [batch, heads, queries, dim] beats the model's own."""
    fewest = fewest_exact(q.device.type, q.shape[1], kv_heads)
    return fewest is not None and keys >= fewest
