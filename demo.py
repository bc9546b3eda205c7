#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A web page on which a Whisper model can be tried: record or upload speech, read the words, click
to hear them.

    pip install -r requirements.txt -r requirements-demo.txt
    python demo.py --model whisper-small-es
    python demo.py --model whisper-small-es --base_model openai/whisper-small

The way of one clip: read_audio -> extract_features -> transcribe (long-form generation with the
model's own timestamps if it predicts them, else windows cut at pauses) -> segments_as_html. The
page is served on this machine only (--share puts it on the internet), reports nothing, and loads
nothing from the internet if the models are folders.
"""

import argparse
import html
import importlib.util
import itertools
import json
import math
import os
import sys
import urllib.parse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Set before the libraries read them: nobody is told about the use of this page, and no history of
# it is kept.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import huggingface_hub
import numpy as np
import soundfile
import soxr
import torch
import transformers
from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

SAMPLE_RATE_IN_HZ = 16_000  # every Whisper checkpoint was trained on 16 kHz
HOP_LENGTH_IN_SAMPLES = 160  # 10 ms between two log-mel frames
FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the frames
PAUSE_IN_SAMPLES = 800  # 50 ms, the shortest pause between two words
SILENT_PEAK = 1e-3  # 60 dB below full scale: a muted microphone, not a quiet voice
MIN_TIMESTAMP_SHARE = 0.01  # see predicts_timestamps
DETECT = "detect"  # in place of a language code

# Plays the clip from the time that the button carries; player and buttons appear together.
PLAY = "const player = document.getElementById('player'); player.currentTime = this.dataset.start; player.play()"

Segment = tuple[float, float, str]  # start and end in seconds, words


class UserError(ValueError):
    """Something that the user can fix: one line on stderr with exit code 2, or one line on the
    page."""


@dataclass
class Recogniser:
    """A loaded checkpoint, what it has tokens for ([] if English-only), and what its encoder hears
    at once."""

    name: str
    model: WhisperForConditionalGeneration
    processor: WhisperProcessor
    languages: list[str]
    tasks: list[str]
    window_in_samples: int  # 30 s in OpenAI's checkpoints


# ------------------------------------------------------------------------------------ models ----
def check_folder(flag: str, name: str) -> None:
    """Raises UserError if name is neither a folder with a model nor like a Hub id."""
    folder = Path(name)
    like_hub_id = not folder.exists() and name.count("/") < 2 and name[0] not in "./~"
    if (folder / "config.json").is_file() or like_hub_id:
        return
    names = sorted(path.name for path in folder.glob("*")) or [
        "a file" if folder.is_file() else "nothing"
    ]
    found = f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
    saved = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    advice = saved[-1].parent if saved else "OUTPUT_DIR (the one of training)"
    raise UserError(
        f"{flag} {name}: no folder with a config.json, found {found}. Next: python demo.py {flag} {advice}"
    )


def load(flag: str, name: str) -> Recogniser:
    """The checkpoint on the GPU in float16, or else on the CPU in float32. No code of a model
    repository is ever run.
    Raises: UserError if it is not there, is damaged, or is no Whisper model."""
    check_folder(flag, name)
    print(f"loading {name} ...")
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if kind != "whisper":
            raise UserError(f"Whisper is needed, found a {kind} model.")
        processor = WhisperProcessor.from_pretrained(name)
        device, dtype = (
            ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
        )
        model = WhisperForConditionalGeneration.from_pretrained(name, dtype=dtype).to(device).eval()
    except Exception as error:  # whatever the library says about files that are missing, damaged or of another kind
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        advice = "" if Path(name).is_dir() else ", or, if the model is private: hf auth login"
        raise UserError(
            f"{flag} {name}: {text} Next: python demo.py {flag} OUTPUT_DIR{advice}"
        ) from error
    languages = sorted(
        token.strip("<|>") for token in getattr(model.generation_config, "lang_to_id", None) or {}
    )
    tasks = sorted(getattr(model.generation_config, "task_to_id", None) or {})
    window = model.config.max_source_positions * FRAMES_PER_POSITION * HOP_LENGTH_IN_SAMPLES
    return Recogniser(name, model, processor, languages, tasks, window)


def base_model_of(name: str) -> str | None:
    """The model that this one was fine-tuned from, according to its README.md's metadata or else
    its run_info.json."""
    folder, base = Path(name), None
    card, record = folder / "README.md", folder / "run_info.json"
    try:
        if card.is_file() or not folder.is_dir():
            base = huggingface_hub.ModelCard.load(card if card.is_file() else name).data.get(
                "base_model"
            )
        if not base and record.is_file():
            base = json.loads(record.read_text(encoding="utf-8"))["identity"]["model_name_or_path"]
    except (
        Exception
    ) as error:  # a card or record in somebody else's format: there is nothing to compare with
        print(
            f"note: the base model of {name} is not known ({type(error).__name__})", file=sys.stderr
        )
    return base[0] if isinstance(base, list) else base


def load_recognisers(model: str, base_model: str | None) -> list[Recogniser]:
    """The model and, if one is given or known, the model that it is compared with.
    Raises: UserError, but not for a base model that nobody asked for: that is left out with a line
    on stderr."""
    recognisers = [load("--model", model)]
    base = base_model or base_model_of(model)
    if base in (None, "none", model):
        return recognisers
    try:
        return [*recognisers, load("--base_model", base)]
    except UserError as error:
        if base_model:
            raise
        print(f"note: shown without the base model. {error}", file=sys.stderr)
        return recognisers


def default_language(recogniser: Recogniser) -> str:
    """The language that the model was told in training, else detection."""
    language = (
        (getattr(recogniser.model.generation_config, "language", None) or DETECT)
        .lower()
        .strip("<|>")
    )
    code = TO_LANGUAGE_CODE.get(language, language)
    return code if code in recogniser.languages else DETECT


# ------------------------------------------------------------------------------------- audio ----
def read_audio(path: str | None) -> np.ndarray:
    """A file as (n_samples,) float32, mono, 16 kHz. Raises: UserError if there is none, or nothing
    to hear in it."""
    if not path:
        raise UserError(
            "No audio yet: choose a file, or press Record and Stop; then press Transcribe again."
        )
    try:
        waveform, sampling_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        advice = "wav, flac, ogg, opus and mp3 are read; anything else first: ffmpeg -i IN -ar 16000 -ac 1 OUT.flac"
        raise UserError(
            f"Not readable as audio (libsndfile: {error.error_string}) {advice}"
        ) from error
    mono = waveform.mean(axis=1)
    if len(mono) == 0 or not np.isfinite(mono).all():
        raise UserError(
            "No sound in this file: it holds no samples, or numbers that are not finite. Choose another."
        )
    if is_silent(mono):
        raise UserError(
            "Only silence in this clip. If it was recorded here: is the right microphone chosen, unmuted?"
        )
    if sampling_rate != SAMPLE_RATE_IN_HZ:
        mono = soxr.resample(mono, sampling_rate, SAMPLE_RATE_IN_HZ)
    return np.ascontiguousarray(mono, dtype=np.float32)


def is_silent(waveform: np.ndarray) -> bool:
    """Whether (n_samples,) is flat: a constant offset, as cheap microphones have, is no sound."""
    return float(np.abs(waveform - waveform.mean()).max()) < SILENT_PEAK


def cut_at_pauses(waveform: np.ndarray, window: int) -> list[tuple[int, int]]:
    """(start, end) samples of consecutive pieces of at most window samples, each cut at the
    quietest place of the window's last quarter, so that few words are cut in two. waveform:
    (n_samples,)."""
    cuts = [0]
    while len(waveform) - cuts[-1] > window:
        first = cuts[-1] + 3 * window // 4
        last_quarter = waveform[first : cuts[-1] + window]
        blocks = last_quarter[: len(last_quarter) // PAUSE_IN_SAMPLES * PAUSE_IN_SAMPLES].reshape(
            -1, PAUSE_IN_SAMPLES
        )
        cuts.append(
            first
            + int(np.square(blocks).mean(axis=1).argmin()) * PAUSE_IN_SAMPLES
            + PAUSE_IN_SAMPLES // 2
        )
    return list(itertools.pairwise([*cuts, len(waveform)]))


def extract_features(recogniser: Recogniser, waveform: np.ndarray) -> torch.Tensor:
    """Log-mel spectrogram (1, n_mels, n_frames) of the whole clip, at least a window long, for the
    model's device."""
    length = {
        "padding": "max_length",
        "max_length": recogniser.window_in_samples,
        "truncation": False,
    }
    extractor = recogniser.processor.feature_extractor
    features = extractor(
        waveform, sampling_rate=SAMPLE_RATE_IN_HZ, return_tensors="pt", **length
    ).input_features
    return features.to(recogniser.model.device, recogniser.model.dtype)


# ----------------------------------------------------------------------------- transcription ----
def choose_prompt(
    recogniser: Recogniser, window: torch.Tensor, language: str, task: str
) -> dict[str, str]:
    """`generate`'s language and task, as far as this model has them; a language that it lacks is
    detected in the clip's first window, (1, n_mels, n_frames)."""
    prompt = {"task": task} if task in recogniser.tasks else {}
    if recogniser.languages and language not in recogniser.languages:
        tokens = {
            token_id: token
            for token, token_id in recogniser.model.generation_config.lang_to_id.items()
        }
        language = tokens[recogniser.model.detect_language(window).item()].strip("<|>")
    return {"language": language, **prompt} if recogniser.languages else prompt


@torch.no_grad()
def predicts_timestamps(
    recogniser: Recogniser, window: torch.Tensor, prompt: dict[str, str]
) -> bool:
    """Whether this model may begin with a timestamp instead of <|notimestamps|>. Fine-tuning
    without timestamps unlearns them: a tiny model with 1 % WER gave them 0.1 %, and dropped half of
    the words when made to use them.
    window: (1, n_mels, n_frames)."""
    config = recogniser.model.generation_config
    without = getattr(config, "no_timestamps_token_id", None)
    if without is None:
        return False
    tokens = [config.decoder_start_token_id]
    tokens += [config.lang_to_id[f"<|{prompt['language']}|>"]] if "language" in prompt else []
    tokens += [config.task_to_id[prompt["task"]]] if "task" in prompt else []
    decoder_input_ids = torch.tensor([tokens], device=window.device)
    logits = recogniser.model(input_features=window, decoder_input_ids=decoder_input_ids).logits[
        0, -1
    ]
    share = (
        logits[without:].float().softmax(dim=-1)
    )  # the timestamps follow to the end of the vocabulary
    return 1 - share[0].item() >= MIN_TIMESTAMP_SHARE


def transcribe_with_timestamps(
    recogniser: Recogniser,
    features: torch.Tensor,
    duration_in_seconds: float,
    prompt: dict[str, str],
) -> list[Segment] | None:
    """The library's long-form generation: the model says where a segment ends, and goes on
    listening there.
    None if the times cannot be true. features: (1, n_mels, n_frames)."""
    window, limit = recogniser.window_in_samples / SAMPLE_RATE_IN_HZ, duration_in_seconds
    # Called before each window. It bounds their number: an end at 0.02 s would move the model on by
    # only 0.02 s.
    calls = iter(range(4 * math.ceil(limit / window) + 4))
    options = {
        "return_timestamps": True,
        "return_segments": True,
        "monitor_progress": lambda progress: next(calls),
    }
    try:
        found = recogniser.model.generate(input_features=features, **options, **prompt)["segments"][
            0
        ]
    except StopIteration:
        return None
    decode = partial(recogniser.processor.tokenizer.decode, skip_special_tokens=True)
    pieces = [
        (float(part["start"]), float(part["end"]), decode(part["tokens"].tolist()).strip())
        for part in found
    ]
    if not are_plausible(pieces, window):
        return None
    # The last window is filled up with silence, in which segments may end or even begin.
    return [(start, min(end, limit), text) for start, end, text in pieces if text and start < limit]


def are_plausible(segments: list[Segment], window_in_seconds: float) -> bool:
    """Whether the segments are in order, and none is longer than what the model hears at once."""
    starts = [start for start, _, _ in segments]
    return starts == sorted(starts) and all(
        0 <= end - start <= window_in_seconds + 0.02 for start, end, _ in segments
    )


def transcribe_windows(
    recogniser: Recogniser, waveform: np.ndarray, prompt: dict[str, str]
) -> list[Segment]:
    """One segment for each window, decoded as models are scored in training. waveform:
    (n_samples,)."""
    segments = []
    for start, end in cut_at_pauses(waveform, recogniser.window_in_samples):
        if is_silent(waveform[start:end]):
            continue  # Whisper invents words for silence
        features = extract_features(recogniser, waveform[start:end])
        tokens = recogniser.model.generate(
            input_features=features, return_timestamps=False, **prompt
        )[0].tolist()
        text = recogniser.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        segments += [(start / SAMPLE_RATE_IN_HZ, end / SAMPLE_RATE_IN_HZ, text)] if text else []
    return segments


def transcribe(
    recogniser: Recogniser, waveform: np.ndarray, language: str, task: str
) -> tuple[list[Segment], str]:
    """The words of (n_samples,) at 16 kHz, and one line about how they were found."""
    features = extract_features(recogniser, waveform)
    window = features[:, :, : recogniser.window_in_samples // HOP_LENGTH_IN_SAMPLES]
    prompt = choose_prompt(recogniser, window, language, task)
    segments, times = None, "the model's own"
    if predicts_timestamps(recogniser, window, prompt):
        segments = transcribe_with_timestamps(
            recogniser, features, len(waveform) / SAMPLE_RATE_IN_HZ, prompt
        )
    if segments is None:
        segments, times = (
            transcribe_windows(recogniser, waveform, prompt),
            "whole windows (this model does not predict them)",
        )
    note = f"language: {prompt.get('language', 'en')}, times: {times}"
    return segments, note if segments else f"No words heard ({note})."


# -------------------------------------------------------------------------------------- page ----
def clock(seconds: float) -> str:
    """61.25 s as 1:01.2."""
    tenths = int(10 * seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def segments_as_html(segments: list[Segment]) -> str:
    """One paragraph for each segment: a button that plays it, and its words."""
    row = '<p><button class="segment" data-start="{}" onclick="{}"><u>{} - {}</u></button> {}</p>'
    rows = [
        row.format(start, PLAY, clock(start), clock(end), html.escape(text))
        for start, end, text in segments
    ]
    return "".join(rows)


def answer(recognisers: list[Recogniser], path: str | None, language: str, task: str) -> list[str]:
    """What the page shows for a clip: a message, the player, then a transcript, a note and segments
    for each model."""
    try:
        waveform = read_audio(path)
        results = [transcribe(recogniser, waveform, language, task) for recogniser in recognisers]
    except (UserError, torch.OutOfMemoryError) as error:
        return [str(error), *[""] * (1 + 3 * len(recognisers))]
    player = (
        f'<audio id="player" controls src="gradio_api/file={urllib.parse.quote(path)}"></audio>'
    )
    shown = [
        ("\n".join(part[2] for part in segments), note, segments_as_html(segments))
        for segments, note in results
    ]
    return ["", player, *itertools.chain.from_iterable(shown)]


def build_page(recognisers: list[Recogniser]) -> Any:
    """The gradio.Blocks; what can be chosen is what the first model has."""
    import gradio  # here, because it is optional and slow to import

    codes, tasks = recognisers[0].languages, recognisers[0].tasks or ["transcribe"]
    names = [
        ("detect", DETECT),
        *[(f"{LANGUAGES.get(code, code)} ({code})", code) for code in codes],
    ]
    # Uploads and recordings are deleted when they are an hour old.
    with gradio.Blocks(title="Whisper", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        sources = {"sources": ["upload", "microphone"], "buttons": ["download"]}
        audio = gradio.Audio(**sources, type="filepath", label="Speech", elem_id="speech")
        with gradio.Row(visible=bool(codes)):
            language = gradio.Dropdown(
                names, value=default_language(recognisers[0]), label="Language"
            )
            task = gradio.Radio(tasks, value="transcribe", label="Task (translate: into English)")
        button = gradio.Button("Transcribe", variant="primary", elem_id="transcribe")
        outputs = [gradio.Markdown(elem_id="message"), gradio.HTML()]
        with gradio.Row():
            for index, recogniser in enumerate(recognisers):
                with gradio.Column(elem_id=f"model-{index}"):
                    label = f"{'base model: ' * bool(index)}{recogniser.name}"
                    outputs.append(
                        gradio.Textbox(label=label, lines=3, buttons=["copy"], interactive=False)
                    )
                    outputs += [gradio.Markdown(), gradio.HTML()]
        # A new clip must not stand beside the old one's words.
        audio.change(lambda: [""] * len(outputs), outputs=outputs)
        button.click(partial(answer, recognisers), [audio, language, task], outputs)
    return page


def main(argv: list[str] | None = None) -> int:
    """Loads the models and serves the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model",
        required=True,
        help="fine-tuned Whisper: the --output_dir of training or a Hub id",
    )
    parser.add_argument(
        "--base_model", help="shown beside it; default: what the model's card names; none: nothing"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="a public address as well, through gradio's servers"
    )
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # it tries five times and says so five times
    try:
        if importlib.util.find_spec("gradio") is None:
            raise UserError(
                "gradio is not installed. Next: python -m pip install -r requirements-demo.txt"
            )
        page = build_page(load_recognisers(args.model, args.base_model))
        page.launch(
            server_name="127.0.0.1", server_port=args.port, share=args.share, footer_links=[]
        )
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # gradio found no free port
        reason = str(error).split(".")[0]
        print(
            f"error: --port {args.port}: {reason}. Next: the same command without --port",
            file=sys.stderr,
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
