"""A folder of latents from samples that a test has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from hf_sparse_attn.training.video.latents import LatentData, LatentSample, LatentWriter


def write_latents(
    folder: str | os.PathLike[str],
    samples: Iterable[LatentSample],
    shard_bytes: int = 256 << 20,
    key: Mapping[str, Any] | None = None,
) -> LatentData:
    """Writes samples to a folder and opens it; goes on where an earlier run stopped, or has nothing left to do.

    Args:
        folder: made if missing.
        samples: all of them, in the same order in every run; those that an earlier run kept are drawn and passed over.
        shard_bytes: about how large a shard is.
        key: what the samples depend on; a folder of another key is refused.

    Raises:
        ValueError: a sample that is none, or a folder of another key.
    """
    writer = LatentWriter(folder, key, shard_bytes)
    if not writer.complete:
        for sample in islice(samples, len(writer), None):
            writer.add(sample)
        writer.close()
    return LatentData(folder)
