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
import html
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from operator import itemgetter
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
import transformers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from speech_finetuning.base.errors import UserError, memory_that_is_out
from speech_finetuning.cli.flags import OneLineErrors
from speech_finetuning.cli.subtitles import as_srt, as_text
from speech_finetuning.cli.terminal import fitted
from speech_finetuning.data.long_audio import read_recording
from speech_finetuning.model.prompting import (
    UNTRAINED,
    notes_on,
    prepare_prompt,
    reads_prompts,
    rules_of_run,
)
from speech_finetuning.model.recogniser import (
    DETECT,
    Recogniser,
    default_language,
    load_recogniser,
)
from speech_finetuning.model.transcription import Segment, Transcript, transcribe
from speech_finetuning.scoring.alignment import WORD, unit_of_language
from speech_finetuning.scoring.differences import (
    count_mistakes,
    mark_differences,
    split_for_marking,
)
from speech_finetuning.sharing.public import LOCAL_MODEL

# Plays the clip from the time that the button carries, in the player above.
PLAY = (
    "const player = document.querySelector('#speech audio'); "
    "player.currentTime = this.dataset.start; player.play()"
)
NAME_OF_PROMPT = "What may come up"  # on the page
TASKS = {"transcribe": "what is said", "translate": "an English translation"}
NAMES_THAT_SAY_NOTHING = r"output|model|final|best|checkpoint-\d+"  # of folders
NUM_EXAMPLES = 4
OUTPUTS_PER_MODEL = 5  # text, a line about it, segments, two files
FIRST_PORT = 7860
LAST_PORT = 7959
# Long enough for a download to begin; Gradio has a copy of its own by then.
MAX_AGE_OF_FILES_IN_SECONDS = 600
# Readable on a light and on a dark page.
STYLE = """
mark {background: #ffb30047; color: inherit; border-bottom: 2px solid #e69500}
.gradio-container {--block-info-text-color: var(--body-text-color)}
"""

MarkedPiece = tuple[str, bool]  # a word as written with the space behind it; whether it is marked


# ------------------------------------------------------------------------------------ models ----
def load(flag: str, name: str) -> Recogniser:
    """The checkpoint, after a line on the terminal. Raises: UserError."""
    print(f"loading {name} ...")
    return load_recogniser(flag, name)


def tell(line: str) -> None:
    """On stderr, cut between words where that is a terminal."""
    for piece in fitted(line):
        print(piece, file=sys.stderr)


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
        tell(f"note: the base model of {name} is not known ({type(error).__name__})")
    base = base[0] if isinstance(base, list) else base
    return None if base == LOCAL_MODEL else base


def load_other(model: str, asked: str | None, base: str | None) -> list[Recogniser]:
    """The model that this one is compared with, if one is given or known.

    asked: --base_model; base: what the model was trained from, if that is known. Raises: UserError,
    but not for a base model that nobody asked for: that is left out with a line on stderr.
    """
    other = asked or base
    if other in (None, "none", model):
        return []
    try:
        return [load("--base_model", other)]
    except UserError as error:
        if asked:
            raise
        tell(f"note: shown without the base model. {error}")
        return []


# ------------------------------------------------------------------------------ transcription ----
def read_audio(path: str | None) -> Any:
    """A file as (n_samples,) float32, mono, 16 kHz. Raises: UserError if there is none, or nothing
    to hear in it."""
    if not path:
        raise UserError(
            "No audio yet: choose a file, or press Record and Stop; then press Transcribe again."
        )
    return read_recording(path)


def hear(
    recogniser: Recogniser, waveform: Any, language: str, task: str, prompt: str = ""
) -> Transcript:
    """The words of (n_samples,) at 16 kHz. prompt: what the model reads before it listens.
    Raises: UserError for one that is no text."""
    ids = prepare_prompt(recogniser, prompt, NAME_OF_PROMPT).ids if prompt.strip() else []
    (found,) = transcribe(recogniser, [waveform], language=language, task=task, prompt_ids=ids)
    return found


def describe_prompt(recogniser: Recogniser, prompt: str) -> str:
    """What there is to say of a prompt; empty if there is nothing."""
    if not prompt.strip():
        return ""
    notes = notes_on(recogniser, prepare_prompt(recogniser, prompt, NAME_OF_PROMPT))
    return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)


