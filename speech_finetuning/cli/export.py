"""A saved model for other programs: `bash run.sh export MODEL --to ctranslate2|ggml`."""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.files import printable
from speech_finetuning.cli.flags import OneLineErrors
from speech_finetuning.cli.terminal import fitted, say_starting, shown, typed
from speech_finetuning.data.dataset_names import what_is_there

COMMAND = "bash run.sh export"
SUFFIXES = {"ctranslate2": "-ct2", "ggml": "-ggml"}
QUANTIZATIONS = ("float32", "float16", "bfloat16", "int8", "int8_float16", "int8_float32")
# Without the second faster-whisper assumes 80 mel bins; large-v3 and turbo have 128.
COPIED_FILES = ["tokenizer.json", "preprocessor_config.json"]
# What whisper.cpp's converter reads, beside two files that transformers 5 no longer writes.
FILES_FOR_GGML = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors*")
# Of the Hub. Files of torch.save are fetched only where there is no safetensors.
FETCHED_FILES = (*FILES_FOR_GGML, "*.json", "merges.txt")
OLD_WEIGHTS = "pytorch_model*.bin*"
WHISPER_CPP_STEPS = """\
git clone https://github.com/openai/whisper && git clone https://github.com/ggml-org/whisper.cpp
python whisper.cpp/models/convert-h5-to-ggml.py {folder} whisper .
cmake -S whisper.cpp -B whisper.cpp/build && cmake --build whisper.cpp/build --target whisper-cli
whisper.cpp/build/bin/whisper-cli --model ggml-model.bin --language {language} --no-timestamps --file speech.wav
"""


def without_slash(name: str) -> str:
    """'out' of 'out/', as shells complete it."""
    return name.rstrip("/") or name


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog=COMMAND,
        description="Converts a model for other programs.",
        epilog=f"Example: {COMMAND} whisper-small-es --to ctranslate2",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=without_slash,
        help="the --output_dir of training, or a Hub id",
    )
    parser.add_argument(
        "--to",
        choices=list(SUFFIXES),
        required=True,
        help="ctranslate2: for faster-whisper; ggml: what whisper.cpp's converter needs",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="default: MODEL-ct2 or MODEL-ggml, in the current folder"
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        metavar="KIND",
        help=f"of ctranslate2: {', '.join(QUANTIZATIONS)}; default: float16 (int8 halves the files "
        "again)",
    )
    return parser


def usual_folder(model: Path, suffix: str) -> Path:
    """MODEL-ct2 in the current folder, or beside the model if that is the model's own: what lies in
    there is pushed with it."""
    whole = model.resolve()
    here = Path.cwd().resolve()
    beside = whole.parent if here.is_relative_to(whole) and model.is_dir() else Path()
    return beside / f"{whole.name if model.is_dir() else model.name}{suffix}"


def check(args: argparse.Namespace) -> Path:
    """The folder to write. Raises: UserError for what can be known before anything is loaded."""
    folder = args.output_dir or usual_folder(Path(args.model), SUFFIXES[args.to])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--output_dir {shown(folder)}: is there already. Next: --output_dir with another "
            "folder, or delete it."
        )
    if args.to == "ggml" and args.quantization is not None:
        raise UserError(
            "--quantization is of ctranslate2. whisper.cpp has a tool of its own for it."
        )
    if args.to == "ctranslate2" and importlib.util.find_spec("ctranslate2") is None:
        raise UserError(
            "ctranslate2 is not installed. Next: python -m pip install -r requirements-export.txt"
        )
    return folder


def local_copy(name: str) -> Path:
    """The folder of a model; one of the Hub is downloaded. Raises: UserError."""
    if Path(name).is_dir():
        return Path(name)
    if "/" not in name:  # no Whisper on the Hub is without an owner
        raise UserError(f"MODEL {name}: there is no such folder. {what_is_there(f'./{name}')}")
    import huggingface_hub

    try:
        fetched = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FETCHED_FILES]))
        if not any(fetched.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=OLD_WEIGHTS)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these
        raise UserError(
            f"MODEL {name}: {one_line(error)[:500]} Next: the --output_dir of a training as MODEL, "
            "or, if the model is private: hf auth login"
        ) from error
    return fetched


