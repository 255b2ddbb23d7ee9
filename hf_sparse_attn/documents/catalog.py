"""What the registries hold, as plain records and as the tables of the documents and of `hf-sparse-attn methods`."""

from __future__ import annotations

import ast
from dataclasses import MISSING, Field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_sparse_attn.method import Method
from hf_sparse_attn.presets import QUALITIES, family_defaults, presets_of
from hf_sparse_attn.registry import BACKENDS, FAMILIES, METHODS, Registry
from hf_sparse_attn.tables import Table

# Where the table of presets tells what is in force without one.
DEFAULT = "(none given)"
NOT_MEASURED = "no"


def methods(third_party: bool = True) -> list[dict[str, Any]]:
    """One record per method: name, summary, needs, static, trainable, parameters with defaults, paper.

    Args:
        third_party: also those that come from other packages, and so differ from machine to machine.
    """
    return [
        {
            "name": name,
            "summary": _summary(cls.__doc__),
            "needs": sorted(cls.needs),
            "static": cls.static,
            "trainable": cls.trainable,
            "parameters": {f.name: _default(f) for f in fields(cls)},
            "paper": cls.paper,
        }
        for name, cls in METHODS.items()
        if third_party or is_own(cls)
    ]


def families() -> list[dict[str, Any]]:
    """One record per model family of this package: name, the models, the layouts it can describe, summary."""
    known = [
        {
            "name": name,
            "models": family.models,
            "provides": sorted(family.provides),
            "summary": _summary(family.__doc__),
        }
        for name, family in FAMILIES.items()
        if is_own(family)
    ]
    return sorted(known + _unread(FAMILIES, {"models": "", "provides": []}), key=lambda r: str(r["name"]))


def backends() -> list[dict[str, Any]]:
    """One record per backend of this package, those that cannot be imported here included.

    Each has name, summary and `auto_rank` by device type (see backend.Backend).
    """
    known = [
        {"name": n, "summary": _summary(b.__doc__), "auto_rank": dict(b.auto_rank)}
        for n, b in BACKENDS.items()
        if is_own(b)
    ]
    return sorted(known + _unread(BACKENDS, {"auto_rank": {}}), key=lambda r: str(r["name"]))


def methods_table(third_party: bool = False) -> Table:
    """Columns and rows of the methods; see `methods`."""
    columns = ("method", "what it keeps", "needs", "pattern", "trainable", "parameters", "paper")
    rows = [
        (
            r["name"],
            r["summary"],
            ", ".join(r["needs"]) or "any layout",
            "static" if r["static"] else "dynamic",
            "yes" if r["trainable"] else "no",
            ", ".join(f"{name}={value}" for name, value in r["parameters"].items()) or "none",
            r["paper"],
        )
        for r in methods(third_party)
    ]
    return columns, rows


def methods_by_use() -> Table:
    """Columns and rows of what methods are for, with their names."""
    found: dict[str, list[str]] = {}
    for name, cls in METHODS.items():
        if is_own(cls):
            found.setdefault(_use(cls), []).append(name)
    return ("for", "methods"), [(use, ", ".join(found[use])) for use in _USES if use in found]


_USES = (
    "prompts and videos of any kind",
    "prompts of text",
    "videos",
    "text that is generated, a token at a time",
    "models that select their own keys",
)


def _use(method: type[Method]) -> str:
    """Which of _USES a method is for."""
    if "own selection" in method.needs:
        return _USES[4]
    if not method.reads_prompts:
        return _USES[3]
    return _USES[2] if "video grid" in method.needs else _USES[1] if "causal" in method.needs else _USES[0]


def families_table() -> Table:
    """Columns and rows of the model families."""
    columns = ("family", "models", "layouts")
    return columns, [(r["name"], r["models"], ", ".join(r["provides"])) for r in families()]


def backends_table() -> Table:
    """Columns and rows of the backends."""
    columns = ("backend", "what it does", 'taken by "auto" on')
    return columns, [
        (r["name"], r["summary"], ", ".join(r["auto_rank"]) or "nothing: by name only") for r in backends()
    ]


