"""Bundles in folders and on the Hub: found, downloaded, pushed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hf_sparse_attn.sharing.hub import check_hub_id, told
from hf_sparse_attn.training.bundle.card import card
from hf_sparse_attn.training.bundle.file import CARD, FILE, Bundle, check_files, read
from hf_sparse_attn.training.lora.file import DIFFUSERS_WEIGHTS


def fetch(source: str | os.PathLike[str]) -> tuple[Path, Bundle]:
    """The folder of a bundle, downloaded where it is on the Hub, and what `bundle.json` in it says; all files checked.

    Raises:
        FileNotFoundError: a folder without a bundle, or with a file missing.
        ValueError: a file that is no whole, valid bundle; or `source` is neither a folder nor a Hub id.
        OSError: the Hub cannot be reached, or has no such repository.
        TypeError: `source` is neither a text nor a path.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"`source` must be a folder or a Hub id, got {source!r} of type {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        folder = path.resolve()
        found = read(folder)
    elif path.exists():
        raise ValueError(f"`source` must be a folder or a Hub id, got the file {path}")
    else:
        folder, found = download(source)
    check_files(folder, found)
    return folder, found


def download(source: object) -> tuple[Path, Bundle]:
    """Where the files of a bundle lie once they are here, and what it says of itself.

    Raises:
        ValueError: no Hub id, or what is there is no valid bundle.
        OSError: the Hub cannot be reached, or has no such repository or file.
    """
    import huggingface_hub

    # A path object was never meant as the name of a repository.
    repo_id = check_hub_id("source", source)
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
    import huggingface_hub

    check_hub_id("repo_id", repo_id)
    path = Path(folder)
    found = read(path)
    check_files(path, found)
    add = huggingface_hub.CommitOperationAdd
    names = [name for name in found.files if (path / name).is_file()]
    # One commit, so that no one can find half a bundle; the card tells the name of the repository.
    operations = [add(path_in_repo=name, path_or_fileobj=path / name) for name in [FILE, *names]]
    operations.append(add(path_in_repo=CARD, path_or_fileobj=card(found, repo_id).encode()))
    options = {"commit_message": "Upload bundle", **kwargs}
    with told(f"`repo_id` must be a repository that can be written, got {repo_id!r}"):
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        done = api.create_commit(repo_id=repo_id, operations=operations, repo_type="model", **options)
    return str(done.commit_url)
