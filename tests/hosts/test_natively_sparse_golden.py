"""Indexers, latent attention and roles of layers, against what transformers and autograd gave once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from hf_sparse_attn.hosts import natively_sparse_index as index
from hf_sparse_attn.hosts import natively_sparse_latent as latent
from hf_sparse_attn.hosts.natively_sparse_mask import SelectingMask
from hf_sparse_attn.listed_attention import Visible
from tests.support import tiny_natively_sparse as tiny
from tests.support.golden import golden


def case(name: str) -> dict[str, Tensor]:
    found = golden("natively_sparse")
    return {
        key.removeprefix(f"{name}."): torch.from_numpy(np.asarray(value))
        for key, value in found.items()
        if key.startswith(f"{name}.")
    }


def light(pad: Tensor, queries: int) -> SelectingMask:
    """The mask of a padded batch as transformers describes it."""
    wanted = {
        "batch_size": len(pad), "q_length": queries, "kv_length": pad.shape[1], "q_offset": pad.shape[1] - queries,
        "kv_offset": 0, "attention_mask": pad, "allow_is_causal_skip": False, "device": torch.device("cpu"),
        "mask_function": transformers.masking_utils.causal_mask_function, "dtype": torch.float32,
    }  # fmt: skip
    return SelectingMask("sdpa", wanted)


CASES = {"dsa_half": "deepseek_v32", "dsa_inter": "glm_moe_dsa", "dsa_tail": "hy_v4"}


def indexer(name: str, data: dict[str, Tensor]) -> Any:
    """The model's own module with the weights of a case."""
    sizes = {"hidden_size": 32, "q_lora_rank": 16, "index_head_dim": 12, "index_topk": int(data["topk"])}
    model = tiny.build(CASES[name], num_hidden_layers=1, qk_rope_head_dim=8, **sizes)
    found = model.model.layers[0].self_attn.indexer
    names = {"wq_b": "wq_b.weight", "wk": "wk.weight", "weights_proj": "weights_proj.weight"}
    names |= {"k_norm_w": "k_norm.weight", "k_norm_b": "k_norm.bias"}
    found.load_state_dict({to: data[key] for key, to in names.items()})
    found.k_norm.eps = float(data["eps"])
    return found


@pytest.mark.parametrize("strip", [1 << 10, 1 << 23], ids=["short strips", "one strip"])
@pytest.mark.parametrize("mask", ["light", "ready"])
@pytest.mark.parametrize("name", [n for n, model in CASES.items() if model in tiny.NAMES])
def test_an_indexer_selects_what_transformers_selects(
    name: str, mask: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_SCORES", strip)
    data = case(name)
    batch, tokens, keys = data["selected_shape"].tolist()
    bits = np.unpackbits(data["selected"].numpy())[: batch * tokens * keys]
    wanted = torch.from_numpy(bits).bool().view(batch, tokens, keys)
    pad = data["pad"]
    described = light(pad, tokens)
    given = described if mask == "light" else described.dense("sdpa", torch.device("cpu"))[:, 0]
    cos, sin = (data[x].expand(batch, -1, -1) for x in ("cos", "sin"))
    lists = index.select(
        index.INDEXERS[CASES[name]], indexer(name, data), data["x"], data["q_resid"], (cos, sin), given, None
    )
    assert lists.dtype == torch.int32 and lists.shape == (batch, tokens, int(data["topk"]))
    chosen = torch.zeros(batch, tokens, keys + 1, dtype=torch.bool)
    chosen.scatter_(2, lists.long().where(lists >= 0, keys), True)
    valid = pad if pad.any() else ~pad
    assert torch.equal(chosen[..., :-1][valid], wanted[valid])


def attention(data: dict[str, Tensor]) -> Any:
    heads, nope, rank = data["q"].shape[1], int(data["nope"]), data["latent"].shape[2]
    rope = data["k_rot"].shape[2]
    value = data["kv_b"].shape[0] // heads - nope
    model = tiny.build(
        "deepseek_v32", num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads,
        qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, kv_lora_rank=rank,
    )  # fmt: skip
    module = model.model.layers[0].self_attn
    module.kv_b_proj.weight.data = data["kv_b"].clone()
    return module


@pytest.mark.skipif("deepseek_v32" not in tiny.NAMES, reason="not in this transformers")
@pytest.mark.parametrize("way", ["latents by list", "keys by list"])
@pytest.mark.parametrize("name", ["mla", "mla_sink"])
def test_latent_attention_and_its_gradients(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "_stays_compressed", lambda *_: way == "latents by list")
    data = {**case("mla"), **case(name)}
    module = attention(data)
    q, c, rotated = data["q"], data["latent"][:, None], data["k_rot"][:, None]
    sink = data["sink"] if name == "mla_sink" else None
    leaves = [x.requires_grad_() for x in (q, c, rotated, module.kv_b_proj.weight)]
    leaves += [] if sink is None else [sink.requires_grad_()]
    lists = Visible(0, data["pad"]).of(data["indices"])
    out, ran = latent.attend_latent(module, q, c, rotated, lists, float(data["scaling"]), sink)
    assert ran == way
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(out, data["out"], **close)
    grads = torch.autograd.grad((out * data["grad_out"]).sum(), leaves)
    for mine, key in zip(grads, ("grad_q", "grad_latent", "grad_k_rot", "grad_kv_b", "grad_sink"), strict=False):
        wanted = data[key][:, None] if key in ("grad_latent", "grad_k_rot") else data[key]
        torch.testing.assert_close(mine, wanted, **close)


ROLES: dict[str, tuple[str, dict[str, Any]]] = {
    "freq4": ("glm_moe_dsa", {"index_topk_freq": 4}),
    "freq2": ("glm_moe_dsa", {"index_topk_freq": 2}),
    "freq3_off1": ("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 1}),
    "hy_v4": ("hy_v4", {}),
}


@pytest.mark.parametrize("name", [n for n, (model, _) in ROLES.items() if model in tiny.NAMES])
def test_layers_that_take_over_a_selection(name: str) -> None:
    """Which layers select for themselves, and that the others are given the very same lists."""
    import hf_sparse_attn as hsa

    model_name, options = ROLES[name]
    full = case("roles")[name].tolist()
    options = {"index_skip_topk_offset": 2, **options} if model_name == "glm_moe_dsa" else options
    model = tiny.build(model_name, num_hidden_layers=len(full), **options)
    layers = [layer.self_attn for layer in model.model.layers]
    assert [module.indexer is not None for module in layers] == full
    given: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.append(kwargs["prev_topk_indices"])

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in layers]
    with torch.no_grad(), hsa.patch(model, "native") as patch:
        model(input_ids=tiny.ids(20))
        assert all(layer.sparse_calls == 1 for layer in patch.report().layers)
    for hook in hooks:
        hook.remove()
    for i, own in enumerate(full[1:-1], 1):
        if not own:
            assert given[i] is given[i + 1] and given[i].dtype == torch.int32
