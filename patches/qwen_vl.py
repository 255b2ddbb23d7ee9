"""Family qwen_vl: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE of transformers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_sparse_attn import recomputation
from hf_sparse_attn.compiled import in_program
from hf_sparse_attn.family import has_class, pretrained_models
from hf_sparse_attn.hosts.vision_layout import IMAGE, TEXT, VIDEO, Tokens, read_tokens, text_tokens
from hf_sparse_attn.hosts.vision_segments import Cut, Segments
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.registry import FAMILIES
from hf_sparse_attn.session import Session
from hf_sparse_attn.transforms import are_transformed

log = logging.getLogger(__name__)

# The models that hold a vision tower and a text decoder; their classes for generation hold one of these.
_MODELS = frozenset({"Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel", "Qwen3VLMoeModel"})
# Where a cache keeps what its tokens are: it goes wherever the cache goes, and a deep copy has it too.
_CACHE_ATTRIBUTE = "_hsa_tokens"
# Where features that were encoded ahead keep the grids they came from.
_GRID_ATTRIBUTE = "_hsa_grid"


@FAMILIES.register("qwen_vl")
class QwenVL:
    """Qwen-VL models: their causal text attention sparse, their vision tower exact and in fewer calls.

    Text: every token of a call is known as text or as a place (clip, frame, row, column) of an image or video; see
    TokenLayout.coordinates. This is learnt before each forward from the token ids and grids, kept with the cache
    (which may be cropped, copied and continued with more images), and passed down as an argument of the call. Where
    it cannot be known (embeddings without `mm_token_type_ids`, a cache filled without the patch, inside
    torch.compile) methods that read no grid run as on text.

    Methods: all causal ones. One that needs the video grid and takes a causal layout runs on prompts with exactly one
    image or video in one piece and is dense on others (Qwen3-VL puts a timestamp before every frame, so that its
    videos are many pieces). Those that need a bidirectional layout too, like radial, are refused when patching: a
    pattern that looks ahead in time means nothing to a causal decoder.

    Vision tower: its frames or windows see only themselves. Where its implementation is "sdpa", which transformers
    calls once for each, neighbours of one size are one call (vision_segments.Segments): nothing is approximated, and
    the report counts these calls as exact. With method "dense" the tower is untouched.
    """

    has_steps: ClassVar[bool] = False
    provides: ClassVar[frozenset[str]] = frozenset({"causal", "video grid"})
    models: ClassVar[str] = "transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE; vision tower in fewer calls"

    @staticmethod
    def targets(model: Any) -> list[nn.Module] | Decline:
        """The Qwen-VL models inside a model, each followed by its text decoder."""
        inner = pretrained_models(model)
        if not inner:
            return Decline("not a transformers model")
        found = [m for m in inner if has_class(m, _MODELS)]
        if not found:
            return Decline(f"{type(model).__name__} holds no {', '.join(sorted(_MODELS))}")
        # The decoder counts as patched too, for it can be patched by itself as text.
        return [part for m in found for part in (m, m.language_model)]

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family."""
        from hf_sparse_attn.hosts.transformers_install import install_text

        models: list[Any] = [m for m in patch.modules if has_class(m, _MODELS)]
        prefixes = [f"{number}." if len(models) > 1 else "" for number in range(len(models))]
        exact = patch.method.name == "dense"
        # Before install_text, for the hook that ends a forward must be the last.
        for model in [] if exact else models:
            learn = _learner(patch.session)
            patch.hook(model, "register_forward_pre_hook", learn, with_kwargs=True)
            patch.hook(model, "register_forward_hook", _keep, with_kwargs=True)
            patch.hook(model.visual, "register_forward_pre_hook", _without_tokens, with_kwargs=True)
            patch.hook(model.visual, "register_forward_hook", _keep_grid, with_kwargs=True)
        install_text(patch, [(prefix, m.language_model) for prefix, m in zip(prefixes, models, strict=True)])
        for prefix, model in [] if exact else zip(prefixes, models, strict=True):
            _install_vision(patch, model.visual, f"{prefix}visual.")

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """A Qwen2.5-VL of two layers each, and a text with a video of 4 x 3 x 5 tokens in it."""
        import transformers

        sizes = {"hidden_size": 32, "intermediate_size": 48}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        text = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        windows = {"window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, **sizes, "rope_parameters": rope},
            vision_config={**vision, **sizes, **windows},
            image_token_id=90,
            video_token_id=91,
            vision_start_token_id=92,
            vision_end_token_id=93,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = transformers.Qwen2_5_VLForConditionalGeneration(config)
            ids = torch.tensor([[*range(3, 40), 92, *[91] * 60, 93, *range(40, 52)]])
            pixels = torch.randn(4 * 6 * 10, 3 * 2 * 4 * 4)
        return model.eval(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 91).int() * VIDEO,
            "pixel_values_videos": pixels,
            "video_grid_thw": torch.tensor([[4, 6, 10]]),
        }


