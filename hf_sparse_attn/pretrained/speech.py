"""Speech, synthesised by eSpeak NG out of the package espeakng-loader, and how much of it was understood."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse_attn.extras import needing

RATE = 16_000

# To score on.
sentences = (
    "The morning train was late again, so we walked along the river and talked about the old bridge near the market.",
    "My grandmother keeps a small garden behind the house, where she grows tomatoes, onions and a few yellow flowers.",
    "After the storm had passed, the children went down to the beach to look for shells and pieces of green glass.",
    "The doctor asked him to drink more water, to sleep at least eight hours, and to come back in two weeks.",
    "The teacher waited until everyone was quiet, and then she explained the second question once more.",
    "She opened the window because the kitchen was full of smoke, and the cat jumped out into the snow.",
    "When the museum closed for the evening, the guard turned off the lights and locked the heavy wooden door.",
    "They built the new library on top of the hill, so that everyone in the valley could see it from far away.",
    "Please put the blue box on the table, take the letter out of it, and read the last page to me.",
    "In the summer we visited three cities, two lakes and a very old church in the south of the country.",
)  # fmt: skip
# To choose and fit methods on.
calibration_sentences = (
    "Our neighbour paints boats in the summer, and in the autumn he repairs clocks for people from the village.",
    "If the weather stays dry until Sunday, we will carry the chairs outside and have dinner under the trees.",
    "The pilot told the passengers that the flight would be short, but that the landing could be rough.",
    "Nobody remembered who had written the song, although every child in the city could sing it by heart.",
)


def speak(text: str) -> np.ndarray[Any, Any]:
    """English speech.

    Args:
        text: what is said.

    Returns:
        the waveform at 16 kHz, float32 in [-1, 1], [samples]; the same for the same text.

    Raises:
        ValueError: the text is empty, or nothing can be said of it.
        MissingExtra: espeakng-loader is not installed.
        OSError: its library cannot be run here.
    """
    with needing("speech"):
        import espeakng_loader
    files = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    command = [sys.executable, "-I", str(Path(__file__).with_name("espeak.py")), *files]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"eSpeak NG must be able to speak, got {done.stderr.decode(errors='replace').strip()}")
    rate = int(np.frombuffer(done.stdout, np.int32, 1)[0])
    wave = np.frombuffer(done.stdout, np.int16, offset=4).astype(np.float32) / 32768
    if not wave.any():
        raise ValueError(f"`text` must be something that can be said, got {text!r}")
    # Through its spectrum, so that nothing above the new band folds down: espeak knows one rate alone.
    size = round(len(wave) * RATE / rate)
    spectrum = np.fft.rfft(wave)[: size // 2]
    return (np.fft.irfft(spectrum, size) * (size / len(wave))).astype(np.float32).clip(-1, 1)


def word_error(said: str, understood: str) -> float:
    """Words that are wrong, missing or too many, as a share of those that were said.

    Case, punctuation and hyphens do not count.

    Raises:
        ValueError: `said` has no word.
    """
    wanted, given = _words(said), _words(understood)
    if not wanted:
        raise ValueError(f"`said` must hold at least one word, got {said!r}")
    # Edits from the words wanted so far to each start of the words given (Levenshtein).
    edits = list(range(len(given) + 1))
    for i, word in enumerate(wanted, 1):
        before, edits = edits, [i]
        for j, other in enumerate(given, 1):
            edits.append(min(before[j] + 1, edits[-1] + 1, before[j - 1] + (word != other)))
    return edits[-1] / len(wanted)


def _words(text: str) -> list[str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()(text).split()
