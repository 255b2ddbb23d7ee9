"""Profiles that are known of a model: those in the user's cache, and those that come with the package."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse_attn.presets import check_quality
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.sharing.fingerprint import Fingerprint, weights_hash

log = logging.getLogger(__name__)

# <model>/<quality> in it is the folder of a profile.
SHIPPED = Path(__file__).parents[1] / "assets" / "profiles"


@dataclass(frozen=True)
class Known:
    """What was found of a model.

    Args:
        profile: the profile, or None where there is none.
        where: where it is from, in words.
        skipped: files that could not be used, and why.
    """

    profile: HeadProfile | None = None
    where: str = ""
    skipped: tuple[str, ...] = ()


def find_known(model: Any, quality: str) -> HeadProfile | None:
    """The profile that is known of a model at a quality: one in the cache of these very weights, else a shipped one.

    Args:
        model: a model or pipeline, patched or not.
        quality: one of presets.QUALITIES.

    Raises:
        TypeError: a model of no known family.
        ValueError: an unknown quality.
    """
    return look_up(model, quality).profile


def look_up(model: Any, quality: str, shipped: bool = True) -> Known:
    """`find_known`, with where the profile is from and what was skipped, which is logged; `shipped` ones, too, or not.

    Raises:
        TypeError, ValueError: as `find_known`.
    """
    check_quality(quality)
    try:
        own = Fingerprint.of(model)
    except ValueError:
        # Parts of several kinds: no one profile can be theirs.
        return Known()
    skipped: list[str] = []
    for folder, where in _places(own, quality, shipped):
        try:
            # Weights are looked at where there is one of this fingerprint at all: they may be on a disk.
            if not folder.is_dir():
                continue
            place = folder / weights_hash(model) / quality if folder.parent == _cache() else folder
            if not place.is_dir():
                continue
            found = HeadProfile.from_pretrained(place, measurements=False)
        # A file in a cache may be anything by now: what could not be read is as if it were not there.
        except Exception as error:
            skipped.append(f"the profile in {folder} cannot be read and is skipped: {str(error)[:300]}")
            log.debug("%s", skipped[-1], exc_info=True)
            continue
        if found.model == own:
            return Known(found, where, tuple(skipped))
    return Known(skipped=tuple(skipped))


def _places(own: Fingerprint, quality: str, shipped: bool) -> Iterator[tuple[Path, str]]:
    """The folders that may hold a profile of a model, and where that is in words."""
    yield _cache() / _name(own), "made here for these weights"
    for folder in sorted(SHIPPED.glob(f"*/{quality}")) if shipped else ():
        yield folder, f"that comes with the package for {folder.parent.name}"


def folder_of(model: Any, own: Fingerprint, quality: str) -> Path:
    """Where the profile of a model at a quality is kept: under HF_HOME, by its fingerprint and its weights."""
    return _cache() / _name(own) / weights_hash(model) / quality


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_sparse_attn" / "profiles"


def _name(own: Fingerprint) -> str:
    """Of the folder of a fingerprint."""
    return hashlib.sha256(json.dumps(asdict(own), sort_keys=True).encode()).hexdigest()[:16]


def keep_known(profile: HeadProfile, model: Any, quality: str) -> Path:
    """Puts a profile into the cache, without the figures of all candidates; returns its folder.

    The file is there whole or not at all, and of two processes that do so the last one's counts.

    Raises:
        OSError: it cannot be written.
    """
    folder = folder_of(model, profile.model, quality)
    replace(profile, measurements=None).save_pretrained(folder)
    return folder