# ---------------------------------------------------------------------- what the tokens are


@lru_cache(maxsize=64)
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    kind: Any = type(module)
    return {**dict(zip(_parameters(kind), args, strict=False)), **kwargs}


def _learner(session: Session) -> Callable[..., Any]:
    """A pre-hook that adds what the tokens are to a forward's arguments, which reach every text attention."""
    from hf_sparse_attn.hosts.transformers_hook import TOKENS

    def learn(model: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
        # Reading ids would break the graph. In a pause what the cache holds must be known all the same.
        # Without keyword arguments torch calls a hook that another thread is just taking off.
        if torch.compiler.is_compiling() or session.ended or kwargs is None:
            return None
        return args, {**kwargs, TOKENS: _tokens(model, _by_name(model, args, kwargs))}

    return learn


def _without_tokens(visual: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
    """The vision tower gets all arguments of the model and has no use for this one."""
    from hf_sparse_attn.hosts.transformers_hook import TOKENS

    return None if kwargs is None else (args, {name: value for name, value in kwargs.items() if name != TOKENS})


def _keep(model: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
    """After a forward: leaves what the tokens are with the cache, where the next forward finds it."""
    from transformers import Cache

    from hf_sparse_attn.hosts.transformers_hook import TOKENS

    tokens = None if output is None else kwargs.get(TOKENS)
    if tokens is None:
        return
    for value in output.values() if isinstance(output, dict) else output:
        if isinstance(value, Cache):
            setattr(value, _CACHE_ATTRIBUTE, tokens)


def _keep_grid(visual: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
    """After the vision tower: leaves the grids with the features, for generate() encodes ahead and then drops them."""
    if isinstance(output, dict) and not torch.compiler.is_compiling():
        setattr(output, _GRID_ATTRIBUTE, _by_name(visual, args, kwargs).get("grid_thw"))


def _tokens(model: Any, given: dict[str, Any]) -> Tokens:
    """What the tokens of the cache and of this call are."""
    now, cache = _new_tokens(model.config, given), given.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    if past == 0:
        return now
    before: Tokens | None = getattr(cache, _CACHE_ATTRIBUTE, None)
    if before is None:
        return Tokens((), "cache filled without the patch")
    if before.unknown is None and len(before.rows) != len(now.rows or before.rows):
        return Tokens((), f"cache of {len(before.rows)} rows for {len(now.rows)}")
    if before.unknown is None and before.length < past:
        return Tokens((), "cache filled further without the patch")
    return (before.cropped(past) if before.length > past else before).then(now)


def _new_tokens(config: Any, given: dict[str, Any]) -> Tokens:
    ids, embeds, kinds = given.get("input_ids"), given.get("inputs_embeds"), given.get("mm_token_type_ids")
    like = ids if ids is not None else embeds
    if like is None:
        return Tokens((), "neither input_ids nor inputs_embeds")
    if are_transformed(ids, kinds):
        return Tokens((), "inside of a transform of torch.func")
    grids: dict[int, Tensor | None] = {}
    copies = 1
    for kind, name, pixels in ((IMAGE, "image", "pixel_values"), (VIDEO, "video", "pixel_values_videos")):
        encoded = (given.get("mm_encoder_outputs") or {}).get(name)
        if encoded is not None:
            grid = getattr(encoded, _GRID_ATTRIBUTE, None)
            if grid is None:
                return Tokens((), f"{name} features without their grids (prefill in chunks, or not encoded here)")
            grids[kind], copies = grid, max(1, len(encoded.pooler_output) // len(grid))
        elif given.get(pixels) is not None or ids is None:
            grids[kind] = given.get(f"{name}_grid_thw")
    if ids is not None:
        # Without features the ids of images are tokens like others: decoding steps need no look at them.
        if not grids:
            return text_tokens(*like.shape[:2])
        special = {IMAGE: config.image_token_id, VIDEO: config.video_token_id}
        kinds = torch.full_like(ids, TEXT)
        for kind in grids:
            kinds = kinds.masked_fill(ids == special[kind], kind)
    elif kinds is None or kinds.shape != like.shape[:2]:
        # generate() in chunks gives the types of all tokens up to the chunk's end.
        return Tokens((), "inputs_embeds without mm_token_type_ids of their own")
    # generate() with several beams or answers encodes every row once and repeats it.
    found = read_tokens(kinds[::copies], grids, config.vision_config.spatial_merge_size)
    return Tokens(tuple(row for row in found.rows for _ in range(copies)), found.unknown)


# ---------------------------------------------------------------------- the vision tower


def _install_vision(patch: Patch, visual: Any, prefix: str) -> None:
    """Lets every attention of a tower run its segments together, where transformers runs them one by one."""
    from hf_sparse_attn.hosts.transformers_forward import bind
    from hf_sparse_attn.hosts.transformers_hook import is_segment_attention
    from hf_sparse_attn.hosts.transformers_install import dense_name, switch

    # One cut for all layers of a forward, as long as the model holds the tensor it was read from.
    cuts: Any = WeakTensorKeyDictionary()
    found = [(name, module) for name, module in visual.named_modules() if is_segment_attention(module)]
    names = {dense_name(module) for _, module in found}
    if names != {"sdpa"}:
        # Flash attention takes all segments in one call anyhow; eager is for those who want the weights.
        log.info("vision tower left as it is: its attention is %s, not sdpa", " and ".join(sorted(names)) or "unknown")
        return
    bound = bind(patch, [visual])
    for index, (name, module) in enumerate(found):
        record = patch.session.record(f"{prefix}{name}", index)
        record.exact = True
        tell = _whole_row(bound, record, cuts)
        patch.hook(module, "register_forward_pre_hook", tell, with_kwargs=True)
    configs = {id(module.config): module.config for _, module in found}
    for config in configs.values():
        switch(patch, config)


def _whole_row(bound: Any, record: LayerRecord, cuts: Any) -> Callable[..., Any]:
    """A pre-hook for an attention of the tower: transformers cuts nothing, the hook is told where to."""
    from hf_sparse_attn.hosts.transformers_forward import sleeps
    from hf_sparse_attn.hosts.transformers_hook import SEGMENTS
    from hf_sparse_attn.hosts.transformers_switch import is_switched

    def tell(module: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
        if kwargs is None or torch.compiler.is_compiling() or in_program():
            return None
        # In a pause, too: what runs again in backward must meet the same.
        recomputation.note(bound.session)
        if sleeps(bound) or not is_switched(module.config):
            return None
        given = _by_name(module, args, kwargs)
        edges = given.get("cu_seqlens")
        # Of a patch before, whose forward is still at work, there may be others.
        if edges is None or SEGMENTS in given:
            return None
        # Backward that runs a layer again hands it the tensor of its forward, which was cut or was not.
        if edges not in cuts and recomputation.in_backward():
            return None
        if edges not in cuts:
            cuts[edges] = Cut.at(edges)
        cut, length = cuts[edges], given["hidden_states"].shape[0]
        if sum(cut.lengths) != length:
            return None
        # On the CPU, where reading it back waits for nothing.
        whole = torch.tensor([0, length], dtype=edges.dtype)
        return (), {**given, "cu_seqlens": whole, SEGMENTS: Segments(cut, record)}

    return tell
