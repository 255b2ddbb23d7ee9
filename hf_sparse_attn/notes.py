"""Notes: what whoever patched a model should know of it, said once in the log and kept for the report."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)

# Threads that run one model may find out the same thing at the same time.
_SAYING = threading.Lock()


class Notes:
    """Sentences in the order in which they were first said, each once."""

    def __init__(self) -> None:
        self._said: tuple[str, ...] = ()

    def add(self, text: str, level: int = logging.WARNING) -> None:
        """Keeps a sentence, and logs it, unless it is there already."""
        if text in self._said:
            return
        with _SAYING:
            if text in self._said:
                return
            self._said = (*self._said, text)
        log.log(level, "%s", text)

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)