def describe(found: Transcript) -> str:
    """One line about how the words were found."""
    language = LANGUAGES.get(found.language, found.language).title()
    if not found.segments:
        return f"No words heard ({language})."
    if found.has_model_times:
        return f"{language}. Click a time to hear it."
    return f"{language}, in pieces cut at pauses. Click a time to hear it."


def compare(said: str, found: Transcript, recogniser: Recogniser) -> str:
    """How many mistakes there are, by what was really said; empty if nobody has typed that."""
    tokenizer: Any = recogniser.processor.tokenizer
    counts = count_mistakes(said, found.text, found.language, tokenizer)
    if counts is None:
        return ""
    unit = unit_of_language(found.language)
    mistakes = {0: "No mistakes", 1: "1 mistake"}.get(
        counts.num_errors, f"{counts.num_errors} mistakes"
    )
    number = counts.num_reference_words
    kinds = {
        "wrong": counts.substitutions,
        "missing": counts.deletions,
        "too many": counts.insertions,
    }
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return (
        f"**{mistakes} in {number} {unit if number == 1 else unit + 's'}**"
        f"{told and ': ' + told} ({unit} error rate {counts.wer:.1f} %)"
    )


# ------------------------------------------------------------------------- what the folder tells ----
def read_record(path: Path) -> dict[str, Any]:
    """A JSON file of the model's folder; {} if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def shown_name(model: str) -> str:
    """What the page calls a model: the last part of a repository's or folder's name, or, where that
    says nothing, the last two."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    if len(path.parts) > 1 and re.fullmatch(NAMES_THAT_SAY_NOTHING, path.name):
        return f"{path.parent.name}/{path.name}"
    return path.name


def is_same_model(one: str, other: str | None) -> bool:
    """Also if one names a folder in another way than the other."""
    if other is not None and Path(one).is_dir() and Path(other).is_dir():
        return Path(one).samefile(other)
    return one == other


def introduce(recogniser: Recogniser, base: str | None) -> str:
    """A title and a sentence or two, in Markdown: the model, its language, and how good it is.
    base: what it was trained from."""
    folder = Path(recogniser.name)
    name = shown_name(recogniser.name) if folder.is_dir() else recogniser.name
    language = default_language(recogniser)
    title = f"# {plain(name)}"
    if language != DETECT:
        title += f" · {LANGUAGES.get(language, language).title()}"
    sentence = "Speech to text"
    if base:
        sentence += f" by {plain(shown_name(base))}, trained further"
    if scores := describe_scores(read_record(folder / "all_results.json"), language):
        sentence += f": {scores}"
    return f"{title}\n\n{sentence}. Record or choose a file, and press Transcribe."


def describe_scores(scores: dict[str, Any], language: str) -> str:
    """'7.3 of 100 words are wrong (...)' of the test split or else of the evaluation; empty if they
    tell neither. Of languages that do not separate words, characters are counted."""
    unit = unit_of_language(language)
    rate = "wer" if unit == WORD else "cer"
    for role, untrained in (("test", "untouched_test"), ("eval", "zero_shot")):
        now = scores.get(f"{role}_{rate}")
        num_rows = scores.get(f"{role}_num_rows")
        if not isinstance(now, int | float) or not isinstance(num_rows, int | float):
            continue
        told = f"{now:.1f} of 100 {unit}s are wrong"
        if now > 100:
            told = f"{unit} error rate {now:.1f} %, as more {unit}s are added than were said"
        notes = []
        low, high = scores.get(f"{role}_{rate}_low"), scores.get(f"{role}_{rate}_high")
        if isinstance(low, int | float) and isinstance(high, int | float):
            notes.append(f"95 % interval {low:.1f} to {high:.1f}")
        before = scores.get(f"{untrained}_{rate}")
        if isinstance(before, int | float):
            notes.append(f"before training {before:.1f}")
        told += f" ({'; '.join(notes)})" if notes else ""
        return f"{told}, measured on {int(num_rows):,} recording{'s' if num_rows != 1 else ''}"
    return ""


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
    easiest = {said: audio for _, said, audio in sorted(found, reverse=True)}  # each text once
    examples = []
    for number, (said, audio) in enumerate([*easiest.items()][: -NUM_EXAMPLES - 1 : -1], 1):
        path = folder / f"example-{number}.mp3"
        path.write_bytes(base64.b64decode(audio))
        examples.append([str(path), said])
    return examples


