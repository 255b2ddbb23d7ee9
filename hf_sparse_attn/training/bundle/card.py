"""The model card of a bundle, made from nothing but the bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hf_sparse_attn.sharing.card import front_matter, plain_value, section
from hf_sparse_attn.sharing.hub import is_hub_id
from hf_sparse_attn.training.bundle.file import Bundle
from hf_sparse_attn.training.lora.file import DIFFUSERS_WEIGHTS

_LONGEST = 200


def card(bundle: Bundle, repo_id: str | None = None) -> str:
    """README.md of a bundle: front matter, how to use it, what was trained and what was measured.

    Args:
        bundle: the bundle.
        repo_id: the repository that it goes to, for the examples; None for a folder.
    """
    where = json.dumps(repo_id or "this/folder")
    parts = [
        front_matter(_front(bundle)),
        f"# {_title(bundle)} for {plain_value(bundle.base_model) or plain_value(bundle.fingerprint.model_class)}\n",
        "## Use\n",
        "```python\nimport hf_sparse_attn as hsa\n\n"
        f"loaded = hsa.load_bundle(model, {where})\n...\nloaded.remove()  # the model as it was\n```\n",
        "A model of another class or configuration is refused, and the difference named.\n",
    ]
    if bundle.part:
        parts.append(f"In a pipeline it is put on `{plain_value(bundle.part)}` alone.\n")
    parts += _adapter(bundle, where)
    setting = ("setting", "value")
    parts += section("Sparse attention", setting, [] if bundle.sparse is None else _settings(bundle))
    parts += section("Scaled positions", setting, _rows(bundle.rope or {}))
    parts += section("Figures", ("figure", "value"), _rows(bundle.figures))
    parts += section("Model", ("field", "value"), _rows(vars(bundle.fingerprint)))
    parts += section("Recipe", setting, _rows(bundle.recipe))
    parts += section("Versions", ("library", "version"), _rows(bundle.versions))
    return "\n".join(parts)


def _front(bundle: Bundle) -> dict[str, Any]:
    tags = ["hf_sparse_attn", "sparse-attention"] + (["lora"] if bundle.has_adapter else [])
    front: dict[str, Any] = {"library_name": "peft" if bundle.has_adapter else "hf_sparse_attn", "tags": tags}
    if is_hub_id(bundle.base_model):
        front["base_model"] = bundle.base_model
        if bundle.has_adapter:
            front["base_model_relation"] = "adapter"
    return front


def _title(bundle: Bundle) -> str:
    names = (["LoRA adapter"] if bundle.has_adapter else []) + (["gates"] if bundle.has_gates else [])
    names += ["sparse attention"] if bundle.sparse is not None else []
    text = " and ".join(names)
    return text[0].upper() + text[1:]


def _adapter(bundle: Bundle, where: str) -> list[str]:
    if not bundle.has_adapter:
        return []
    lines = [f"model = PeftModel.from_pretrained(model, {where})  # peft"]
    if DIFFUSERS_WEIGHTS in bundle.files:
        named = f'weight_name="{DIFFUSERS_WEIGHTS}"'
        if (bundle.recipe.get("lora") or {}).get("trained"):
            # load_lora_weights takes low-rank matrices alone, and refuses the file for what was trained in full.
            whose = f"pipe.{bundle.part or 'transformer'}"
            lines.append(f'{whose}.load_lora_adapter({where}, prefix="transformer", {named})  # diffusers')
        else:
            part = ", load_into_transformer_2=True" if bundle.part == "transformer_2" else ""
            lines.append(f"pipe.load_lora_weights({where}, {named}{part})  # diffusers")
    else:
        lines.append(f"model.load_adapter({where})  # transformers")
    return ["The adapter alone, with the model's own attention:\n", "```python\n" + "\n".join(lines) + "\n```\n"]


def _settings(bundle: Bundle) -> list[tuple[str, str]]:
    found = dict(vars(bundle.sparse))
    if bundle.has_profile:
        found["method"] = "the head profile in `profile`"
    if bundle.has_gates:
        found["gates"] = "in `gates`"
    return _rows({name: value for name, value in found.items() if value not in (None, {})})


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _shown(value)) for name, value in _leaves(values)]


def _leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What is inside nested mappings, by names with dots."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
