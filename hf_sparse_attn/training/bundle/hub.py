"""Bundles in folders and on the Hub: found, downloaded, pushed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hf_sparse_attn.sharing.hub import check_hub_id, local_folder, pushing, told
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
