"""Quantised Linear layers around sparse attention, of torchao, bitsandbytes and GGUF: none knows of the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_sparse_attn as hsa
from tests.support import composed_text as text
from tests.support import composed_video as video
from tests.support.patched import WINDOWED, sparse_share
from tests.support.tiny_lm import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

# The methods of both modules, and what plays, checks and looks for traces in the models of each.
KINDS = {"llama": text, "qwen2_5_vl": text, "wan": video, "hunyuan_video": video}


def large(kind: str) -> Any:
    """As the tiny ones, with heads of 32 where a kernel for quantised weights wants multiples of that."""
    from tests.support import tiny_hunyuan, tiny_wan

    torch.manual_seed(0)
    if kind == "wan":
        return tiny_wan.transformer(attention_head_dim=32, ffn_dim=64)
    if kind == "hunyuan_video":
        return tiny_hunyuan.transformer(attention_head_dim=32, rope_axes_dim=(8, 12, 12))
    return FAMILIES["llama"]("sdpa", head_dim=32, intermediate_size=64) if kind == "llama" else text.fresh(kind)


def attention_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every projection of self-attention and of the MLPs."""
    parts = ("attn", "ffn", "ff.", "ff_context", "mlp")
    return [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
        and any(p in f"{path}.{name}." for p in parts)
        and ("block" in path or "layers" in path)
        and child.in_features % 32 == 0
        and child.out_features % 32 == 0
    ]


def replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    found = attention_layers(model)
    assert len(found) >= 8
    for parent, name, layer in found:
        setattr(parent, name, make(layer))


def torchao_int8(model: nn.Module) -> None:
    quantisation = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    chosen = {id(layer) for _, _, layer in attention_layers(model)}
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig(), filter_fn=lambda m, _: id(m) in chosen)


def _bitsandbytes(model: nn.Module, make: Callable[[Any, nn.Linear], nn.Module]) -> None:
    library = pytest.importorskip("bitsandbytes", exc_type=ImportError)

    def quantised(layer: nn.Linear) -> nn.Module:
        made = make(library, layer)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return made.to("cpu")

    replace(model, quantised)


def bitsandbytes_int8(model: nn.Module) -> None:
    def make(library: Any, layer: nn.Linear) -> nn.Module:
        made = library.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        made.weight = library.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False)
        return made

    _bitsandbytes(model, make)


def bitsandbytes_nf4(model: nn.Module) -> None:
    def make(library: Any, layer: nn.Linear) -> nn.Module:
        made = library.nn.LinearNF4(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        made.weight = library.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return made

    _bitsandbytes(model, make)


def gguf_q8(model: nn.Module) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(layer: nn.Linear) -> nn.Module:
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32)
        data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
        made.weight = GGUFParameter(data, requires_grad=False, quant_type=kind)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return made

    replace(model, make)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "quantise", [torchao_int8, bitsandbytes_int8, bitsandbytes_nf4, gguf_q8], ids=lambda f: f.__name__
)
def test_quantised_before_and_after_the_patch(quantise: Callable[[nn.Module], None], kind: str) -> None:
    tools = KINDS[kind]
    window = {**WINDOWED, "strict": True} if tools is text else video.WINDOW
    plain, before, after = (large(kind) for _ in range(3))
    exact = tools.play(plain, kind)
    for model in (plain, before):
        quantise(model)
    dense = tools.play(plain, kind)
    assert not torch.equal(dense, exact)
    with hsa.patch(before, "dense", min_tokens=0):
        assert torch.equal(tools.play(before, kind), dense)
    with hsa.patch(before, **window) as patch:
        sparse = tools.play(before, kind)
    assert sparse_share(patch.report().layers) == 1 and not torch.equal(sparse, dense)
    if tools is text:
        text.assert_full_budget(before, kind)
    else:
        video.assert_full_budget(before, lambda: video.play(before, kind))
    tools.assert_no_trace(before)
    assert torch.equal(tools.play(before, kind), dense)

    patch = hsa.patch(after, **window)
    quantise(after)
    assert torch.equal(tools.play(after, kind), sparse) and sparse_share(patch.report().layers) == 1
    patch.remove()
    tools.assert_no_trace(after)
    assert torch.equal(tools.play(after, kind), dense)


def _torchao_config(library: str) -> Any:
    quantisation = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    try:
        return pytest.importorskip(library).TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    except (ImportError, ValueError) as error:
        pytest.skip(f"{library} takes no torchao of this version: {error}")


def _bitsandbytes_config(library: str) -> Any:
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    return pytest.importorskip(library).BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize(
    ("kind", "config"),
    [("llama", _torchao_config), ("llama", _bitsandbytes_config), ("wan", _torchao_config)],
    ids=["llama-torchao", "llama-bitsandbytes", "wan-torchao"],
)
def test_loaded_quantised(kind: str, config: Callable[[str], Any], tmp_path: Any) -> None:
    """Through from_pretrained, with all that it puts around the model."""
    tools, model = KINDS[kind], large(kind)
    chosen = config("transformers" if tools is text else "diffusers")
    exact = tools.play(model, kind)
    model.save_pretrained(tmp_path)
    loaded = (
        type(model)
        .from_pretrained(tmp_path, quantization_config=chosen, device_map="cpu", torch_dtype=torch.float32)
        .eval()
    )
    dense = tools.play(loaded, kind)
    assert not torch.equal(dense, exact)
    with hsa.patch(loaded, "dense", min_tokens=0):
        assert torch.equal(tools.play(loaded, kind), dense)
    with hsa.patch(loaded, **WINDOWED, strict=True) as patch:
        assert not torch.equal(tools.play(loaded, kind), dense)
    assert sparse_share(patch.report().layers) == 1
    if tools is text:
        text.assert_full_budget(loaded, kind)
    else:
        video.assert_full_budget(loaded, lambda: video.play(loaded, kind))
    tools.assert_no_trace(loaded)
    assert torch.equal(tools.play(loaded, kind), dense)
