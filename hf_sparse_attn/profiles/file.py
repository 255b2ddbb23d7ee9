"""The files of a HeadProfile: in folders and on the Hub, written whole, read as what a stranger may have written."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.card import card
from hf_sparse_attn.profiles.measurements import Measurements
from hf_sparse_attn.profiles.step_plan import MOST_METHODS, MOST_PLANS, StepPlan
from hf_sparse_attn.registry import METHODS, make_method
from hf_sparse_attn.sharing.files import make_folder, replace_file, write_text
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.hub import local_folder, pushing, told
from hf_sparse_attn.sharing.strict_json import (
    as_dict,
    as_list,
    as_pair,
    as_text,
    check_keys,
    decode,
    encode,
    finite,
    read_document,
    shortened,
)

if TYPE_CHECKING:
    from hf_sparse_attn.profiles.head_profile import HeadProfile

FORMAT = "hf_sparse_attn.head_profile"
VERSION = 1
FILE, MEASUREMENTS, CARD = "head_profile.json", "measurements.safetensors", "README.md"
# A profile of 80 layers of 64 heads and 50 step ranges has 12 MiB.
_LARGEST_FILE = 32 << 20
# Of an evaluation.
_MOST_ROWS = 256
_KEYS = (
    "format", "version", "model", "methods", "plans", "figures", "metric", "budget", "calibration", "pareto",
    "same_in_group", "versions",
)  # fmt: skip
MODEL_KEYS = tuple(Fingerprint.__dataclass_fields__)


def load(kind: type[HeadProfile], source: str | os.PathLike[str], measurements: bool = True) -> HeadProfile:
    """See HeadProfile.from_pretrained; `kind` is the class to make."""
    path = local_folder(source)
    if path is None:
        file, beside = _download(os.fspath(source), measurements)
    else:
        file, beside = path / FILE, path / MEASUREMENTS
        if not file.is_file():
            raise FileNotFoundError(f"`source` must be a folder that holds {FILE}, got {path}")
    return read(kind, file, beside if measurements and beside.is_file() else None)


def _download(repo_id: str, measurements: bool) -> tuple[Path, Path]:
    """Where the files of a profile lie once they are here; the second may not exist."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    with told(f"`source` must be a profile on the Hub that can be reached, got {repo_id!r}"):
        file = Path(huggingface_hub.hf_hub_download(repo_id, FILE))
    beside = file.with_name(MEASUREMENTS)
    if measurements:
        # Most profiles come without; one that is cached without is read without when there is no network.
        with suppress(EntryNotFoundError):
            beside = Path(huggingface_hub.hf_hub_download(repo_id, MEASUREMENTS))
    return file, beside


def push(
    profile: HeadProfile, repo_id: str, private: bool | None, token: str | bool | None, kwargs: dict[str, Any]
) -> str:
    """See HeadProfile.push_to_hub."""
    options = {"commit_message": "Upload head profile", **kwargs}
    with TemporaryDirectory() as folder:
        write(profile, Path(folder), repo_id)
        with pushing(repo_id, private, token) as api:
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="model", **options))


def write(profile: HeadProfile, folder: Path, repo_id: str | None = None) -> None:
    """Writes the files of a profile, the profile itself last; see `card` for `repo_id`."""
    make_folder(folder, "directory")
    text, shown = to_json(profile), card(profile, repo_id)
    if profile.measurements is not None:
        replace_file(folder / MEASUREMENTS, profile.measurements.save)
    else:
        # What an earlier profile left here would pass for this one's.
        (folder / MEASUREMENTS).unlink(missing_ok=True)
    write_text(folder / CARD, shown)
    write_text(folder / FILE, text)


