"""Decoder: how the few queries of a call run where text is generated, as `decode=` of patch() asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hf_sparse_attn.decoding_method import DecodingMethod
from hf_sparse_attn.method import Method
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.registry import METHODS

# Decodes for the methods that choose for prompts alone, where sparse decoding is asked for.
_USUAL = "quest"


@dataclass(frozen=True)
class Decoder:
    """How queries run that are fewer than Policy.min_queries and have all their keys before them.

    Args:
        kind: "dense", the model's own attention to the bit; "exact", all keys on the fastest exact path; or "sparse".
        method: chooses the keys where it is sparse.
    """

    kind: Literal["dense", "exact", "sparse"]
    method: Method | None = None

    def __str__(self) -> str:
        if self.method is None:
            return self.kind
        params = ", ".join(f"{name}={value}" for name, value in self.method.params().items())
        return f"{self.method.name}({params})"


OWN, EXACT = Decoder("dense"), Decoder("exact")
_KINDS = {"dense": OWN, "exact": EXACT}


def usual_decoder(method: Method) -> Decoder:
    """The decoder of a method where nobody asks for another one."""
    if method.name == "dense":
        return OWN
    return Decoder("sparse", method) if isinstance(method, DecodingMethod) else EXACT


def prompt_reader(method: Method) -> Method:
    """What reads prompts where a method is asked for: itself, or `exact` where it does nothing but decode."""
    if method.reads_prompts or not isinstance(method, DecodingMethod) or "exact" not in METHODS:
        return method
    return METHODS.get("exact")()


def find_decoder(method: Method, decode: str | Method | None, make: Callable[[str], Method]) -> Decoder:
    """The decoder that is asked for.

    Args:
        method: of the patch.
        decode: "exact", "sparse", "dense", the name of a method that decodes, or one; None means the usual one.
        make: makes a method of its name.

    Raises:
        ValueError: an unknown name, a method that does not decode, or "sparse" where none does.
        TypeError: none of these.
    """
    if decode is None:
        return usual_decoder(method)
    if isinstance(decode, Method):
        if decode.name in _KINDS:
            return _KINDS[decode.name]
        if not decode.decodes:
            raise ValueError(f"`decode` must be a method that decodes ({_listed()}), got {decode!r}")
        return Decoder("sparse", decode)
    if not isinstance(decode, str):
        raise TypeError(f"`decode` must be a name or a Method, got {decode!r} of type {type(decode).__name__}")
    if decode in _KINDS:
        return _KINDS[decode]
    if method.decodes and decode in ("sparse", method.name):
        return Decoder("sparse", method)
    if decode == "sparse":
        if _USUAL not in METHODS:
            raise ValueError(f'`decode` must not be "sparse" with method {method.name!r}, which does not decode')
        return Decoder("sparse", make(_USUAL))
    if decode in METHODS and not METHODS.get(decode).decodes:
        raise ValueError(f"`decode` must be a method that decodes ({_listed()}), got {decode!r}, which reads prompts")
    names = ["exact", "sparse", "dense", *_names()]
    if decode not in names:
        raise ValueError(f"`decode` must be one of {', '.join(names)}; got {decode!r}{nearest(decode, names)}")
    return Decoder("sparse", make(decode))


def _names() -> list[str]:
    return [name for name, kind in METHODS.items() if kind.decodes and name not in _KINDS]


def _listed() -> str:
    return ", ".join(_names()) or "none is installed"
