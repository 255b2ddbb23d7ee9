"""Profiles on the Hub: which names are asked for, and what is said where that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_sparse_attn.profiles.file import FILE, MEASUREMENTS, write
from hf_sparse_attn.profiles.head_profile import HeadProfile

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(f"{_PART}/{_PART}")


def is_hub_id(name: object) -> bool:
    """Whether a text has the form of a repository's id, "name/repository"; nothing in it can climb out of a folder."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def check_hub_id(argument: str, name: object) -> str:
    """Returns an id of the right form.

    Raises:
        ValueError: another form.
    """
    if not isinstance(name, str) or not is_hub_id(name):
        raise ValueError(f"`{argument}` must be a folder that exists or a Hub id 'name/repository', got {name!r}")
    return name


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

    from hf_sparse_attn.profiles.card import card

    check_hub_id("repo_id", repo_id)
    options = {"commit_message": "Upload head profile", **kwargs}
    with TemporaryDirectory() as folder, told(f"`repo_id` must be a repository that can be written, got {repo_id!r}"):
        write(profile, Path(folder), card(profile, repo_id))
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="model", **options))


@contextmanager
def told(what: str) -> Iterator[None]:
    """Says what was asked for where the Hub or the network fails."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{what}: {error}") from error
    except TypeError:
        # An argument that the client does not have.
        raise
    # The client of the Hub has errors of its own, and the HTTP library below it others.
    except Exception as error:
        raise OSError(f"{what}: {error}") from error
