"""Starting weights that already hold a rough copying circuit.

A model of this size does not find copying by itself in the steps one processor can afford, so the weights start with
the circuit sketched in, and training sharpens it and learns everything else:

1. The residual stream is divided: the first `embedding_width` coordinates hold the current byte, and the rest are
   slots, slot `o` for the byte `o` positions back.
2. Layer 0 has one head per offset. Its query and key are the biases alone, which RoPE turns into a fixed function of
   the distance; with phases set to the offset times each frequency, that function peaks at the offset. Its value
   carries a random code of the byte, written to the offset's slot.
3. In the copying layers, the first key-value group compares the bytes up to here (query) with the bytes before there
   (key) by the same random projections, in the slow RoPE coordinates, where distance hardly turns anything. What it
   attends to is the byte that followed the same bytes earlier; its value carries that byte to the output.
4. The opening byte gets a key that the copying heads' query bias likes a little: with no match, they rest on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

_FIRST_BYTE = 0
_KERNEL_WEIGHTS = (1.0, 1.0, 1.0, 0.7, 0.5)


@dataclass(frozen=True)
class CircuitConfig:
    """How the copying circuit starts.

    Args:
        offsets: how many bytes back layer 0 looks, one head for each distance from 1.
        slot_width: residual coordinates for each of them.
        copy_layers: layers whose first key-value group starts as copying heads.
        kernel_peak: attention logit of an offset head at its offset.
        match_logit: attention logit for each equal byte in the copying heads.
        rest_logit: attention logit of the opening byte in the copying heads.
        copy_gain: how strongly the copied byte is written, relative to a byte's own embedding.
        noise: standard deviation of every weight the circuit does not set.
    """

    offsets: int
    slot_width: int
    copy_layers: tuple[int, ...]
    kernel_peak: float
    match_logit: float
    rest_logit: float
    copy_gain: float
    noise: float


def set_circuit(model: LlamaForCausalLM, circuit: CircuitConfig, seed: int) -> None:
    """Write the starting weights into `model`, in place.

    Args:
        model: a Llama with attention biases and separate output embeddings.
        circuit: how the circuit starts.
        seed: for every random projection.

    Raises:
        ValueError: the model has no attention biases, shares its embeddings, or is too narrow for the slots.
    """
    config: Any = model.config
    if not config.attention_bias or config.tie_word_embeddings:
        raise ValueError("`model` must have attention biases and untied embeddings for the copying circuit")
    width, head_dim = config.hidden_size, config.head_dim
    embedding_width = width - circuit.offsets * circuit.slot_width
    if embedding_width < head_dim or circuit.offsets > config.num_attention_heads:
        raise ValueError(
            f"`offsets` must leave at least {head_dim} of {width} coordinates and one head each, "
            f"got {circuit.offsets} of width {circuit.slot_width}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                parameter.normal_(0.0, circuit.noise, generator=generator)
        codes = _set_embeddings(model, embedding_width, generator)
        reader = _orthonormal(circuit.slot_width, embedding_width, generator)
        _set_offset_heads(model, circuit, reader)
        for layer in circuit.copy_layers:
            _set_copying_heads(model, circuit, layer, reader, codes, generator)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random matrix with orthonormal rows (columns, where there are fewer of them)."""
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis: Tensor = torch.linalg.qr(tall)[0]
    return basis if rows >= columns else basis.T


def _set_embeddings(model: LlamaForCausalLM, embedding_width: int, generator: torch.Generator) -> Tensor:
    """Give every byte a code of length 1 in the first coordinates, and an unrelated code of length 1 at the output."""
    table, output_table = model.model.embed_tokens.weight, model.lm_head.weight
    codes = torch.nn.functional.normalize(torch.randn(table.shape[0], embedding_width, generator=generator), dim=1)
    table[:, :embedding_width] = codes
    table[:, embedding_width:] = 0.0
    output = torch.randn(table.shape, generator=generator)
    output_table.copy_(output / output.norm(dim=1, keepdim=True))
    return codes


def _frequencies(model: LlamaForCausalLM) -> Tensor:
    config: Any = model.config
    half = config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    return torch.pow(torch.tensor(theta), -torch.arange(half, dtype=torch.float32) / half)


