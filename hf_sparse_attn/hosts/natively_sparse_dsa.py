"""DeepSeek sparse attention in transformers: an indexer chooses single keys, latent attention of all heads reads them.

The six models differ in what their indexer is given and how it rotates; selection and attention are the same. Layers
without an indexer of their own get the lists of the last layer that has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.hosts.natively_sparse_index import INDEXERS, select
from hf_sparse_attn.hosts.natively_sparse_kind import Attended, Kind, OwnCall, awake, replace_method, why_other
from hf_sparse_attn.hosts.natively_sparse_latent import (
    attend_expanded,
    attend_latent,
    caches_latents,
    keep_latents,
)
from hf_sparse_attn.hosts.natively_sparse_mask import visible_of
from hf_sparse_attn.hosts.natively_sparse_window import attend_window
from hf_sparse_attn.patching import Patch


class DSA(Kind):
    """DeepSeek-V3.2, GLM-5, HunYuan V4, Mistral Large 4, A.X K2 and dots3.note.

    Seams: `indexer.forward`, which selects in strips of queries, and `expand_kv`, which hands the latents on, so that
    only what is read need be expanded. The lists come to the attention function as `indices`.
    """

    name: ClassVar[str] = "DSA"
    models: ClassVar[frozenset[str]] = frozenset(INDEXERS)

    def why_not(self, owner: Any, modules: Sequence[Any]) -> str | None:
        """See Kind."""
        takes = INDEXERS[owner.config.model_type.removesuffix("_text")].takes
        for module in modules:
            where = f"layer {module.layer_idx} ({type(module).__name__})"
            if not hasattr(module, "indexer"):
                return f"{where} has no `indexer`"
            why = why_other(module, "expand_kv", "kv_nope", "k_rot")
            if why is None and module.indexer is not None:
                why = why_other(module.indexer, "forward", *takes)
            if why is not None:
                return f"{where}: {why}"
            if module.indexer is None and not (_shares(module) or _window(module)):
                return f"{where} has no `indexer`, and is no layer that takes over another's selection"
        return None

    def own_sparsity(self, module: Any) -> str | None:
        """See Kind."""
        window = _window(module)
        return None if window is None else f"layer's own sliding window of {window}"

    def install(self, patch: Patch, module: Any) -> None:
        """See Kind."""
        runs = partial(awake, module)
        if module.indexer is not None:
            how = INDEXERS[module.config.model_type.removesuffix("_text")]
            replace_method(patch, module.indexer, "forward", partial(select, how), runs)
        if caches_latents(module):
            replace_method(patch, module, "expand_kv", keep_latents, runs)

    def attend(self, state: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
               kwargs: Mapping[str, Any]) -> Attended | str:  # fmt: skip
        """See Kind; k and v are the latents and the rotated part of the keys, where the seam hands these on."""
        lists, visible = kwargs.get("indices"), visible_of(mask)
        if lists is None:
            return "the layer hands no selection over"
        if visible is None:
            return "mask that weighs keys"
        run = attend_latent if caches_latents(module) else attend_expanded
        out, backend = run(module, q, k, v, lists, kwargs["scaling"], kwargs.get("s_aux"))
        heads = q.shape[1]
        listed = int((lists >= 0).sum()) * heads
        return Attended(out, listed, visible.pairs(q.shape[0], q.shape[2], k.shape[2]) * heads, backend)

    def narrow(self, module: Any, call: OwnCall) -> Tensor | None:
        """See Kind."""
        return attend_window(call.q, call.k, call.v, call.mask, call.kwargs)

    def own(self, module: Any, call: OwnCall, active: bool) -> OwnCall:
        """See Kind."""
        q, k, v, mask, kwargs = call
        lists = kwargs.get("indices")
        if active and caches_latents(module):
            k, v = type(module).expand_kv(module, k, v)
        if lists is None:
            return call._replace(k=k, v=v)
        hidden = torch.ones(q.shape[0], q.shape[2], k.shape[2] + 1, dtype=torch.bool, device=q.device)
        hidden.scatter_(2, lists.long().where(lists >= 0, k.shape[2]), False)
        hidden = hidden[:, None, :, :-1]
        if mask.dtype == torch.bool:
            mask = mask & ~hidden
        else:
            mask = mask.masked_fill(hidden, torch.finfo(q.dtype).min)
        return OwnCall(q, k, v, mask, {**kwargs, "indices": None})


def _shares(module: Any) -> bool:
    """Whether a layer takes over the selection of one before it."""
    return bool(getattr(module, "skip_topk", False))


def _window(module: Any) -> int | None:
    """The sliding window of a layer that is no indexed one."""
    return None if module.indexer is not None else getattr(module, "sliding_window", None)
