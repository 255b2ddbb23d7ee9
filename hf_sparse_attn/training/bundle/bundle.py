"""Bundles: an adapter, sparse attention and what belongs to them in a folder; saved, shared, put on a model again."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from hf_sparse_attn.patching import Patch
from hf_sparse_attn.profiles.head_profile import HeadProfile, find_profile
from hf_sparse_attn.recipe import SparseSettings
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.hub import check_hub_id, is_hub_id, local_folder, pushing, told
from hf_sparse_attn.training.bundle.card import card
from hf_sparse_attn.training.bundle.file import (
    CARD,
    FILE,
    GATES,
    NAMES,
    PROFILE,
    Bundle,
    as_json,
    check_files,
    files_in,
    read,
    to_json,
    write,
)
from hf_sparse_attn.training.lora.adapter import Adapter, load_lora
from hf_sparse_attn.training.lora.file import DIFFUSERS_WEIGHTS

_log = logging.getLogger(__name__)
# The parts of a pipeline of diffusers that may have an adapter.
_PARTS = ("transformer", "transformer_2")


def save_bundle(
    folder: str | os.PathLike[str],
    *,
    model: Any,
    base_model: str,
    adapter: Adapter | None,
    sparse: SparseSettings | None,
    profile: HeadProfile | None = None,
    gates: Any = None,
    rope: dict[str, Any] | None = None,
    figures: dict[str, Any],
    recipe: dict[str, Any],
    part: str = "",
) -> None:
    """Writes what a training made into a folder, which then needs nothing but the base model.

    An earlier bundle in it is replaced; `bundle.json` comes last, so that a folder with half a bundle is none.

    Args:
        folder: where; it is made if need be.
        model: the model as it was trained, or the pipeline it is in; with the adapter, patched or not.
        base_model: folder or Hub id that the model came from.
        adapter: the LoRA adapter on it, or None.
        sparse: sparse attention to be used with it, or None. A profile or gates that it names are put in, too.
        profile: the method, in place of that of `sparse`.
        gates: a GateSet for the method's parameter `gates`, in place of that of `sparse`.
        rope: settings its positions were scaled with, as `scale_rope` takes them; None where they were not.
        figures: what was measured; numbers that are not finite become null.
        recipe: the settings it was trained with.
        part: the transformer of a pipeline that was trained, "transformer" or "transformer_2", where there are two;
            found out where `model` is the pipeline.

    Raises:
        ValueError: there is neither adapter nor sparse attention, or the parts do not fit the model.
        TypeError: a value that JSON cannot hold, or a model of no known family.
        OSError: it cannot be written.
    """
    if adapter is None and sparse is None and profile is None:
        raise ValueError("`adapter` or `sparse` must be given, got neither")
    if part not in ("", *_PARTS):
        raise ValueError(f"`part` must be one of {', '.join(_PARTS)}, or empty; got {part!r}")
    part = part or _part_of(model, adapter)
    sparse, profile, gates = _own_parts(sparse, profile, gates)
    print_of = Fingerprint.of(_host(model, part) if adapter is not None or part else model)
    for owner, whose in ((profile, "profile"), (gates, "gates")):
        different = [] if owner is None else owner.model.difference(print_of)
        if different:
            raise ValueError(f"`{whose}` must be for the model that is saved; {'; '.join(different)}")
    from hf_sparse_attn.profiling.run import library_versions

    made = Bundle(
        base_model=base_model,
        part=part,
        fingerprint=print_of,
        sparse=sparse,
        rope=rope,
        figures=as_json("figures", figures),
        recipe=as_json("recipe", recipe),
        versions={**library_versions(), **({} if adapter is None else {"peft": version("peft")})},
        files={},
    )
    # Raises here what it may raise, before there is anything in the folder.
    to_json(made)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name in (FILE, *NAMES):
        (path / name).unlink(missing_ok=True)
    for name in (PROFILE, GATES):
        # What is not of the bundle stays, and its folder.
        with suppress(OSError):
            (path / name).rmdir()
    if adapter is not None:
        adapter.save(path, base_model)
    if profile is not None:
        profile.save_pretrained(path / PROFILE)
    if gates is not None:
        gates.save(path / GATES)
    made = replace(made, files=files_in(path))
    (path / CARD).write_text(card(made), encoding="utf-8")
    write(made, path)


class LoadedBundle(AbstractContextManager["LoadedBundle"]):
    """A bundle on a model, made by `load_bundle`; `remove()` or the end of `with` takes all of it off.

    Attributes:
        adapter: the Adapter on the model, or None.
        patch: the Patch of its sparse attention, or None.
        base_model, figures, recipe: what the bundle tells of itself.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.base_model, self.figures, self.recipe = bundle.base_model, bundle.figures, bundle.recipe
        self.adapter: Adapter | None = None
        self.patch: Patch | None = None
        self._undo: list[Callable[[], object]] = []
        # What raises where something of it could not be put back.
        self._checks: list[Callable[[], object]] = []

    def remove(self) -> None:
        """Takes off patch, adapter and scaled positions; the model is then as it was. A second call does nothing.

        Raises:
            ValueError: another adapter was put on the model since, the adapter was merged, or its positions were
                scaled again: what came after must come off first. Until then all of it stays.
        """
        for check in self._checks if self._undo else ():
            check()
        while self._undo:
            # One that raises stays, for another try.
            self._undo[-1]()
            self._undo.pop()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"LoadedBundle({self.base_model!r}, {self.adapter!r}, {self.patch!r})"


