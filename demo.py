#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A web page on which a Whisper model can be tried: record or upload speech, read the words, click
to hear them.

    pip install -r requirements.txt -r requirements-demo.txt
    python demo.py whisper-small-es
    python demo.py whisper-small-es --base_model openai/whisper-small

What transcribes is speech_finetuning/model/transcription.py, as in `bash run.sh transcribe`. The
page is served on this machine only (--share puts it on the internet), reports nothing, and loads
nothing from the internet if the models are folders.
"""

import argparse
import base64
import difflib
import html
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
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
import torch
import transformers
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.subtitles import as_srt, as_text
from speech_finetuning.data.long_audio import read_recording
from speech_finetuning.model.recogniser import (
    DETECT,
    Recogniser,
    default_language,
    load_recogniser,
)
from speech_finetuning.model.transcription import Segment, Transcript, transcribe
from speech_finetuning.scoring.metrics import count_words

# Plays the clip from the time that the button carries, in the player above.
PLAY = (
    "const player = document.querySelector('#speech audio'); "
    "player.currentTime = this.dataset.start; player.play()"
)
TASKS = {"transcribe": "what is said", "translate": "an English translation"}
NUM_EXAMPLES = 4
OUTPUTS_PER_MODEL = 5  # text, a line about it, segments, two files


# ------------------------------------------------------------------------------------ models ----
def load(flag: str, name: str) -> Recogniser:
    """The checkpoint, after a line on the terminal. Raises: UserError."""
    print(f"loading {name} ...")
    return load_recogniser(flag, name)


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


# ------------------------------------------------------------------------------ transcription ----
def read_audio(path: str | None) -> Any:
    """A file as (n_samples,) float32, mono, 16 kHz. Raises: UserError if there is none, or nothing
    to hear in it."""
    if not path:
        raise UserError(
            "No audio yet: choose a file, or press Record and Stop; then press Transcribe again."
        )
    return read_recording(path)


def hear(recogniser: Recogniser, waveform: Any, language: str, task: str) -> Transcript:
    """The words of (n_samples,) at 16 kHz."""
    (found,) = transcribe(recogniser, [waveform], language=language, task=task)
    return found


def describe(found: Transcript) -> str:
    """One line about how the words were found."""
    language = LANGUAGES.get(found.language, found.language).title()
    if not found.segments:
        return f"No words heard ({language})."
    if found.has_model_times:
        return f"{language}. Click a time to hear it."
    return f"{language}, in pieces of up to 30 seconds, cut at pauses. Click a time to hear it."


def compare(said: str, found: Transcript) -> str:
    """How many words are wrong, by what was really said; empty if nobody has typed that."""
    is_english = found.language == "en"
    normalize = EnglishTextNormalizer({}) if is_english else BasicTextNormalizer()
    reference = " ".join(normalize(said).split())
    if not reference:
        return ""
    counts = count_words(reference, " ".join(normalize(found.text).split()))
    words = "word" if counts.num_reference_words == 1 else "words"
    return (
        f"**{counts.num_errors} of {counts.num_reference_words} {words} wrong** "
        f"(word error rate {counts.wer:.1f} %)"
    )


# ------------------------------------------------------------------------- what the folder tells ----
def read_record(path: Path) -> dict[str, Any]:
    """A JSON file of the model's folder; {} if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def introduce(recogniser: Recogniser, base: str | None) -> str:
    """A title and one sentence, in Markdown: the model, its language, and how good it is."""
    folder = Path(recogniser.name)
    name = folder.resolve().name if folder.is_dir() else recogniser.name
    language = default_language(recogniser)
    title = f"# {plain(name)}"
    if language != DETECT:
        title += f" · {LANGUAGES.get(language, language).title()}"
    sentence = "Speech to text"
    if base:
        sentence += f" by {plain(Path(base).name)}, trained further"
    scores = read_record(folder / "all_results.json")
    for role in ("test", "eval"):
        wer = scores.get(f"{role}_wer")
        if isinstance(wer, int | float):
            sentence += f": {wer:.1f} of 100 words are wrong"
            before = scores.get({"eval": "zero_shot_wer", "test": "untouched_test_wer"}[role])
            if isinstance(before, int | float):
                sentence += f" (before training {before:.1f})"
            sentence += f", measured on {int(scores.get(f'{role}_num_rows', 0)):,} recordings"
            break
    return f"{title}\n\n{sentence}. Record or choose a file, and press Transcribe."