def _set_offset_heads(model: LlamaForCausalLM, circuit: CircuitConfig, reader: Tensor) -> None:
    config: Any = model.config
    attention: Any = model.model.layers[0].self_attn
    head_dim, half = config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    frequencies = _frequencies(model)
    weights = torch.zeros(half)
    weights[: len(_KERNEL_WEIGHTS)] = torch.tensor(_KERNEL_WEIGHTS)
    # The logit at the offset is the sum of the squared amplitudes over sqrt(head_dim).
    amplitude = (weights * circuit.kernel_peak * math.sqrt(head_dim) / weights.sum()).sqrt()
    # Normalised inputs have length sqrt(width), of which one byte's code is all there is before layer 0.
    scale = 1.0 / math.sqrt(config.hidden_size)
    embedding_width = reader.shape[1]
    for head in range(circuit.offsets):
        group, offset = head // groups, head + 1
        queries = slice(head * head_dim, (head + 1) * head_dim)
        keys = slice(group * head_dim, (group + 1) * head_dim)
        turn = frequencies * offset
        attention.q_proj.weight[queries] *= 0.1
        attention.k_proj.weight[keys] *= 0.1
        attention.q_proj.bias[queries] = torch.cat((amplitude * turn.cos(), -amplitude * turn.sin()))
        attention.k_proj.bias[keys] = torch.cat((amplitude, torch.zeros(half)))
        value = attention.v_proj.weight[keys]
        value.zero_()
        value[: circuit.slot_width, :embedding_width] = reader
        slot = embedding_width + head * circuit.slot_width
        written = attention.o_proj.weight[:, queries]
        written.zero_()
        # A random code keeps slot_width / embedding_width of a byte's squared length: give it back.
        gain = scale * math.sqrt(embedding_width / circuit.slot_width)
        written[slot : slot + circuit.slot_width, : circuit.slot_width] = gain * torch.eye(circuit.slot_width)


def _set_copying_heads(
    model: LlamaForCausalLM,
    circuit: CircuitConfig,
    layer: int,
    reader: Tensor,
    codes: Tensor,
    generator: torch.Generator,
) -> None:
    config: Any = model.config
    attention: Any = model.model.layers[layer].self_attn
    width, head_dim, half = config.hidden_size, config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    embedding_width = reader.shape[1]
    starts = [embedding_width + index * circuit.slot_width for index in range(circuit.offsets)]
    slots = [slice(start, start + circuit.slot_width) for start in starts]
    # The slowest half of the frequencies, both coordinates of each pair; the very slowest pair is kept for resting.
    slow = torch.tensor([c for c in range(head_dim) if half // 2 <= c % half < half - 1])
    rest = half - 1
    # One embedding and as many slots of length 1 share a normalised length of sqrt(width).
    unit = math.sqrt(width / (1 + circuit.offsets))
    strength = math.sqrt(circuit.match_logit * math.sqrt(head_dim)) / unit
    regain = math.sqrt(embedding_width / circuit.slot_width)
    keys = slice(0, head_dim)
    key_weight = attention.k_proj.weight[keys]
    key_weight.zero_()
    queries_weight = torch.zeros(head_dim, width)
    for back in range(circuit.offsets):
        mixing = _orthonormal(len(slow), circuit.slot_width, generator)
        # A code keeps its length on average, also where the slow coordinates are fewer than the slot's.
        mixing = mixing * max(1.0, math.sqrt(circuit.slot_width / len(slow)))
        key_weight[slow, slots[back]] = strength * mixing
        if back == 0:
            queries_weight[slow, :embedding_width] = strength * regain * mixing @ reader
        else:
            queries_weight[slow, slots[back - 1]] = strength * mixing
    rest_code = codes[_FIRST_BYTE]
    bias = math.sqrt(circuit.rest_logit * math.sqrt(head_dim))
    key_weight[rest, :embedding_width] = bias / unit * rest_code
    value = _orthonormal(head_dim, embedding_width, generator)
    attention.v_proj.weight[keys].zero_()
    attention.v_proj.weight[keys, :embedding_width] = value / unit
    # Least squares from the byte's code, as the value carries it, to its row at the output.
    target = model.lm_head.weight
    carried = codes @ value.T
    # In float64: what the library rounds differently from call to call is then lost in float32.
    solution = torch.linalg.lstsq(carried.double(), target.double()).solution.T.to(target.dtype)
    solution = solution / solution.norm() * math.sqrt(head_dim) * circuit.copy_gain / groups
    for head in range(groups):
        queries = slice(head * head_dim, (head + 1) * head_dim)
        # Heads of one group see the same keys: the noise already there keeps them from staying copies of each other.
        attention.q_proj.weight[queries] += queries_weight
        attention.q_proj.bias[queries][rest] = bias
        attention.o_proj.weight[:, queries] = solution * math.sqrt(embedding_width / head_dim)
