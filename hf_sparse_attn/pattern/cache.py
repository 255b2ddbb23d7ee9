"""Patterns of static methods, built once for a layout."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

import torch

from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern

_STATIC: OrderedDict[Any, BlockPattern | Decline] = OrderedDict()
_STATIC_LOCK = Lock()
_STATIC_SIZE = 64


def cached_pattern(method: Method, ctx: Context, device: torch.device) -> BlockPattern | Decline:
    """The pattern of a static method on `device`, built once per parameters and layout (the last 64 are kept)."""
    key = (method, method.cache_key(ctx), device)
    with _STATIC_LOCK:
        if key in _STATIC:
            _STATIC.move_to_end(key)
            return _STATIC[key]
    found = method.pattern(None, None, ctx)
    if isinstance(found, BlockPattern):
        found = found.to(device)
    with _STATIC_LOCK:
        _STATIC[key] = found
        while len(_STATIC) > _STATIC_SIZE:
            _STATIC.popitem(last=False)
    return found
