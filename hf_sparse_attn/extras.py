"""Optional packages: what is missing, and which extra of this package brings it."""

from __future__ import annotations


class MissingExtra(ImportError):
    """An optional package is not installed.

    Args:
        what: what needs it, "the page".
        package: the package.
        extra: the extra that brings it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package} (pip install 'hf-sparse-attn[{extra}]')", name=package)
