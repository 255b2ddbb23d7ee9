"""The Hub: which names are asked for, and what is said where that fails or a model cannot be loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.nearest import nearest

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(f"{_PART}/{_PART}")
# Some repositories of the Hub are older than its names of owners.
_ID_OF_OLD = re.compile(f"({_PART}/)?{_PART}")


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


def local_folder(source: object) -> Path | None:
    """The folder that `source` names, or None where it is the id of a repository.

    Raises:
        TypeError: it is neither a text nor a path.
        ValueError: it is a file, or no id either.
    """
    if not isinstance(source, (str, os.PathLike)) or isinstance(os.fspath(source), bytes):
        raise TypeError(f"`source` must be a folder or a Hub id, got {source!r} of type {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"`source` must be a folder or a Hub id, got the file {path}")
    # A path object was never meant as the name of a repository.
    check_hub_id("source", source)
    return None


@contextmanager
def pushing(repo_id: str, private: bool | None, token: str | bool | None) -> Iterator[Any]:
    """The client of the Hub, for a model repository that is made if it is not there.

    Raises:
        ValueError: `repo_id` is not of the form of an id.
        OSError: the Hub cannot be reached or refuses.
    """
    import huggingface_hub

    check_hub_id("repo_id", repo_id)
    with told(f"`repo_id` must be a repository that can be written, got {repo_id!r}"):
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        yield api


@contextmanager
def loading(model: object, argument: str = "model", besides: Sequence[str] = ()) -> Iterator[None]:
    """Within it what keeps a model from being loaded is told in one line that names the argument and the model.

    Args:
        model: a folder or the id of a repository on the Hub.
        argument: that it was given as.
        besides: other names that the argument takes.

    Raises:
        ValueError: it is no model that can be loaded.
        OSError: it is not there, or cannot be reached.
    """
    names = f", or one of {', '.join(besides)}" if besides else ""
    rule = f"`{argument}` must be the folder of a model, its id on the Hub{names}"
    path = Path(str(model))
    if path.is_file():
        raise ValueError(f"{rule}; got the file {path}")
    if not path.is_dir() and _ID_OF_OLD.fullmatch(str(model)) is None:
        raise FileNotFoundError(f"{rule}; got {str(model)!r}, which is not there")
    with reading(f"{rule}; got {str(model)!r}{nearest(model, besides)}"):
        yield


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within it what keeps something from being read is told in one line.

    Args:
        what: begins that line: the rule, and what was given.

    Raises:
        ValueError: it is none of what it should be.
        OSError: it is not there, or cannot be reached.
    """
    try:
        yield
    # What is not installed is told by itself, and memory that runs out is no fault of the model.
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    # The libraries have errors of many kinds for files that they cannot read.
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        said = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what}: {said}") from error


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
