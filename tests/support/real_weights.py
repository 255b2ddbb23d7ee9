"""Whether the packages of real weights and inputs are installed; tests marked `real` run only then."""

from __future__ import annotations

from hf_sparse_attn.extras import EXTRAS, MissingExtra
from hf_sparse_attn.pretrained import package_folder

PACKAGES = [package for package, extra in EXTRAS.items() if extra == "real"]


def why_not() -> str | None:
    """Why tests of real weights cannot run here, or None."""
    try:
        for package in PACKAGES:
            package_folder("the test", package)
    except MissingExtra as missing:
        return str(missing)
    return None
