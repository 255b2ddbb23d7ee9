"""A process that has eSpeak NG speak one text, for the library varies what it says with all that it said before.

Run as `python espeak.py LIBRARY DATA < text`; writes the rate as an int32, then the samples as int16, to stdout.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any

_VOICE = b"en-us"
# AUDIO_OUTPUT_SYNCHRONOUS, POS_CHARACTER and espeakCHARS_UTF8 of speak_lib.h.
_NOTHING_IS_PLAYED, _CHARACTERS, _UTF8 = 2, 1, 1
_Sound = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main(file: str, data: str) -> None:
    """Speaks what comes on stdin.

    Args:
        file: the library.
        data: the folder of its voices.
    """
    library = ctypes.CDLL(file)
    rate = library.espeak_Initialize(_NOTHING_IS_PLAYED, 0, data.encode(), 0)
    if rate <= 0 or library.espeak_SetVoiceByName(_VOICE):
        sys.exit(f"eSpeak NG must have the voice {_VOICE.decode()}, found none in {data}")
    out = sys.stdout.buffer
    out.write(struct.pack("=i", rate))

    def heard(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            out.write(ctypes.string_at(samples, 2 * count))
        return 0

    # Held by a name for as long as the library may call it.
    callback = _Sound(heard)
    library.espeak_SetSynthCallback(callback)
    said = sys.stdin.buffer.read()
    library.espeak_Synth(said, ctypes.c_size_t(len(said) + 1), 0, _CHARACTERS, 0, _UTF8, None, None)
    library.espeak_Synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
