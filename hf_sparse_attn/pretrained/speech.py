"""Speech, synthesised by eSpeak NG out of the package espeakng-loader, and how much of it was understood."""

from __future__ import annotations

import ctypes
from functools import cache
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

# AUDIO_OUTPUT_SYNCHRONOUS, POS_CHARACTER and espeakCHARS_UTF8 of speak_lib.h.
_NOTHING_IS_PLAYED, _CHARACTERS, _UTF8 = 2, 1, 1
_Sound = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def speak(text: str) -> np.ndarray[Any, Any]:
    """English speech.

    Args:
        text: what is said.

    Returns:
        the waveform at 16 kHz, float32 in [-1, 1], [samples].

    Raises:
        ValueError: the text is empty, or nothing can be said of it.
        MissingExtra: espeakng-loader is not installed.
    """
    library, rate = _library()
    parts: list[np.ndarray[Any, Any]] = []

    def heard(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        return 0

    # Held by a name for as long as the library may call it.
    callback = _Sound(heard)
    library.espeak_SetSynthCallback(callback)
    said = text.encode()
    library.espeak_Synth(said, ctypes.c_size_t(len(said) + 1), 0, _CHARACTERS, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not wave.any():
        raise ValueError(f"`text` must be something that can be said, got {text!r}")
    # Band-limited, through its spectrum: espeak knows one rate alone.
    size = round(len(wave) * RATE / rate)
    spectrum = np.fft.rfft(wave)[: size // 2 + 1]
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


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, ready to speak English, and the rate of its samples."""
    with needing("speech"):
        import espeakng_loader
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path()
    rate = library.espeak_Initialize(_NOTHING_IS_PLAYED, 0, data.encode(), 0)
    if rate <= 0 or library.espeak_SetVoiceByName(b"en-us"):
        raise OSError(f"espeakng-loader must hold the data of an English voice, found none in {data}")
    return library, rate
