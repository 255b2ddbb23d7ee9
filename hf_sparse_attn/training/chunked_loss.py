"""Next-token loss of long texts without the logits of all positions in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse_attn.context import check_int
from hf_sparse_attn.patching import changed

# Numbers in the logits of one chunk where the caller does not say how many positions it takes.
_CHUNK_NUMBERS = 1 << 26


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, weights: Tensor, logits: Callable[[Tensor], Tensor], chunk: int
) -> Tensor:
    """Weighted sum of cross-entropies, computed over chunks of positions and again for the gradient.

    Value and gradients are those of the loss over all logits, up to the order of a sum. Memory is that of the logits
    of one chunk, forward and backward. Positions of weight 0 are left out.

    Args:
        hidden: last hidden states, [batch, positions, width].
        targets: the token that is right after each, int64 [batch, positions].
        weights: of each position, [batch, positions].
        logits: makes [1, n, vocabulary] of hidden states [1, n, width], each position on its own.
        chunk: positions at a time.

    Returns:
        a scalar in nats, of at least float32.

    Raises:
        ValueError: shapes that do not fit, or a chunk of less than one position.
    """
    check_int("chunk", chunk, 1)
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2] or weights.shape != hidden.shape[:2]:
        raise ValueError(
            "`targets` and `weights` must be [batch, positions] of `hidden`, "
            f"got {list(targets.shape)} and {list(weights.shape)} for {list(hidden.shape)}"
        )
    rows, truth, shares = hidden.flatten(0, 1), targets.flatten(), weights.flatten()
    if not bool(shares.all()):
        used = shares.nonzero()[:, 0]
        rows, truth, shares = rows[used], truth[used], shares[used]
    if not len(rows):
        return hidden.sum() * 0.0

    def part(states: Tensor, right: Tensor, share: Tensor) -> Tensor:
        found = logits(states[None])[0]
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        losses = nn.functional.cross_entropy(found, right, reduction="none")
        return (losses * share).sum()

    return in_chunks(part, chunk, rows, truth, shares)


def in_chunks(function: Callable[..., Tensor], size: int, *given: Tensor) -> Tensor:
    """Sum of what a function gives for chunks of its arguments, each computed again in the backward pass.

    Args:
        function: takes parts of `given`, returns a scalar.
        size: rows of a part.
        given: tensors with the same number of rows, at least one.
    """
    parts = zip(*(x.split(size) for x in given), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([function(*part) for part in parts]).sum()
    return torch.stack([checkpoint(function, *part, use_reentrant=False) for part in parts]).sum()


class CausalParts:
    """A causal language model of transformers as two functions: ids to hidden states, and those to logits.

    The second is the model's own forward with given hidden states in place of its decoder. So whatever a model does to
    its logits (a factor, a soft cap) is done.

    Args:
        model: a causal language model of transformers.

    Raises:
        ValueError: the model has no decoder under its base model's name.
    """

    def __init__(self, model: Any) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        if not prefix or not isinstance(model._modules.get(prefix), nn.Module):
            raise ValueError(
                f"`model` must be a causal language model with a decoder of its own, got a {type(model).__name__}"
            )
        self.model, self.prefix = model, prefix
        self._kind: Any = None

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [batch, tokens, width] of token ids [batch, tokens]."""
        found = getattr(self.model, self.prefix)(input_ids=ids, use_cache=False)
        self._kind = type(found)
        states: Tensor = found.last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [batch, positions, vocabulary] of some of the hidden states, [batch, positions, width]."""
        with self._given(hidden):
            found: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return found

    def loss(self, ids: Tensor, weights: Tensor, hidden: Tensor, chunk: int | None = None) -> Tensor:
        """Weighted sum of the next-token losses of samples, in nats; nothing predicts their first token.

        Args:
            ids, weights: of the samples, [batch, tokens].
            hidden: what the model makes of them, [batch, tokens, width].
            chunk: positions whose logits are in memory at once; None takes `positions`.
        """
        shifted = hidden[:, :-1], ids[:, 1:], weights[:, 1:]
        return chunked_cross_entropy(*shifted, self.logits, self.positions if chunk is None else chunk)

    @property
    def positions(self) -> int:
        """At how many positions logits are worked on at a time."""
        return max(1, _CHUNK_NUMBERS // int(self.model.config.get_text_config().vocab_size))

    def _given(self, hidden: Tensor) -> AbstractContextManager[None]:
        """The model with hidden states in place of its decoder."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        given = _Given((self._kind or BaseModelOutputWithPast)(last_hidden_state=hidden))
        return changed([self.model], self.prefix, given)


class _Given(nn.Module):
    """A module that returns what it was made with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
