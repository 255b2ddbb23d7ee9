"""The Hub: which names are asked for, and what is said where that fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

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
