"""Whether an exported model writes the tokens that transformers does, on recordings.

    python benchmarks/export_ids.py MODEL FOLDER... [--num_clips 100]

Of each folder the first clips of at most 30 s, greedily decoded with at most --max_new_tokens: by
transformers in float32, and by faster-whisper from the folder that `bash run.sh export MODEL --to
ctranslate2` writes, once with the audio padded to 30 s as docs/export.md does, and once as it is.
Needs requirements-export.txt and faster-whisper. Results: export_ids.md.
"""

import argparse
import contextlib
import io
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch

from speech_finetuning.cli import export
from speech_finetuning.cli.transcribe import files_of
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.long_audio import read_recording
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.model.recogniser import Recogniser, chosen_language, load_recogniser
from speech_finetuning.model.transcription import choose_prompt, extract_features

WINDOW_IN_SAMPLES = 30 * SAMPLE_RATE_IN_HZ
THRESHOLDS = ("no_speech_threshold", "log_prob_threshold", "compression_ratio_threshold")


def read_clips(folder: str, num_clips: int) -> list[np.ndarray]:
    """(n_samples,) each at 16 kHz."""
    clips: list[np.ndarray] = []
    for path, _ in files_of(folder):
        if len(clips) == num_clips:
            break
        waveform = read_recording(path)
        if len(waveform) <= WINDOW_IN_SAMPLES:
            clips.append(waveform)
    return clips


def without_special(ids: Iterable[int], recogniser: Recogniser) -> list[int]:
    tokenizer: Any = recogniser.processor.tokenizer
    special = set(tokenizer.all_special_ids)
    return [token for token in ids if token not in special]


@torch.no_grad()
def ids_of_transformers(
    recogniser: Recogniser, clip: np.ndarray, language: str, max_new_tokens: int
) -> list[int]:
    features = extract_features(recogniser, [clip])
    prompt = choose_prompt(recogniser, features, language, "transcribe")
    encoded = recogniser.model.get_encoder()(features)
    ids = generate_ids(recogniser.model, encoded, max_new_tokens=max_new_tokens, **prompt)
    return without_special(ids[0].tolist()[:max_new_tokens], recogniser)


def ids_of_faster_whisper(
    model: Any, recogniser: Recogniser, clip: np.ndarray, language: str, max_new_tokens: int
) -> list[int]:
    segments, _ = model.transcribe(
        clip,
        language=language,
        without_timestamps=True,
        beam_size=1,
        temperature=0,
        # CTranslate2 stops at half of its limit (4.8.5): it ended where transformers went on.
        max_new_tokens=2 * max_new_tokens,
        condition_on_previous_text=False,
        **dict.fromkeys(THRESHOLDS),
    )
    ids = [token for segment in segments for token in segment.tokens]
    return without_special(ids[:max_new_tokens], recogniser)


def main() -> None:
    import ctranslate2
    import faster_whisper
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--num_clips", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--language")
    parser.add_argument("--quantizations", nargs="+", default=["float32", "float16", "int8"])
    args = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, ctranslate2 {ctranslate2.__version__}, "
        f"faster-whisper {faster_whisper.__version__}"
    )
    recogniser = load_recogniser("MODEL", args.model, "cpu")
    language = chosen_language(recogniser, args.language) if recogniser.languages else "en"
    with tempfile.TemporaryDirectory() as temporary:
        models = {}
        for quantization in args.quantizations:
            folder = Path(temporary) / quantization
            words = [args.model, "--to", "ctranslate2", "--output_dir", str(folder)]
            with contextlib.redirect_stdout(io.StringIO()):  # what to do with it
                assert export.main([*words, "--quantization", quantization]) == 0
            # float16 is of the files; a CPU calculates in float32.
            computed = "int8" if quantization == "int8" else "float32"
            models[quantization] = faster_whisper.WhisperModel(
                str(folder), device="cpu", compute_type=computed
            )
        for folder in args.folders:
            compare(folder, recogniser, models, language, args)


def compare(
    folder: str,
    recogniser: Recogniser,
    models: dict[str, Any],
    language: str,
    args: argparse.Namespace,
) -> None:
    """Prints in how many of the folder's clips all tokens are the same."""
    clips = read_clips(folder, args.num_clips)
    limit = args.max_new_tokens
    expected = [ids_of_transformers(recogniser, clip, language, limit) for clip in clips]
    num_tokens = sum(map(len, expected))
    for name, model in models.items():
        for is_padded in (True, False):
            equal = 0
            for clip, ids in zip(clips, expected, strict=True):
                missing = -len(clip) % WINDOW_IN_SAMPLES if is_padded else 0
                heard = np.pad(clip, (0, missing))
                found = ids_of_faster_whisper(model, recogniser, heard, language, limit)
                equal += found == ids
            print(
                f"{folder} {name:<8} {'padded' if is_padded else 'as it is':<8} "
                f"{equal} of {len(clips)} clips equal ({num_tokens} tokens)",
                flush=True,
            )


if __name__ == "__main__":
    main()