def presets_table() -> Table:
    """Columns and rows of the presets, and of what a family has without one where that is not the method's default.

    By family and method; families with the same values share their rows.
    """
    columns = ("family", "method", "quality", "models", "values", "source", "measured")
    found: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        for p in presets_of(name, family) if is_own(family) else ():
            values = [f"{key}={value}" for key, value in p.params.items()]
            values += [f"dense_layers={p.dense_layers}"] if p.dense_layers is not None else []
            values += [f"dense_steps={p.dense_steps:.3g}"] if p.dense_steps is not None else []
            measured = "; ".join(map(str, p.measured)) or NOT_MEASURED
            found.setdefault((p.method, p.quality, p.size, ", ".join(values), p.source, measured), []).append(name)
        for d in family_defaults().get(name, ()) if is_own(family) else ():
            said = ", ".join(f"{key}={value}" for key, value in d.params.items())
            found.setdefault((d.method, DEFAULT, d.size, said, d.source, NOT_MEASURED), []).append(name)
    rows = [(", ".join(names), *row) for row, names in found.items()]
    order = (*QUALITIES, DEFAULT)
    return columns, sorted(rows, key=lambda r: (r[0], r[1], r[3], order.index(r[2])))


def recipes() -> list[dict[str, Any]]:
    """One record per recipe file that comes with the package: recipe, summary, file; no code is imported for it."""
    from hf_sparse_attn.recipe import shipped_recipes

    return [{"recipe": n, "summary": _purpose(path), "file": str(path)} for n, path in shipped_recipes().items()]


def recipes_table() -> Table:
    """Columns and rows of the recipes."""
    return ("recipe", "what it does"), [(r["recipe"], r["summary"]) for r in recipes()]


def tables() -> dict[str, Table]:
    """All of them by name, as they stand in the documents."""
    return {
        "methods": methods_table(),
        "families": families_table(),
        "backends": backends_table(),
        "presets": presets_table(),
        "recipes": recipes_table(),
    }


def is_own(entry: object) -> bool:
    """Whether an entry of a registry comes with this package."""
    owner = entry if isinstance(entry, type) else type(entry)
    return owner.__module__.startswith("hf_sparse_attn.")


def _summary(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0].strip()


def recipe_of(path: Path) -> str:
    """The recipe that a file of settings is for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("recipe:")), path.stem)


def docstrings(registry: Registry[Any]) -> dict[str, str]:
    """The docstrings of this package's entries by name, those that cannot be imported here included."""
    known = {name: entry.__doc__ or "" for name, entry in registry.items() if is_own(entry)}
    unread = {name: ast.get_docstring(node) or "" for name, node in _unimported(registry)}
    return dict(sorted({**known, **unread}.items()))


def _purpose(path: Path) -> str:
    """What a recipe file is for: its comment in front, or else the first line of the module that it names."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("# For: "):
        return text.partition("\n")[0].removeprefix("# For: ")
    module = path.with_name(f"{recipe_of(path)}.py")
    return _summary(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))) if module.is_file() else ""


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return "required" if field.default_factory is MISSING else field.default_factory()


def _unread(registry: Registry[Any], constants: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of the files whose package is missing here, read from their text: tables must not depend on it.

    Args:
        registry: whose files.
        constants: class attributes to read, with what stands for one that is not a plain value.
    """
    return [
        {
            "name": name,
            "summary": _summary(ast.get_docstring(node)),
            **{n: _constant(node, n, other) for n, other in constants.items()},
        }
        for name, node in _unimported(registry)
    ]


def _unimported(registry: Registry[Any]) -> list[tuple[str, ast.ClassDef]]:
    """Names and classes in the files of a registry whose package is missing here."""
    registry.discover()
    found = []
    for file in registry.missing:
        spec = find_spec(f"{registry.package}.{file}")
        if spec is None or spec.origin is None:
            continue
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            found += [(name, node) for name in _registered(node) if isinstance(node, ast.ClassDef)]
    return found


def _registered(node: ast.stmt) -> list[str]:
    """Names under which the decorators of a class register it."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)] if isinstance(node, ast.ClassDef) else []
    return [
        str(call.args[0].value)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "register"
        and call.args
        and isinstance(call.args[0], ast.Constant)
    ]


def _constant(node: ast.ClassDef, name: str, other: Any) -> Any:
    """A class attribute from the text: a plain value, or a frozenset of plain values sorted."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == name:
            value = line.value.args[0] if isinstance(line.value, ast.Call) and line.value.args else line.value
            try:
                read = ast.literal_eval(value) if value is not None else other
            except ValueError:
                return other
            return sorted(read) if isinstance(read, set) else read
    return other
