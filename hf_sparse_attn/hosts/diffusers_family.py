"""What a family of diffusers says of its transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.hosts.diffusers_model import Place, Tokens
from hf_sparse_attn.hosts.padding import key_padding
from hf_sparse_attn.session import Session


class DiffusersFamily(ABC):
    """The base of families whose models are transformers of diffusers. It is used as it is, without an instance: what
    belongs to a patch, a forward or a layer at work is none of its business.
    """

    @staticmethod
    @abstractmethod
    def places(transformer: Any) -> Iterable[Place]:
        """The self-attention modules of a transformer, in the order they run."""

    @staticmethod
    @abstractmethod
    def tokens(transformer: Any, inputs: Mapping[str, Any]) -> Tokens:
        """What the tokens of a forward are, from its arguments by name."""

    @staticmethod
    def layer_inputs(inputs: Mapping[str, Any]) -> LayerInputs | None:
        """What a method that reads more than q, k and v is handed, from the arguments of an attention by name."""
        return None

    @staticmethod
    def text_keys(inputs: Mapping[str, Any]) -> int:
        """How many keys are the text alone, by which cross-attention under another name is told; 0 for no such."""
        return 0

    @staticmethod
    def blocks(transformer: nn.Module) -> Iterable[str]:
        """Paths of the modules whose inputs say which forward backward runs again, besides the rotary tables."""
        return ()

    @staticmethod
    def valid(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
        """Valid keys of each row, bool [batch, tokens], or None where the mask says more than that."""
        return key_padding(mask, batch, tokens)

    @staticmethod
    def dense_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
        """The mask that the model's own attention is given."""
        return mask

    @staticmethod
    def stand_in(processor: Any, backend: Any, session: Session) -> Any | None:
        """A processor that runs instead of `processor` and asks `backend` for attention; None where it can itself."""
        return None
