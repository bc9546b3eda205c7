"""Audio files to text or subtitles with a trained model: `bash run.sh transcribe MODEL FILE...`.

What can be refused is refused before torch is imported. One file that cannot be read does not cost
the others: it is told on stderr, and the exit code is 1.
"""

import argparse
import functools
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speech_finetuning.base.errors import Problems, UserError, memory_that_is_out
from speech_finetuning.base.files import counted, json_line, printable, replace_text
from speech_finetuning.cli.flags import OneLineErrors
from speech_finetuning.cli.terminal import fitted, say_starting

if TYPE_CHECKING:
    import numpy as np

    from speech_finetuning.model.prompting import Prompt
    from speech_finetuning.model.recogniser import Recogniser
    from speech_finetuning.model.transcription import Transcript

COMMAND = "bash run.sh transcribe"
# Of files in a folder; a file that is named is tried whatever its name.
AUDIO_SUFFIXES = frozenset(
    """
    .wav .flac .mp3 .ogg .opus .m4a .aac .wma .amr .aif .aiff .au .caf .oga .mp4 .m4b .mov .mkv .webm
    .3gp
    """.split()
)
SUFFIXES = {"text": ".txt", "srt": ".srt", "vtt": ".vtt", "json": ".json"}
CODE_OF_UNREAD_FILES = 1


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A file to transcribe. target: what is written, None for the terminal."""

    path: Path
    target: Path | None


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog=COMMAND,
        description="Transcribes audio files with a trained model.",
        epilog=f"Example: {COMMAND} whisper-small-es talk.mp3 --format srt --output_dir subtitles",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="the --output_dir of training, or a Hub id")
    parser.add_argument("files", metavar="FILE", nargs="+", help="audio files, or folders of them")
    parser.add_argument("--format", choices=list(SUFFIXES), default="text", help="default: text")
    parser.add_argument("--output_dir", type=Path, help="folder to write to; default: the terminal")
    parser.add_argument(
        "--overwrite", action="store_true", help="write transcripts anew that are there already"
    )
    parser.add_argument("--language", help="default: the model's own; detect: in each file")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="names and terms that may be spoken, for models that were trained with prompts",
    )
    parser.add_argument(
        "--task",
        choices=["transcribe", "translate"],
        default="transcribe",
        help="translate: into English",
    )
    parser.add_argument(
        "--batch_size", type=int, help="windows of 30 s at a time; default: 16 on a GPU, else 4"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    return parser


# ------------------------------------------------------------------------------- what to read ----
def is_address(name: str) -> bool:
    return "://" in name


def files_of(name: str) -> list[tuple[Path, Path]]:
    """(file, its name below --output_dir) of an argument; of a folder all its audio files, hidden
    ones left out. Raises: UserError."""
    if is_address(name):
        raise UserError(f"{name}: addresses are not opened. Download the file, and name that.")
    path = Path(name)
    if path.is_file():
        return [(path, Path(path.name))]
    if not path.is_dir():
        from speech_finetuning.data.dataset_names import what_is_there  # a second

        place = name if os.sep in name else f"./{name}"
        raise UserError(f"{name}: there is no such file or folder. {what_is_there(place)}")
    found = []
    for file in sorted(path.rglob("*")):
        place = file.relative_to(path)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if file.is_file() and not is_hidden and file.suffix.lower() in AUDIO_SUFFIXES:
            found.append((file, place))
    if not found:
        known = ", ".join(sorted(AUDIO_SUFFIXES))
        raise UserError(f"{name}: no audio file in this folder. They end in {known}.")
    return found


def plan(args: argparse.Namespace) -> list[Recording]:
    """What is read, and where each transcript goes. Raises: UserError with all that is wrong."""
    problems = Problems()
    found: list[tuple[Path, Path]] = []
    for name in args.files:
        found += problems.attempt(name, files_of, name) or []
    if args.batch_size is not None and args.batch_size < 1:
        problems.messages["--batch_size", ""] = "--batch_size must be at least 1."
    if args.prompt is not None and not args.prompt.strip():
        problems.messages["--prompt", ""] = "--prompt is empty. Write a text, or leave it out."
    if args.output_dir is not None and args.output_dir.exists() and not args.output_dir.is_dir():
        problems.messages["--output_dir", ""] = f"--output_dir {args.output_dir}: is a file."
    problems.raise_if_any()
    if args.output_dir is None:
        if len(found) > 1 and args.format in ("srt", "vtt"):
            raise UserError(
                f"--format {args.format} of {len(found)} files: pass --output_dir FOLDER."
            )
        return [Recording(path=path, target=None) for path, _ in found]
    targets = target_names([place for _, place in found], SUFFIXES[args.format])
    recordings = [
        Recording(path=path, target=args.output_dir / target)
        for (path, _), target in zip(found, targets, strict=True)
    ]
    return recordings if args.overwrite else without_those_that_are_there(recordings)


def without_those_that_are_there(recordings: list[Recording]) -> list[Recording]:
    """A file that is there may have been corrected by hand, and is kept: a second start goes on
    with the rest."""
    missing = [entry for entry in recordings if not os.path.lexists(entry.target or "")]
    num_kept = len(recordings) - len(missing)
    if num_kept:
        first = next(entry.target for entry in recordings if entry not in missing)
        tell(
            f"kept: transcripts that are there already, {num_kept} of {len(recordings)}, the first is "
            f"{first}. To write them anew: --overwrite"
        )
    return missing


def target_names(places: list[Path], suffix: str) -> list[Path]:
    """talk.txt of talk.mp3; talk.mp3.txt where there is a talk.wav as well. Raises: UserError if two
    files have the same name all the same."""
    counts = Counter(place.with_suffix(suffix) for place in places)
    targets = []
    for place in places:
        short = place.with_suffix(suffix)
        targets.append(short if counts[short] == 1 else place.with_name(place.name + suffix))
    twice = [str(target) for target, count in Counter(targets).items() if count > 1]
    if twice:
        raise UserError(f"several files would be written to {twice[0]}. Transcribe them in turn.")
    return targets


# ------------------------------------------------------------------------------- what is heard ---
def transcribe_all(
    recogniser: "Recogniser", recordings: list[Recording], args: argparse.Namespace
) -> int:
    """Reads, transcribes and writes, as many files together as fill a batch. Returns the number of
    files that could not be read. Raises: UserError."""
    batch_size = args.batch_size or (16 if recogniser.model.device.type == "cuda" else 4)
    prompt = None if args.prompt is None else prompt_as_told(recogniser, args.prompt)
    transcriber = Transcriber(recogniser, args.language, args.task, batch_size, prompt)
    reader = Reader(recordings)
    has_windows = False
    for group in reader.groups(recogniser.window_in_samples * batch_size):
        transcripts = transcriber.transcribe([waveform for _, waveform in group])
        for (recording, waveform), transcript in zip(group, transcripts, strict=True):
            deliver(recording, waveform, transcript, args.format, is_alone=len(recordings) == 1)
            has_windows |= not transcript.has_model_times
    if has_windows and args.format in ("srt", "vtt"):
        tell("note: the model predicts no timestamps; a cue is a window, cut at a pause.")
    return reader.num_unread


def prompt_as_told(recogniser: "Recogniser", text: str) -> "Prompt":
    """The prompt as the model reads it, after what there is to say of it. Raises: UserError."""
    from speech_finetuning.model.prompting import notes_on, prepare_prompt

    prompt = prepare_prompt(recogniser, text)
    for note in notes_on(recogniser, prompt):
        tell(f"note: {note}.")
    return prompt


class Transcriber:
    """The model, with as many windows at a time as memory has room for."""

    def __init__(
        self,
        recogniser: "Recogniser",
        language: str | None,
        task: str,
        batch_size: int,
        prompt: "Prompt | None" = None,
    ) -> None:
        """language: as it was asked for. Raises: UserError for one that the model has not."""
        from speech_finetuning.model.recogniser import chosen_language

        self.recogniser = recogniser
        self.language = chosen_language(recogniser, language)
        self.task = task
        self.batch_size = batch_size
        self.prompt_ids = [] if prompt is None else prompt.ids

    def transcribe(self, waveforms: "list[np.ndarray]") -> "list[Transcript]":
        """(n_samples,) at 16 kHz each; out of memory, again with half the batch, as models are
        scored. Raises: UserError if there is no room for a single window."""
        from speech_finetuning.model.transcription import transcribe

        while True:
            try:
                return transcribe(
                    self.recogniser,
                    waveforms,
                    language=self.language,
                    task=self.task,
                    batch_size=self.batch_size,
                    prompt_ids=self.prompt_ids,
                )
            except (RuntimeError, MemoryError) as error:
                self.take_less(error)

    def take_less(self, error: Exception) -> None:
        """Halves the batch. Raises: the error if it is another one; UserError at the end."""
        import torch

        from speech_finetuning.model.recogniser import less_memory

        kind = memory_that_is_out(error)
        if kind is None:
            raise error
        if self.batch_size == 1:
            advice = less_memory(self.recogniser.model.device.type)
            raise UserError(f"out of {kind} with one window at a time. {advice}") from error
        self.batch_size //= 2
        torch.cuda.empty_cache()  # does nothing on a CPU
        windows = counted(self.batch_size, "window")
        tell(f"note: out of {kind}: {windows} at a time (--batch_size).")


class Reader:
    """Reads files in order, and counts those that cannot be read."""

    def __init__(self, recordings: list[Recording]) -> None:
        self.recordings = recordings
        self.num_unread = 0

    def groups(self, num_samples: int) -> Iterator[list[tuple[Recording, "np.ndarray"]]]:
        """Files with their waveforms (n_samples,), as many as have num_samples together."""
        group: list[tuple[Recording, np.ndarray]] = []
        total = 0
        for recording in self.recordings:
            waveform = self.read(recording)
            if waveform is None:
                continue
            group.append((recording, waveform))
            total += len(waveform)
            if total >= num_samples:
                yield group
                group = []
                total = 0
        if group:
            yield group

    def read(self, recording: Recording) -> "np.ndarray | None":
        from speech_finetuning.data.long_audio import read_recording

        try:
            return read_recording(recording.path)
        except (UserError, OSError) as error:
            self.num_unread += 1
            tell(f"error: {recording.path}: {error}")
            return None


def deliver(
    recording: Recording,
    waveform: "np.ndarray",
    transcript: "Transcript",
    kind: str,
    *,
    is_alone: bool,
) -> None:
    """Writes a transcript to its file, or to the terminal. Raises: OSError."""
    from speech_finetuning.cli import subtitles
    from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ

    duration_in_seconds = len(waveform) / SAMPLE_RATE_IN_HZ
    writers: dict[str, Any] = {
        "text": subtitles.as_text,
        "srt": subtitles.as_srt,
        "vtt": subtitles.as_vtt,
        "json": functools.partial(subtitles.as_json, str(recording.path), duration_in_seconds),
    }
    if recording.target is not None:
        replace_text(recording.target, writers[kind](transcript))
        tell(f"{recording.path}: {recording.target}")
    elif kind == "json" and not is_alone:  # JSON lines
        record = subtitles.as_record(str(recording.path), duration_in_seconds, transcript)
        show(json_line(record))
    elif kind == "text" and not is_alone:
        show(f"{printable(str(recording.path))}: {printable(transcript.text)}\n")
    else:
        show("".join(f"{printable(line)}\n" for line in writers[kind](transcript).splitlines()))


def show(text: str) -> None:
    """To stdout, at once: a pipe may be read while the next file is transcribed."""
    sys.stdout.write(text)
    sys.stdout.flush()


def tell(text: str) -> None:
    """To stderr: on one line, or on a terminal cut between words."""
    sys.stderr.write("".join(f"{piece}\n" for piece in fitted(printable(text))))


def run(args: argparse.Namespace, recordings: list[Recording]) -> int:
    """Loads the model and transcribes. Returns the exit code. Raises: UserError."""
    say_starting()
    import huggingface_hub
    import torch
    import transformers

    from speech_finetuning.model.languages import check_is_language
    from speech_finetuning.model.recogniser import DETECT, load_recogniser

    if args.language not in (None, DETECT):
        check_is_language(args.language)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is usable here. Leave out --device.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    recogniser = load_recogniser("MODEL", args.model, args.device)
    num_unread = transcribe_all(recogniser, recordings, args)
    if num_unread:
        files = counted(len(recordings), "file")
        tell(f"error: {num_unread} of {files} could not be read.")
        return CODE_OF_UNREAD_FILES
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 if a file could not be read, 2 for what is wrong with the command."""
    parser = make_parser()
    try:
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
        args = parser.parse_args(argv)
        recordings = plan(args)
        return run(args, recordings) if recordings else 0
    except UserError as error:
        for message in error.args:
            first, *more = str(message).splitlines()
            tell(f"error: {first}")
            for line in more:
                tell(line)
    except BrokenPipeError:  # as of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written
        tell(f"error: {error}")
    except KeyboardInterrupt:
        tell("stopped by Ctrl-C.")
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