def read(kind: type[HeadProfile], file: Path, measurements: Path | None = None) -> HeadProfile:
    """The profile in a file, and its measurements in another; `kind` is the class to make.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    size = file.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(f"`source` must hold a profile of at most {_LARGEST_FILE} bytes, got {size} in {file}")
    try:
        # The profile first: it says where methods are from that are not known here.
        made = from_json(kind, file.read_bytes().decode("utf-8"))
        return made if measurements is None else replace(made, measurements=Measurements.load(measurements))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`source` must hold a valid head profile, got {file}: {error}") from error


def to_json(profile: HeadProfile) -> str:
    """The text of `head_profile.json`: figures of four digits, one line per layer."""
    figures = {
        name: [[[_rounded(x) for x in heads] for heads in layers] for layers in values.tolist()]
        for name, values in profile.figures.items()
    }
    plans = [
        {"steps": list(plan.steps), "choice": [" ".join(map(str, heads)) for heads in plan.choice.tolist()]}
        for plan in profile.plans
    ]
    value = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(profile.model),
        "methods": [_method_to_json(m) for m in profile.methods],
        "plans": plans,
        "figures": figures,
        "metric": profile.metric,
        "budget": dict(profile.budget),
        "calibration": {k: list(v) if isinstance(v, tuple) else v for k, v in profile.calibration.items()},
        "pareto": [[_rounded(a), _rounded(b)] for a, b in profile.pareto],
        "same_in_group": profile.same_in_group,
        "versions": dict(profile.versions),
    }  # fmt: skip
    if profile.evaluation:
        value["evaluation"] = [
            {k: _rounded(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in profile.evaluation
        ]
    return _lines(value) + "\n"


def _method_to_json(method: Method) -> dict[str, Any]:
    made: dict[str, Any] = {"method": method.name, "params": {k: encode(k, v) for k, v in method.params().items()}}
    module = type(method).__module__
    # Of a method that does not come with this package, where it is from: whoever reads the file is told.
    return made if module.split(".")[0] == "hf_sparse_attn" else made | {"module": module}


def _rounded(x: float, digits: int = 4) -> float | None:
    return None if math.isnan(x) else float(f"{x:.{digits}g}")


def _lines(value: Any, indent: str = "") -> str:
    """JSON with lists of numbers on one line."""
    deeper = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{deeper}{json.dumps(k)}: {_lines(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, (list, dict, str)) for v in value):
        return "[\n" + ",\n".join(deeper + _lines(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def from_json(kind: type[HeadProfile], text: str) -> HeadProfile:
    """The profile in a text; `kind` is the class to make.

    Raises:
        ValueError, TypeError: the text is no valid profile; the message names the part, the rule and the value.
    """
    value = read_document(text, "profile", FORMAT, VERSION, _KEYS, optional=("evaluation",))
    check_keys("model", value["model"], MODEL_KEYS)
    for key, part in value["model"].items():
        if not isinstance(part, (str, int)) or (isinstance(part, str) and len(part) > 200):
            raise ValueError(f"`model.{key}` must be a number or a short text, got {shortened(part)}")
    model = Fingerprint(**value["model"])
    methods = tuple(_method(i, m) for i, m in enumerate(as_list("methods", value["methods"], MOST_METHODS)))
    plans = tuple(_plan(i, p, model) for i, p in enumerate(as_list("plans", value["plans"], MOST_PLANS)))
    shape = (len(plans), model.layers, model.heads)
    return kind(
        model=model,
        methods=methods,
        plans=plans,
        figures={k: _figure(k, v, shape) for k, v in as_dict("figures", value["figures"]).items()},
        metric=as_text("metric", value["metric"]),
        budget=as_dict("budget", value["budget"]),
        calibration=as_dict("calibration", value["calibration"]),
        pareto=tuple(as_pair("pareto", p) for p in as_list("pareto", value["pareto"], 4096)),
        same_in_group=value["same_in_group"],
        versions=as_dict("versions", value["versions"]),
        evaluation=tuple(as_list("evaluation", value.get("evaluation", []), _MOST_ROWS)),
    )


def _method(index: int, value: Any) -> Method:
    name = f"methods[{index}]"
    # The module is never imported from here: a file may be anybody's.
    module = as_dict(name, value).get("module")
    check_keys(name, {k: v for k, v in value.items() if k != "module"}, ("method", "params"))
    if module is not None and not re.fullmatch(r"[A-Za-z_][\w.]{0,199}", as_text(f"{name}.module", module)):
        raise ValueError(f"`{name}.module` must be the name of a module, got {shortened(module)}")
    known = as_text(f"{name}.method", value["method"])
    params = {k: decode(f"{name}.{k}", v) for k, v in as_dict(f"{name}.params", value["params"]).items()}
    try:
        METHODS.get(known, module)
        made = make_method(known, params)
        hash(made)
    # The checks of a method were written for its users, who do not try them with just anything.
    except Exception as error:
        raise ValueError(
            f"`{name}` must be a method with its parameters, got {shortened(value)}: {str(error)[:500]}"
        ) from error
    return made


def _plan(index: int, value: Any, model: Fingerprint) -> StepPlan:
    name = f"plans[{index}]"
    check_keys(name, value, ("steps", "choice"))
    rows = as_list(f"{name}.choice", value["choice"], model.layers)
    choice = np.full((len(rows), model.heads), -1, np.int16)
    for layer, row in enumerate(rows):
        words = as_text(f"{name}.choice[{layer}]", row).split(" ")
        if len(words) != model.heads or not all(re.fullmatch("[0-9]{1,4}", w) for w in words):
            raise ValueError(
                f"`{name}.choice[{layer}]` must be {model.heads} numbers of methods, got {shortened(row)}"
            )
        choice[layer] = [int(w) for w in words]
    return StepPlan(as_pair(f"{name}.steps", value["steps"]), choice)


def _figure(name: str, value: Any, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """An array of numbers, null where one is not known; made only when every list has the right length."""

    def rows(found: Any, sizes: tuple[int, ...]) -> list[Any]:
        entries = as_list(f"figures.{name}", found, sizes[0])
        if len(entries) != sizes[0]:
            raise ValueError(f"`figures.{shortened(name)}` must be {list(shape)}, got a list of {len(entries)}")
        if len(sizes) > 1:
            return [rows(entry, sizes[1:]) for entry in entries]
        return [math.nan if x is None else finite(f"figures.{name}", x) for x in entries]

    values = np.array(rows(value, shape), np.float64)
    if (np.abs(values) > np.finfo(np.float32).max).any():
        raise ValueError(f"`figures.{shortened(name)}` must fit in float32, got {np.nanmax(np.abs(values))}")
    return values.astype(np.float32)