def load_bundle(model: Any, source: str | os.PathLike[str], *, patch: bool = True) -> LoadedBundle:
    """Puts a bundle on its base model, in place and reversibly: scaled positions, adapter, sparse attention.

    The weights of the adapter are frozen, as those of the model; to train them further set `requires_grad` of
    `loaded.adapter.parameters()`. Of a pipeline with two transformers (Wan 2.2) both adapter and sparse attention are
    put on the one that was trained; a bundle for the other one can be loaded besides.

    Args:
        model: a model of transformers or diffusers, or a pipeline with one.
        source: folder of the bundle, or its Hub id "name/repository".
        patch: whether to put its sparse attention on; else the adapter runs with the model's own.

    Returns:
        the LoadedBundle: `patch`, `adapter`, `figures`, `recipe`, and `remove()`.

    Raises:
        FileNotFoundError: a folder without a bundle, or with a file missing.
        ValueError: a damaged or unknown bundle, one for another model (the difference is named), a model that has an
            adapter or a patch, or a pipeline of two transformers and a bundle that does not say which.
        TypeError: a model of no known family.
        MissingExtra: it has an adapter, and peft is not installed.
        OSError: the Hub cannot be reached, or has no such bundle.

        The model is then as it was.
    """
    folder, bundle = fetch(source)
    settings = bundle.settings_in(folder) if patch else None
    if settings is None and not bundle.has_adapter:
        raise ValueError("`patch` must be True for a bundle without an adapter: there is nothing else in it")
    target = _host(model, bundle.part) if bundle.has_adapter or bundle.part else model
    # Patched by way of its pipeline a transformer knows the steps of a run.
    patched = target if bundle.part and len(_parts(model)) > 1 else model
    loaded = LoadedBundle(bundle)
    try:
        _put_on(loaded, folder, bundle, settings, target, patched)
    except BaseException:
        loaded.remove()
        raise
    return loaded


