"""A model that says something about every clip, and clips for it."""

from pathlib import Path

import numpy as np
import soundfile
import soxr
from transformers import GenerationConfig

from speech_finetuning.cli import demonstration


def make_talker(folder: Path) -> Path:
    """A random model that can say only letters, and only times within its window of 4 s."""
    demonstration.make_model(folder, d_model=16, num_layers=1)
    tokens = demonstration.make_tokenizer().get_vocab()
    config = GenerationConfig.from_pretrained(folder)
    times = {f"<|{i * 0.02:.2f}|>" for i in range(201)}
    allowed = set("abcdefgh") | times | {"<|endoftext|>"}
    config.suppress_tokens = [
        token_id for token, token_id in tokens.items() if token not in allowed
    ]
    config.begin_suppress_tokens = [tokens["<|endoftext|>"]]
    config.save_pretrained(folder)
    return folder


def make_long_clip(folder: Path) -> Path:
    """About 10 s, two and a half windows, 44.1 kHz stereo."""
    generator = np.random.default_rng(0)
    waveform = np.concatenate(
        [demonstration.speak(["uno", "dos", "tres", "diez"], generator) for _ in range(6)]
    )
    upsampled = soxr.resample(waveform, 16_000, 44_100)
    soundfile.write(folder / "long.wav", np.stack([upsampled, upsampled], axis=1), 44_100)
    return folder / "long.wav"
