"""Where profiles come from and go to: folders and the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.profiles.card import card
from hf_sparse_attn.profiles.file import FILE, MEASUREMENTS, read, write
from hf_sparse_attn.sharing.hub import check_hub_id, told

if TYPE_CHECKING:
    from hf_sparse_attn.profiles.head_profile import HeadProfile


def load(kind: type[HeadProfile], source: str | os.PathLike[str], measurements: bool = True) -> HeadProfile:
    """See HeadProfile.from_pretrained; `kind` is the class to make."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"`source` must be a folder or a Hub id, got {source!r} of type {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        file, beside = path / FILE, path / MEASUREMENTS
        if not file.is_file():
            raise FileNotFoundError(f"`source` must be a folder that holds {FILE}, got {path}")
    elif os.path.exists(path):
        raise ValueError(f"`source` must be a folder or a Hub id, got the file {path}")
    else:
        # A path object was never meant as the name of a repository.
        file, beside = download(check_hub_id("source", source), measurements)
    return read(kind, file, beside if measurements and beside.is_file() else None)


def download(repo_id: str, measurements: bool) -> tuple[Path, Path]:
    """Where the files of a profile lie once they are here; the second may not exist.

    Raises:
        ValueError: no Hub id.
        OSError: the Hub cannot be reached, or has no such repository or file.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    check_hub_id("source", repo_id)
    with told(f"`source` must be a profile on the Hub that can be reached, got {repo_id!r}"):
        file = Path(huggingface_hub.hf_hub_download(repo_id, FILE))
    beside = file.with_name(MEASUREMENTS)
    if measurements:
        try:
            beside = Path(huggingface_hub.hf_hub_download(repo_id, MEASUREMENTS))
        except EntryNotFoundError:
            # Most profiles come without; one that is cached without is read without when there is no network.
            pass
    return file, beside


def push(
    profile: HeadProfile, repo_id: str, private: bool | None, token: str | bool | None, kwargs: dict[str, Any]
) -> str:
    """See HeadProfile.push_to_hub."""
    import huggingface_hub

    check_hub_id("repo_id", repo_id)
    options = {"commit_message": "Upload head profile", **kwargs}
    with TemporaryDirectory() as folder, told(f"`repo_id` must be a repository that can be written, got {repo_id!r}"):
        write(profile, Path(folder), card(profile, repo_id))
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="model", **options))
