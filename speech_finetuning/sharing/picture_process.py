"""The process that draws the pictures of a report and puts them, and the sounds, into its page. Painter
starts it.

It is a process of its own because matplotlib holds the GIL while it draws: on a thread it would keep
the training's own Python waiting as if it ran there. What it imports is little, as every evaluation
starts one.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from speech_finetuning.base.children import end_with_parent
from speech_finetuning.base.files import replace_text

# In the folder of an order.
ORDER = "order.json"
FEATURES = "features.npz"
PICTURES = "pictures.json"

NICENESS = 10  # reading and decoding for the training come first


def draw_spectrogram(
    figure: Any, features: np.ndarray, sample_rate_in_hz: int, hop_length_in_samples: int
) -> str:
    """What the model reads, (n_mels, n_frames), as webp in base64."""
    import librosa.display  # here: seconds and 150 MB

    figure.clear()
    axes = figure.add_axes((0.11, 0.2, 0.88, 0.77))  # a layout engine takes twice the time
    librosa.display.specshow(
        features.astype(np.float32),
        x_axis="time",
        y_axis="mel",
        sr=sample_rate_in_hz,
        hop_length=hop_length_in_samples,
        fmax=sample_rate_in_hz / 2,
        cmap="magma",
        ax=axes,
    )
    axes.set(xlabel="seconds", ylabel="Hz")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", pil_kwargs={"quality": 60})
    return base64.b64encode(buffer.getvalue()).decode()


def draw_curve(path: Path, points: list[tuple[int, float]], baseline: float | None) -> None:
    """WER over the steps as a PNG. Raises: OSError."""
    import matplotlib.figure  # here: half a second

    figure = matplotlib.figure.Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), marker="o", label="this model")
    if baseline is not None:
        axes.axhline(baseline, linestyle="--", color="grey", label="untouched model")
    axes.set(xlabel="step", ylabel="WER in %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def draw_spectrograms(folder: Path, order: dict[str, Any]) -> dict[str, str]:
    """The pictures by the words that stand in their places."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.4, 2.2), dpi=75)
    pictures = {}
    with np.load(folder / FEATURES, allow_pickle=False) as features:
        for place, name in order["spectrograms"].items():
            pictures[place] = draw_spectrogram(
                figure, features[name], order["sample_rate_in_hz"], order["hop_length_in_samples"]
            )
    return pictures


def carry_out(folder: Path) -> None:
    """Draws what is ordered. All files are written here, and only whole ones go to their places.
    Raises: OSError, and what the libraries raise."""
    order = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    if order["curve"] is not None:
        curve = order["curve"]
        draw_curve(folder / "curve.png", curve["points"], curve["baseline"])
        (folder / "curve.png").replace(curve["target"])
    if not order["spectrograms"] and not order["sounds"]:
        return
    pictures = draw_spectrograms(folder, order) if order["spectrograms"] else {}
    replace_text(folder / PICTURES, json.dumps(pictures))
    for name, target in order["pages"].items():
        page = (folder / name).read_text(encoding="utf-8")
        page = fill_places(page, order["places"], order["sounds"] | pictures)
        replace_text(folder / name, page)
        (folder / name).replace(target)


def fill_places(page: str, places: str, found: dict[str, str]) -> str:
    """The page with what has been found by the words in its places, or nothing there. places: a
    regular expression of all of them."""
    return re.sub(places, lambda match: found.get(match.group(), ""), page)


def main(argv: list[str] | None = None) -> int:
    """Draws; the reason of a failure is the last line on stderr. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent_pid", type=int, required=True)
    args = parser.parse_args(argv)
    end_with_parent(args.parent_pid)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    carry_out(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