# -------------------------------------------------------------------------------------- page ----
def clock(seconds: float) -> str:
    """61.25 s as 1:01.2."""
    tenths = int(10 * seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def segments_as_html(segments: list[Segment], marked: list[list[MarkedPiece]]) -> str:
    """One paragraph for each segment: a button that plays it, and its words. marked: of each
    segment, see `marked_segments`."""
    row = (
        '<p dir="auto" style="overflow-wrap:anywhere"><button class="segment" '
        'style="font-size:.8em;padding:.1em .4em;font-weight:400" '
        'data-start="{}" onclick="{}"><u>{} - {}</u></button> {}</p>'
    )
    rows = []
    for (start, end, _), words in zip(segments, marked, strict=True):
        rows.append(row.format(start, PLAY, clock(start), clock(end), words_as_html(words)))
    return "".join(rows)


def words_as_html(marked: list[MarkedPiece]) -> str:
    """Neighbours that are marked share one mark."""
    runs = []
    for is_marked, run in itertools.groupby(marked, key=itemgetter(1)):
        text = "".join(piece for piece, _ in run)
        words = html.escape(text.rstrip())
        space = text[len(text.rstrip()) :]
        runs.append(f"<mark>{words}</mark>{space}" if is_marked else f"{words}{space}")
    return "".join(runs).rstrip()


def marked_segments(
    transcript: Transcript, others: list[Transcript], recogniser: Recogniser, task: str
) -> list[list[MarkedPiece]]:
    """The words of each segment as written, and of each whether the other model, if there is one,
    has another one there."""
    language = "en" if task == "translate" else transcript.language
    tokenizer: Any = recogniser.processor.tokenizer
    segments = [split_for_marking(text, language) for _, _, text in transcript.segments]
    pieces = [piece for segment in segments for piece in segment]
    marks = [False] * len(pieces)
    for other in others:
        theirs = split_for_marking(other.text, language)
        marks = mark_differences(pieces, theirs, language, tokenizer)
    marked = iter(zip(pieces, marks, strict=True))
    return [list(itertools.islice(marked, len(segment))) for segment in segments]


def answer(
    recognisers: list[Recogniser],
    folder: Path,
    path: str | None,
    language: str,
    task: str,
    said: str,
    *,
    prompt: str = "",
) -> list[Any]:
    """What the page shows for a clip: a message, then for each model its transcript, a line about
    it, its segments and two files, which lie below `folder`. said: what was said, if somebody has
    typed it; prompt: what the models read before they listen."""
    num_outputs = len(recognisers) * OUTPUTS_PER_MODEL
    try:
        waveform = read_audio(path)
        found = [hear(each, waveform, language, task, prompt) for each in recognisers]
    except UserError as error:
        return [plain(str(error)), *nothing(num_outputs)]
    except Exception as error:
        kind = memory_that_is_out(error)
        if kind is None:
            raise
        return [f"Not enough {kind} for this clip: choose a shorter one.", *nothing(num_outputs)]
    shown: list[Any] = [describe_prompt(recognisers[0], prompt)]
    for recogniser, transcript in zip(recognisers, found, strict=True):
        others = [each for each in found if each is not transcript]
        marked = marked_segments(transcript, others, recogniser, task)
        notes = [describe(transcript)]
        if any(is_marked for words in marked for _, is_marked in words):
            notes.append("Marked is what the other model heard differently.")
        if task != "translate":  # what was said is in another language
            notes.append(compare(said, transcript, recogniser))
        shown += [
            "\n".join(text for _, _, text in transcript.segments),
            "  \n".join(note for note in notes if note),
            segments_as_html(transcript.segments, marked),
            *files_of(transcript, Path(str(path)).stem, folder),
        ]
    return shown


def nothing(number: int) -> list[Any]:
    """What clears so many outputs."""
    return [None if place % OUTPUTS_PER_MODEL > 2 else "" for place in range(number)]


def files_of(transcript: Transcript, stem: str, folder: Path) -> list[str | None]:
    """The transcript as .txt and .srt below `folder`, to be downloaded. Those of earlier clips are
    deleted after a while."""
    oldest = time.time() - MAX_AGE_OF_FILES_IN_SECONDS
    for earlier in folder.glob("transcript-*"):
        if earlier.stat().st_mtime < oldest:
            shutil.rmtree(earlier, ignore_errors=True)
    if not transcript.segments:
        return [None, None]
    own = Path(tempfile.mkdtemp(prefix="transcript-", dir=folder))
    paths = []
    for suffix, text in ((".txt", as_text(transcript)), (".srt", as_srt(transcript))):
        path = own / f"{stem}{suffix}"
        path.write_text(text, encoding="utf-8")
        paths.append(str(path))
    return paths


def build_page(recognisers: list[Recogniser], base: str | None, folder: Path) -> Any:
    """The gradio.Blocks; what can be chosen is what the first model has.

    base: what it was trained from; folder: for examples and transcripts.
    """
    import gradio  # here, because it is optional and slow to import

    first = recognisers[0]
    # Uploads and recordings are deleted when they are an hour old.
    with gradio.Blocks(
        title=f"{shown_name(first.name)}: speech to text",
        analytics_enabled=False,
        delete_cache=(600, 3600),
    ) as page:
        gradio.Markdown(introduce(first, base), elem_id="title")
        inputs = page_inputs(gradio, first)
        audio, _, _, said, _ = inputs
        if examples := examples_of(first.name, folder):
            gradio.Examples(
                examples, [audio, said], label="Recordings to try, not used in training"
            )
        button = gradio.Button("Transcribe", variant="primary", elem_id="transcribe")
        outputs = [gradio.Markdown(elem_id="message")]
        with gradio.Row():
            for index, recogniser in enumerate(recognisers):
                with gradio.Column(elem_id=f"model-{index}"):
                    is_base = index > 0 and is_same_model(recogniser.name, base)
                    outputs += model_outputs(gradio, recogniser, is_base=is_base)
        # A new clip must not stand beside the old one's words, and what was said in that one.
        cleared = partial(nothing_at_all, gradio, len(recognisers))
        audio.change(cleared, outputs=outputs)
        gradio.on([audio.upload, audio.stop_recording], js="() => ''", outputs=said)
        button.click(partial(answer_page, gradio, recognisers, folder), inputs, outputs)
    return page


def page_inputs(gradio: Any, first: Recogniser) -> list[Any]:
    """The clip, its language, the task, what was said, and the prompt. first: the model that is
    shown."""
    names = [("find out by itself", DETECT)]
    names += [(f"{LANGUAGES.get(code, code).title()} ({code})", code) for code in first.languages]
    tasks = [(TASKS[task], task) for task in first.tasks or ["transcribe"] if task in TASKS]
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
        task = gradio.Radio(tasks, value="transcribe", label="Write", visible=len(first.tasks) > 1)
    said = gradio.Textbox(
        label="What was really said",
        info="If you type it, mistakes are counted.",
        elem_id="said",
        lines=1,
    )
    is_untrained = rules_of_run(Path(first.name)).was_trained is False
    prompt = gradio.Textbox(
        label=NAME_OF_PROMPT,
        info=f"Note: {UNTRAINED}." if is_untrained else "Names and terms, which it reads first.",
        elem_id="prompt",
        lines=1,
        visible=reads_prompts(first),
    )
    return [audio, language, task, said, prompt]


def model_outputs(gradio: Any, recogniser: Recogniser, *, is_base: bool) -> list[Any]:
    """Where one model's answer stands: text, a line about it, segments, two files."""
    name = shown_name(recogniser.name)
    label = f"{name}, before training" if is_base else name
    outputs = [gradio.Textbox(label=label, lines=3, buttons=["copy"], interactive=False)]
    outputs += [gradio.Markdown(), gradio.HTML()]
    with gradio.Row():
        for kind in ("text", "subtitles"):
            button = gradio.DownloadButton(f"Download as {kind}", size="sm", interactive=False)
            outputs.append(button)
    return outputs


def answer_page(
    gradio: Any, recognisers: list[Recogniser], folder: Path, *values: Any
) -> list[Any]:
    """`answer`, as updates of the page."""
    *known, prompt = values
    return with_buttons(gradio, answer(recognisers, folder, *known, prompt=prompt))


def nothing_at_all(gradio: Any, num_models: int) -> list[Any]:
    """What clears the page."""
    return with_buttons(gradio, ["", *nothing(num_models * OUTPUTS_PER_MODEL)])


def with_buttons(gradio: Any, values: list[Any]) -> list[Any]:
    """Buttons without a file cannot be pressed. values: a message, then the outputs of each
    model."""
    message, *outputs = values
    updates = [message]
    for place, value in enumerate(outputs):
        is_file = place % OUTPUTS_PER_MODEL > 2
        update = gradio.DownloadButton(value=value, interactive=value is not None)
        updates.append(update if is_file else value)
    return updates


# ------------------------------------------------------------------------------ command line ----
def make_parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog="demo.py", description=" ".join(__doc__.split("\n\n")[0].split()), allow_abbrev=False
    )
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
    parser.add_argument(
        "--port", type=int, help=f"default: the first free one from {FIRST_PORT} on"
    )
    parser.add_argument(
        "--share", action="store_true", help="a public address as well, through gradio's servers"
    )
    return parser