def push_bundle(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> str:
    """Uploads a bundle to a model repository on the Hub, made if it is not there.

    Args:
        folder: what `save_bundle` or a training wrote; of other files in it none is uploaded.
        repo_id: "name/repository".
        private: whether a new repository is private.
        token: as huggingface_hub takes it.
        **kwargs: more arguments of `HfApi.create_commit` (revision, commit_message, create_pr, ...).

    Returns:
        the address of the commit.

    Raises:
        ValueError: `repo_id` is not of that form, or the folder holds no valid bundle.
        FileNotFoundError: there is no bundle, or one of its files is missing.
        OSError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd as Add

    check_hub_id("repo_id", repo_id)
    path = Path(folder)
    found = read(path)
    check_files(path, found)
    names = [name for name in found.files if (path / name).is_file()]
    # One commit, so that no one can find half a bundle; the card tells the name of the repository.
    operations = [Add(path_in_repo=name, path_or_fileobj=path / name) for name in [FILE, *names]]
    operations.append(Add(path_in_repo=CARD, path_or_fileobj=card(found, repo_id).encode()))
    options = {"commit_message": "Upload bundle", **kwargs}
    with pushing(repo_id, private, token) as api:
        done = api.create_commit(repo_id=repo_id, operations=operations, repo_type="model", **options)
    return str(done.commit_url)


def fetch(source: str | os.PathLike[str]) -> tuple[Path, Bundle]:
    """The folder of a bundle, downloaded where it is on the Hub, and what `bundle.json` in it says; all files checked.

    Raises:
        FileNotFoundError: a folder without a bundle, or with a file missing.
        ValueError: a file that is no whole, valid bundle; or `source` is neither a folder nor a Hub id.
        OSError: the Hub cannot be reached, or has no such repository.
        TypeError: `source` is neither a text nor a path.
    """
    local = local_folder(source)
    folder, found = _download(os.fspath(source)) if local is None else (local.resolve(), read(local.resolve()))
    check_files(folder, found)
    return folder, found


def _download(repo_id: str) -> tuple[Path, Bundle]:
    """Where the files of a bundle lie once they are here, and what it says of itself."""
    import huggingface_hub

    with told(f"`source` must be a bundle on the Hub that can be reached, got {repo_id!r}"):
        folder = Path(huggingface_hub.hf_hub_download(repo_id, FILE)).parent
    found = read(folder)
    # All of one revision, whatever is pushed meanwhile: the folder is called after it.
    revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    for name in found.files:
        # That for diffusers holds the same weights once more, and nothing here reads it.
        if name != DIFFUSERS_WEIGHTS:
            with told(f"`source` must be a bundle on the Hub with all its files, got {repo_id!r} without {name}"):
                huggingface_hub.hf_hub_download(repo_id, name, revision=revision)
    return folder, found


def _put_on(
    loaded: LoadedBundle, folder: Path, bundle: Bundle, settings: SparseSettings | None, target: Any, patched: Any
) -> None:
    _check_model(target, bundle, but_rope=bundle.rope is not None)
    if bundle.rope is not None:
        from hf_sparse_attn.training.rope_scaling import scale_rope

        undo = scale_rope(target, bundle.rope)
        loaded._undo.append(undo)
        loaded._checks.append(undo.check)
        _check_model(target, bundle)
    if bundle.has_adapter:
        loaded.adapter = load_lora(target, folder)
        loaded._undo.append(loaded.adapter.remove)
        loaded._checks.append(loaded.adapter.check_removable)
        for parameter in loaded.adapter.parameters().values():
            parameter.requires_grad_(False)
    if settings is not None:
        from hf_sparse_attn.training.sparse import make_patch

        if bundle.has_gates:
            from hf_sparse_attn.sharing.gates import GateSet

            GateSet.load(folder / GATES).check(target)
        loaded.patch = make_patch(patched, settings)
        loaded._undo.append(loaded.patch.remove)


def _own_parts(
    sparse: SparseSettings | None, profile: HeadProfile | None, gates: Any
) -> tuple[SparseSettings | None, HeadProfile | None, Any]:
    """Profile and gates that settings name by their place, read, so that the bundle can have them in it."""
    if sparse is None:
        return (None if profile is None else SparseSettings(method=PROFILE)), profile, gates
    params = dict(sparse.params)
    given = params.pop("gates", None)
    if gates is None and given:
        from hf_sparse_attn.sharing.gates import GateSet

        gates = given if isinstance(given, GateSet) else GateSet.load(given)
    profile = find_profile(sparse.method) if profile is None else profile
    if profile is not None:
        # A profile holds all parameters.
        return replace(sparse, method=PROFILE, params={}), profile, gates
    return replace(sparse, params=params), None, gates


def _parts(model: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline; none for a model."""
    found = {} if isinstance(model, nn.Module) else {name: getattr(model, name, None) for name in _PARTS}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def _part_of(model: Any, adapter: Adapter | None) -> str:
    """The part of a pipeline with two transformers that has the adapter; else ""."""
    parts = _parts(model)
    if adapter is None or len(parts) < 2:
        return ""
    return next((name for name, part in parts.items() if part is adapter.model), "")


def _host(model: Any, part: str) -> nn.Module:
    """The module that has the adapter, or is to get it."""
    parts = _parts(model)
    if len(parts) > 1 and part not in parts:
        raise ValueError(
            f"`model` must be {' or '.join(parts)} of the {type(model).__name__}: the bundle does not say which of "
            "them it is for"
        )
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    found = parts.get(part, next(iter(parts.values()), inner))
    if not isinstance(found, nn.Module):
        raise TypeError(f"`model` must be a model, or a pipeline with one, got a {type(model).__name__}")
    return found


def _check_model(model: Any, bundle: Bundle, but_rope: bool = False) -> None:
    """Raises where the model is another one; warns where it is only told to be another one."""
    found = Fingerprint.of(model)
    if but_rope:
        # How positions are rotated is known once they are scaled.
        found = replace(found, rope=bundle.fingerprint.rope)
    different = bundle.fingerprint.difference(found)
    if different:
        raise ValueError(f"`model` must be the one that the bundle was made for; {'; '.join(different)}")
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if name != bundle.base_model and is_hub_id(name) and is_hub_id(bundle.base_model):
        _log.warning("the bundle was made for %s, and is put on %s", bundle.base_model, name)