def language_of_usable_model(name: str, model: Path) -> str | None:
    """The code of the one language that a model was trained on; None if there are several.

    It is loaded whole, as the converters would not tell everything that is wrong with it: they copy
    damaged weights, and make up those that are missing. name: as typed. Raises: UserError.
    """
    from speech_finetuning.model.recogniser import DETECT, default_language, load_recogniser

    try:
        recogniser = load_recogniser("MODEL", str(model), "cpu")
    except UserError as error:
        raise UserError(str(error).replace(f"MODEL {model}:", f"MODEL {name}:", 1)) from error
    if not recogniser.languages:
        return "en"
    language = default_language(recogniser)
    return None if language == DETECT else language


def to_ctranslate2(model: Path, folder: Path, quantization: str | None) -> None:
    """Writes a folder that faster-whisper loads. Raises: UserError."""
    import ctranslate2

    missing = [name for name in COPIED_FILES if not (model / name).is_file()]
    if missing:
        raise UserError(
            f"MODEL {shown(model)} lacks {', '.join(missing)}, which faster-whisper reads. Copy it "
            "from the model that it was fine-tuned from."
        )
    try:
        converter = ctranslate2.converters.TransformersConverter(
            str(model), copy_files=COPIED_FILES
        )
        converter.convert(str(folder), quantization=quantization or "float16", force=True)
    except Exception as error:  # the model is sound, so that it is about what ctranslate2 can do
        raise UserError(
            f"MODEL {shown(model)}: ctranslate2 cannot convert it ({type(error).__name__}: "
            f"{one_line(error)[:500]})"
        ) from error


def to_ggml(model: Path, folder: Path, quantization: str | None) -> None:
    """Writes the model's files, and the two that transformers 5 no longer saves, for whisper.cpp's
    own converter. Raises: UserError."""
    folder.mkdir(parents=True)
    if not any(model.glob("*.safetensors")):
        from transformers import WhisperForConditionalGeneration

        WhisperForConditionalGeneration.from_pretrained(model).save_pretrained(folder)
    for pattern in FILES_FOR_GGML:
        for path in sorted(model.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    try:
        tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"MODEL {shown(model)}: no usable tokenizer.json ({type(error).__name__}: "
            f"{one_line(error)}) Copy it from the model that it was fine-tuned from."
        ) from error
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "added_tokens.json").write_text("{}", encoding="utf-8")


WRITERS: dict[str, Callable[[Path, Path, str | None], None]] = {
    "ctranslate2": to_ctranslate2,
    "ggml": to_ggml,
}


def next_steps(kind: str, folder: Path, language: str | None) -> str:
    """What to do with the folder, as a README.md."""
    from speech_finetuning.sharing.examples import WHY_PADDED, faster_whisper_example

    if kind == "ggml":
        steps = WHISPER_CPP_STEPS.format(folder=typed(folder), language=language or "auto")
        return (
            f"For whisper.cpp, whose own converter and program are run so:\n\n```bash\n{steps}```\n"
        )
    program = faster_whisper_example(str(folder), language)
    return (
        "For faster-whisper:\n\n```bash\npip install faster-whisper 'av<19'\n```\n\n"
        f"```python\n{program}```\n\n{WHY_PADDED}\n"
    )


def export(args: argparse.Namespace, folder: Path) -> str:
    """Writes the folder: whole or not there. Returns what to do with it. Raises: UserError,
    OSError."""
    model = local_copy(args.model)
    language = language_of_usable_model(args.model, model)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        WRITERS[args.to](model, unfinished, args.quantization)
        text = next_steps(args.to, folder, language)
        # A folder's name may hold bytes that are no characters.
        readme = text.encode("utf-8", errors="surrogateescape")
        (unfinished / "README.md").write_bytes(readme)
        with contextlib.suppress(OSError):
            folder.rmdir()  # an empty one
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return text


def quieten() -> None:
    """What is wrong is told in one line, by this program."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()


def end(number: int, frame: Any) -> None:
    """SIGTERM ends the program as Ctrl-C does: nothing half-written is left."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user can fix, 130 after Ctrl-C."""
    try:
        args = make_parser().parse_args(argv)
        folder = check(args)
        signal.signal(signal.SIGTERM, end)
        say_starting()
        quieten()
        steps = export(args, folder)
    except (UserError, OSError) as error:
        for line in fitted(f"error: {printable(str(error))}"):
            sys.stderr.write(f"{line}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C; nothing was written.\n")
        return 130
    text = f"written: {shown(folder)}\n\n{steps}"
    sys.stdout.write("".join(f"{printable(line)}\n" for line in text.splitlines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
