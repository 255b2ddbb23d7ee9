"""The loss over chunks of positions: value and gradients of the whole one, in the memory of a chunk."""

import pytest
import torch
from torch import nn

from hf_sparse_attn.training.chunked_loss import CausalParts, chunked_cross_entropy
from tests.support.tiny_lm import FAMILIES, VOCAB, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

# The heads of these do more to their logits than a matrix product: Cohere scales them, Gemma 2 caps them.
MODELS = ["llama", "qwen3", "gemma2"]


def _given(batch=2, positions=63, width=16, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, positions, width, dtype=dtype, generator=draw, requires_grad=True)
    head = nn.Linear(width, VOCAB, dtype=dtype)
    nn.init.normal_(head.weight, generator=draw)
    targets = torch.randint(VOCAB, (batch, positions), generator=draw)
    weights = torch.rand(batch, positions, dtype=dtype, generator=draw)
    return hidden, head, targets, weights


def _whole(hidden, head, targets, weights):
    losses = nn.functional.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


@pytest.mark.parametrize("chunk", [1, 10, 63, 126, 1000])
@pytest.mark.parametrize("zeros", [False, True], ids=["all_weigh", "some_weigh_nothing"])
def test_value_and_gradients_of_the_whole_loss(chunk, zeros):
    hidden, head, targets, weights = _given()
    if zeros:
        weights[:, ::3] = 0
    leaves = [hidden, head.weight, head.bias]
    wanted = _whole(hidden, head, targets, weights)
    found = chunked_cross_entropy(hidden, targets, weights, head, chunk)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_more_logits_at_once_than_a_chunk_has_and_none_where_nothing_weighs():
    hidden, head, targets, weights = _given()
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    weights[0] = 0
    chunked_cross_entropy(hidden, targets, weights, head, 10).backward()
    # 63 positions once forward and once more backward.
    assert max(seen) == 10 and sum(seen) == 2 * 63


def test_saved_tensors_hold_no_logits():
    hidden, head, targets, weights = _given()
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(hidden, targets, weights, head, 10)
    assert all(VOCAB not in shape for shape in kept)


def test_nothing_weighs():
    hidden, head, targets, weights = _given()
    loss = chunked_cross_entropy(hidden, targets, weights * 0, head, 10)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_low_precision_is_summed_in_float32():
    hidden, head, targets, weights = _given(dtype=torch.float32)
    low = hidden.detach().bfloat16()
    found = chunked_cross_entropy(low, targets, weights, head.bfloat16(), 20)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _whole(low, lambda x: head(x).float(), targets, weights))


def test_without_gradients_it_computes_once():
    hidden, head, targets, weights = _given()
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, targets, weights, head, 10)
    assert not found.requires_grad
    torch.testing.assert_close(found, _whole(hidden, head, targets, weights).detach())


def test_refused():
    hidden, head, targets, weights = _given()
    with pytest.raises(ValueError, match="`chunk` must be"):
        chunked_cross_entropy(hidden, targets, weights, head, 0)
    with pytest.raises(ValueError, match="`targets` and `weights` must be"):
        chunked_cross_entropy(hidden, targets[:, 1:], weights, head, 10)
    with pytest.raises(ValueError, match="`targets` and `weights` must be"):
        chunked_cross_entropy(hidden, targets, weights[:1], head, 10)
    with pytest.raises(ValueError, match="a decoder of its own, got a Linear"):
        CausalParts(head)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_a_model_are_the_model(name):
    model = FAMILIES[name]("eager" if name == "gemma2" else "sdpa")
    ids, parts = tokens(2, 63), CausalParts(model)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert torch.equal(parts.logits(parts.hidden(ids)), whole)
        torch.testing.assert_close(parts.logits(parts.hidden(ids)[:, 5:9]), whole[:, 5:9])
        assert torch.equal(model(ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("scale", [1.0, 0.0625], ids=["plain", "scaled"])
def test_gradients_of_a_model_by_parts(scale):
    import transformers

    config = transformers.CohereConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=scale,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(config).double()
    ids, weights, parts = tokens(2, 40), torch.rand(2, 39, dtype=torch.float64), CausalParts(model)
    leaves = list(model.parameters())
    logits = model(ids, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = torch.autograd.grad((losses * weights.flatten()).sum(), leaves)
    loss = chunked_cross_entropy(parts.hidden(ids)[:, :-1], ids[:, 1:], weights, parts.logits, 17)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_failing_head_leaves_the_decoder_in_place():
    model = FAMILIES["llama"]("sdpa")
    decoder, parts = model.model, CausalParts(model)
    with pytest.raises(RuntimeError):
        parts.logits(torch.zeros(1, 3, 5))
    assert model.model is decoder
    assert parts.positions == 2**26 // VOCAB