def plain(text: str) -> str:
    """Somebody's words within Markdown."""
    return html.escape(re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split())), quote=False)


def examples_of(name: str, folder: Path) -> list[list[str]]:
    """[file, what is said] of a few evaluation clips that the model's report.html has, the easiest
    first; written to `folder`."""
    report = Path(name) / "report.html"
    try:
        page = report.read_text(encoding="utf-8")
        (text,) = re.findall(
            r'<script type="application/json" id="tables">(.*?)</script>', page, re.S
        )
        found = []
        for place, clip in json.loads(text)[0]["clips"].items():
            row = json.loads(text)[0]["rows"][int(place)]
            if clip["audio"] and row[3] is not None:
                found.append((row[3], row[8] or row[5], clip["audio"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return []
    examples = []
    for number, (_, said, audio) in enumerate(sorted(found)[:NUM_EXAMPLES], 1):
        path = folder / f"example-{number}.mp3"
        path.write_bytes(base64.b64decode(audio))
        examples.append([str(path), said])
    return examples


# -------------------------------------------------------------------------------------- page ----
def clock(seconds: float) -> str:
    """61.25 s as 1:01.2."""
    tenths = int(10 * seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def segments_as_html(segments: list[Segment], other: str | None = None) -> str:
    """One paragraph for each segment: a button that plays it, and its words. other: the other
    model's text; what it has not is marked."""
    marks = marked_words(" ".join(text for _, _, text in segments), other)
    row = (
        '<p dir="auto"><button class="segment" style="font-size:.8em;padding:.1em .4em;font-weight:400" '
        'data-start="{}" onclick="{}"><u>{} - {}</u></button> {}</p>'
    )
    rows = []
    for start, end, text in segments:
        words = []
        for word in text.split():
            escaped = html.escape(word)
            words.append(f"<mark>{escaped}</mark>" if next(marks) else escaped)
        rows.append(row.format(start, PLAY, clock(start), clock(end), " ".join(words)))
    return "".join(rows)


def marked_words(text: str, other: str | None) -> Iterator[bool]:
    """Of each word, whether the other text has another one in its place, or none."""
    words = text.split()
    if other is None:
        return iter([False] * len(words))
    operations = difflib.SequenceMatcher(
        None, [bare(word) for word in other.split()], [bare(word) for word in words], autojunk=False
    ).get_opcodes()
    marks = []
    for kind, _, _, first, last in operations:
        marks += [kind != "equal"] * (last - first)
    return iter(marks)


def bare(word: str) -> str:
    """Capitals and punctuation are no difference."""
    return re.sub(r"^\W+|\W+$", "", word.lower()) or word


def answer(
    recognisers: list[Recogniser], path: str | None, language: str, task: str, said: str
) -> list[Any]:
    """What the page shows for a clip: a message, then for each model its transcript, a line about
    it, its segments and two files."""
    num_outputs = len(recognisers) * OUTPUTS_PER_MODEL
    try:
        waveform = read_audio(path)
        found = [hear(recogniser, waveform, language, task) for recogniser in recognisers]
    except UserError as error:
        return [plain(str(error)), *nothing(num_outputs)]
    except torch.OutOfMemoryError:
        message = "Not enough GPU memory for this clip: choose a shorter one."
        return [message, *nothing(num_outputs)]
    shown: list[Any] = [""]
    for number, transcript in enumerate(found):
        others = [each.text for place, each in enumerate(found) if place != number]
        other = others[0] if others else None
        notes = [describe(transcript), compare(said, transcript)]
        shown += [
            "\n".join(text for _, _, text in transcript.segments),
            "  \n".join(note for note in notes if note),
            segments_as_html(transcript.segments, other),
            *files_of(transcript, Path(str(path)).stem),
        ]
    return shown


def nothing(number: int) -> list[Any]:
    """What clears so many outputs."""
    return [None if place % OUTPUTS_PER_MODEL > 2 else "" for place in range(number)]


def files_of(transcript: Transcript, stem: str) -> list[str | None]:
    """The transcript as .txt and .srt, to be downloaded."""
    if not transcript.segments:
        return [None, None]
    folder = Path(tempfile.mkdtemp(prefix="whisper-demo-"))
    paths = []
    for suffix, text in ((".txt", as_text(transcript)), (".srt", as_srt(transcript))):
        path = folder / f"{stem}{suffix}"
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


def build_page(recognisers: list[Recogniser], folder: Path) -> Any:
    """The gradio.Blocks; what can be chosen is what the first model has. folder: for examples."""
    import gradio  # here, because it is optional and slow to import

    first = recognisers[0]
    names = [("find out by itself", DETECT)]
    names += [(f"{LANGUAGES.get(code, code).title()} ({code})", code) for code in first.languages]
    tasks = [(TASKS[task], task) for task in first.tasks or ["transcribe"] if task in TASKS]
    base = recognisers[1].name if len(recognisers) > 1 else base_model_of(first.name)
    examples = examples_of(first.name, folder)
    # Uploads and recordings are deleted when they are an hour old.
    with gradio.Blocks(
        title=f"{Path(first.name).name}: speech to text",
        analytics_enabled=False,
        delete_cache=(600, 3600),
    ) as page:
        gradio.Markdown(introduce(first, base), elem_id="title")
        audio = gradio.Audio(
            sources=["upload", "microphone"],
            type="filepath",
            label="Speech",
            elem_id="speech",
            buttons=["download"],  # not the one that shares a recording with the world
            waveform_options=gradio.WaveformOptions(show_recording_waveform=False),
        )
        with gradio.Row():
            language = gradio.Dropdown(
                names,
                value=default_language(first),
                label="Spoken language",
                visible=bool(first.languages),
            )
            task = gradio.Radio(
                tasks, value="transcribe", label="Write", visible=len(first.tasks) > 1
            )
        said = gradio.Textbox(
            label="What was really said (if you type it, wrong words are counted)",
            elem_id="said",
            lines=1,
        )
        if examples:
            gradio.Examples(
                examples, [audio, said], label="Recordings to try, not used in training"
            )
        button = gradio.Button("Transcribe", variant="primary", elem_id="transcribe")
        outputs = [gradio.Markdown(elem_id="message")]
        with gradio.Row():
            for index, recogniser in enumerate(recognisers):
                with gradio.Column(elem_id=f"model-{index}"):
                    outputs += model_outputs(gradio, recogniser, is_base=index > 0)
        # A new clip must not stand beside the old one's words.
        audio.change(partial(nothing_at_all, len(recognisers)), outputs=outputs)
        button.click(partial(answer, recognisers), [audio, language, task, said], outputs)
    return page


def nothing_at_all(num_models: int) -> list[Any]:
    return ["", *nothing(num_models * OUTPUTS_PER_MODEL)]


def model_outputs(gradio: Any, recogniser: Recogniser, *, is_base: bool) -> list[Any]:
    """Where one model's answer stands: text, a line about it, segments, two files."""
    name = Path(recogniser.name).name
    label = f"{name}, before training" if is_base else name
    outputs = [gradio.Textbox(label=label, lines=3, buttons=["copy"], interactive=False)]
    outputs += [gradio.Markdown(), gradio.HTML()]
    with gradio.Row():
        for kind in ("text", "subtitles"):
            outputs.append(gradio.DownloadButton(f"Download as {kind}", size="sm"))
    return outputs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "name",
        metavar="MODEL",
        nargs="?",
        help="fine-tuned Whisper: the --output_dir of training or a Hub id",
    )
    parser.add_argument("--model", help="the same, with a flag")
    parser.add_argument(
        "--base_model", help="shown beside it; default: what the model's card names; none: nothing"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="a public address as well, through gradio's servers"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Loads the models and serves the page until Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    model = args.model or args.name
    if model is None:
        parser.error("which model? Name the --output_dir of a training, or a Hub id")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # it tries five times and says so five times
    try:
        if importlib.util.find_spec("gradio") is None:
            raise UserError(
                "gradio is not installed. Next: python -m pip install -r requirements-demo.txt"
            )
        with tempfile.TemporaryDirectory(prefix="whisper-demo-") as folder:
            page = build_page(load_recognisers(model, args.base_model), Path(folder))
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