def is_free(port: int) -> bool:
    """Whether a server may be started there. Raises: PermissionError."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            raise
        except OSError:
            return False
    return True


def choose_port(asked: int | None) -> int:
    """The port that was asked for, or the first free one. Raises: UserError, with one that is
    free."""
    free = next(filter(is_free, range(FIRST_PORT, LAST_PORT + 1)), None)
    advice = f"Next: --port {free}" if free else "Next: --port with a free one"
    if asked is None:
        if free is None:
            raise UserError(f"--port: none of {FIRST_PORT} to {LAST_PORT} is free. {advice}")
        return free
    if not 1 <= asked <= 65535:
        raise UserError(f"--port {asked}: ports are numbers from 1 to 65535. {advice}")
    try:
        if is_free(asked):
            return asked
    except PermissionError as error:
        raise UserError(f"--port {asked}: only the administrator may use it. {advice}") from error
    raise UserError(
        f"--port {asked}: in use by another program, or by one that has just ended. {advice}"
    )


def serve(args: argparse.Namespace, model: str, port: int) -> None:
    """Loads the models and serves the page until Ctrl-C. Raises: UserError, OSError."""
    first = load("--model", model)
    base = base_model_of(model)
    recognisers = [first, *load_other(model, args.base_model, base)]
    with tempfile.TemporaryDirectory(
        prefix="whisper-demo-", ignore_cleanup_errors=True
    ) as temporary:
        folder = Path(temporary)
        os.environ.setdefault("GRADIO_TEMP_DIR", str(folder / "gradio"))  # what people said
        page = build_page(recognisers, base, folder)
        _, local_address, public_address = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=args.share,
            footer_links=[],
            css=STYLE,
            quiet=True,
            prevent_thread_lock=True,
        )
        for address in filter(None, (local_address, public_address)):
            print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def end(number: int, frame: Any) -> None:
    """SIGTERM ends the program as Ctrl-C does, with its temporary files."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Loads the models and serves the page until Ctrl-C. Returns the exit code."""
    try:
        args = make_parser().parse_args(argv)
        model = args.model or args.name
        if model is None:
            raise UserError("which model? Name the --output_dir of a training, or a Hub id.")
        if importlib.util.find_spec("gradio") is None:
            raise UserError(
                "gradio is not installed. Next: python -m pip install -r requirements-demo.txt"
            )
        port = choose_port(args.port)
        signal.signal(signal.SIGTERM, end)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        huggingface_hub.logging.set_verbosity_error()  # it tries five times and says so five times
        serve(args, model, port)
        return 0
    except UserError as error:
        tell(f"error: {error}")
    except OSError as error:  # a full disk; a port that was taken while the models were loaded
        tell(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
