"""What somebody may have meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: object, known: Iterable[object]) -> str:
    """Ends an error about unknown names: " (nearest: radial)", or "" where no known name is like them.

    Args:
        given: the unknown name, or several.
        known: the known ones; capitals, spaces and the kind of dash are no difference.
    """
    spelled = {_plain(name): str(name) for name in known}
    asked = given if isinstance(given, (list, tuple, set)) else [given]
    found = [match for name in asked for match in difflib.get_close_matches(_plain(name), spelled, n=1)]
    return f" (nearest: {', '.join(dict.fromkeys(spelled[name] for name in found))})" if found else ""


def _plain(name: object) -> str:
    return str(name).strip().lower().replace("-", "_").replace(" ", "_")
