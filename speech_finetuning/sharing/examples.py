"""How a model is used elsewhere, said once: the card, docs/export.md and the export itself show it."""

import json

WHY_PADDED = (
    "faster-whisper 1.2 pads the *features* of a short clip with zeros, which no Whisper was trained "
    "on, and its words then differ; padding the audio with silence avoids that."
)


def faster_whisper_example(folder: str, language: str | None) -> str:
    """A Python program. folder: the converted model; language: its code, None to detect it."""
    spoken = "None" if language is None else json.dumps(language)
    return f"""\
import numpy as np
from faster_whisper import WhisperModel, decode_audio

model, audio = WhisperModel({json.dumps(folder)}), decode_audio("speech.flac")
audio = np.pad(audio, (0, -len(audio) % 480_000))  # silence up to a multiple of 30 s
segments, _ = model.transcribe(audio, language={spoken}, without_timestamps=True)
print("".join(segment.text for segment in segments))
"""
