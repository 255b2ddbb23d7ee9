"""What the tokens of an attention call are (TokenLayout) and where in the model and the run the call is (Context)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch


def check_int(name: str, value: object, minimum: int) -> int:
    """Returns `value` if it is an int of at least `minimum`, else raises with the argument, the rule and the value."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")
    return value


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one modality.

    Args:
        kind: "text" or "video" (an image is a video of one frame).
        length: number of tokens.
        grid: (frames, height, width) in tokens, for video; tokens are in raster order, frame by frame.
        clip: number of the image or video these frames belong to, from 0; None where nothing counts them. Segments of
            one clip are its frames in order, with text (timestamps) between them.
        frame: number, within the clip, of the first frame of the segment.
    """

    kind: Literal["text", "video"]
    length: int
    grid: tuple[int, int, int] | None = None
    clip: int | None = None
    frame: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("text", "video"):
            raise ValueError(f"`kind` must be 'text' or 'video', got {self.kind!r}")
        check_int("length", self.length, 0)
        if self.kind == "video":
            if self.grid is None or len(self.grid) != 3:
                raise ValueError(f"`grid` of a video segment must be (frames, height, width), got {self.grid!r}")
            frames, height, width = (
                check_int(n, s, 1) for n, s in zip(("frames", "height", "width"), self.grid, strict=True)
            )
            if frames * height * width != self.length:
                raise ValueError(
                    f"`length` must be frames * height * width = {frames * height * width}, got {self.length}"
                )
            check_int("frame", self.frame, 0)
            if self.clip is not None:
                check_int("clip", self.clip, 0)
        elif self.grid is not None:
            raise ValueError(f"`grid` must be None for a text segment, got {self.grid!r}")
        elif self.clip is not None or self.frame:
            raise ValueError(f"`clip` and `frame` must be left out for text, got {self.clip!r} and {self.frame!r}")


@dataclass(frozen=True)
class TokenLayout:
    """What each key is, and which of the keys are also queries. Hashable: static patterns are cached by it.

    Args:
        parts: the segments of the keys, in order.
        causal: whether query i sees only keys up to its own position.
        query_start: position of the first query among the keys; more than 0 when earlier tokens come from a cache.
    """

    parts: tuple[Segment, ...]
    is_causal: bool
    query_start: int = 0

    def __post_init__(self) -> None:
        check_int("query_start", self.query_start, 0)
        if self.query_start > self.kv_len:
            raise ValueError(f"`query_start` must be at most the number of keys {self.kv_len}, got {self.query_start}")

    @classmethod
    def causal(cls, n: int) -> TokenLayout:
        """Text of `n` tokens, each seeing itself and what came before."""
        return cls((Segment("text", check_int("n", n, 1)),), is_causal=True)

    @classmethod
    def bidirectional(cls, n: int) -> TokenLayout:
        """Text of `n` tokens, each seeing all."""
        return cls((Segment("text", check_int("n", n, 1)),), is_causal=False)

    @classmethod
    def video(cls, frames: int, height: int, width: int, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        """Video of `frames` x `height` x `width` tokens in raster order, text tokens before or after; all see all."""
        for name, size in (("frames", frames), ("height", height), ("width", width)):
            check_int(name, size, 1)
        parts = [Segment("video", frames * height * width, (frames, height, width))]
        if check_int("text_before", text_before, 0):
            parts.insert(0, Segment("text", text_before))
        if check_int("text_after", text_after, 0):
            parts.append(Segment("text", text_after))
        return cls(tuple(parts), is_causal=False)

    @classmethod
    def segments(cls, parts: Sequence[Segment], causal: bool) -> TokenLayout:
        """Any mix of text and video segments."""
        parts = tuple(parts)
        if not parts or not all(isinstance(p, Segment) for p in parts):
            raise TypeError(f"`parts` must be a non-empty sequence of Segment, got {parts!r}")
        return cls(parts, is_causal=bool(causal))

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return sum(p.length for p in self.parts)

    @property
    def q_len(self) -> int:
        """Number of queries: the last `q_len` keys are the queries."""
        return self.kv_len - self.query_start

    @property
    def density_count(self) -> Literal["causal", "full"]:
        """How densities of patterns over these tokens are counted; see BlockPattern.density."""
        return "causal" if self.is_causal else "full"

    @property
    def video_part(self) -> tuple[int, Segment] | None:
        """(start, segment) of the only video segment, or None when there is none or more than one."""
        found, start = [], 0
        for part in self.parts:
            if part.kind == "video":
                found.append((start, part))
            start += part.length
        return found[0] if len(found) == 1 else None

    def continued(self, query_start: int) -> TokenLayout:
        """The same keys with only those from `query_start` on as queries (chunked prefill, decoding)."""
        return replace(self, query_start=query_start)

    def cut(self, start: int, stop: int) -> TokenLayout | None:
        """The keys from `start` to `stop`, all of them queries; None where that cuts through a video segment."""
        kept, place = [], 0
        for part in self.parts:
            length = min(stop, place + part.length) - max(start, place)
            place += part.length
            if length == part.length:
                kept.append(part)
            elif length > 0 and part.kind == "text":
                kept.append(Segment("text", length))
            elif length > 0:
                return None
        return TokenLayout(tuple(kept), self.is_causal)

    def coordinates(self) -> torch.Tensor:
        """Where every key is: int64 [keys, 4] with its clip, frame in the clip, row and column; -1 for text.

        Segments without a clip number count as clips of their own, numbered after the others.
        """
        known = [p.clip for p in self.parts if p.clip is not None]
        spare, columns = max(known, default=-1) + 1, []
        for part in self.parts:
            if part.grid is None:
                columns.append(torch.full((4, part.length), -1))
                continue
            clip, spare = (spare, spare + 1) if part.clip is None else (part.clip, spare)
            axes = [torch.tensor([clip]), *(torch.arange(n) for n in part.grid)]
            axes[1] = axes[1] + part.frame
            columns.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
        return torch.cat(columns, 1).T

    def __str__(self) -> str:
        named = ["x".join(map(str, p.grid)) if p.grid else f"{p.length} text" for p in self.parts]
        # A video with text between its frames has hundreds of segments, and this is part of reasons that are counted.
        if len(named) > 7:
            named = [*named[:3], f"{len(named) - 4} more", named[-1]]
        parts = " + ".join(named)
        start = f", queries from {self.query_start}" if self.query_start else ""
        return f"{'causal' if self.is_causal else 'bidirectional'} {parts}{start}"


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What a layer had besides q, k and v, for methods that read it (`Method.reads`); what is not read is None.

    Args:
        hidden: [batch, tokens, width], what the layer's projections read.
        q, k: [batch, heads, tokens, dim] and [batch, kv_heads, tokens, dim] before positions were put into them.
    """

    hidden: torch.Tensor | None = None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Where an attention call is: which tokens, which layer, which denoising step.

    Args:
        layout: the tokens of the call.
        layer: index of the layer, 0 <= layer < num_layers.
        num_layers: number of layers of the model.
        step: index of the denoising step, 0 <= step < num_steps; 0 for language models.
        num_steps: number of denoising steps of the run.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: size of a query and key vector.
        scale: factor on the logits; None means head_dim ** -0.5.
        softcap: the scaled logits x become softcap * tanh(x / softcap) (Gemma 2); 0 leaves them.
        branch: name of the guidance branch ("cond", "uncond"), or None.
        inputs: what else the layer had, where the method asks for it; no part of what makes two contexts equal.
    """

    layout: TokenLayout
    layer: int = 0
    num_layers: int = 1
    step: int = 0
    num_steps: int = 1
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64
    scale: float | None = None
    softcap: float = 0.0
    branch: str | None = None
    inputs: LayerInputs | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layout, TokenLayout):
            raise TypeError(f"`layout` must be a TokenLayout, got {type(self.layout).__name__}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"`num_kv_heads` must divide `num_heads` = {self.num_heads}, got {self.num_kv_heads}")
        if not self.softcap >= 0:
            raise ValueError(f"`softcap` must be 0 or more, got {self.softcap}")

    @property
    def softmax_scale(self) -> float:
        """The factor on the logits."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @classmethod
    def for_tensors(cls, q: torch.Tensor, k: torch.Tensor, causal: bool | None = None) -> Context:
        """Context of a bare call: text tokens, causal when there are at least as many keys as queries.

        Args:
            q: [batch, heads, q_len, dim].
            k: [batch, kv_heads, kv_len, dim].
            causal: None means causal.
        """
        q_len, kv_len = q.shape[2], k.shape[2]
        if kv_len < q_len:
            raise ValueError(f"`k` must hold at least as many tokens as `q` ({q_len}), got {kv_len}; give a `ctx`")
        layout = TokenLayout.causal(kv_len) if causal in (None, True) else TokenLayout.bidirectional(kv_len)
        return cls(
            layout.continued(kv_len - q_len), num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[3]
        )
