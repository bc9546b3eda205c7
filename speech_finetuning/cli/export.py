"""A saved model for other programs: `bash run.sh export MODEL --to ctranslate2|ggml`."""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.files import printable
from speech_finetuning.cli.flags import OneLineErrors

COMMAND = "bash run.sh export"
SUFFIXES = {"ctranslate2": "-ct2", "ggml": "-ggml"}
QUANTIZATIONS = ("float32", "float16", "bfloat16", "int8", "int8_float16", "int8_float32")
# Without the second faster-whisper assumes 80 mel bins; large-v3 and turbo have 128.
COPIED_FILES = ["tokenizer.json", "preprocessor_config.json"]
# What whisper.cpp's converter reads, beside two files that transformers 5 no longer writes.
FILES_FOR_GGML = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors*")
WHISPER_CPP_STEPS = """\
git clone https://github.com/openai/whisper && git clone https://github.com/ggml-org/whisper.cpp
python whisper.cpp/models/convert-h5-to-ggml.py {folder} whisper .
cmake -S whisper.cpp -B whisper.cpp/build && cmake --build whisper.cpp/build --target whisper-cli
whisper.cpp/build/bin/whisper-cli --model ggml-model.bin --language {language} --no-timestamps --file speech.wav
"""


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog=COMMAND, description="Converts a model for other programs.", allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="the --output_dir of training, or a Hub id")
    parser.add_argument(
        "--to",
        choices=list(SUFFIXES),
        required=True,
        help="ctranslate2: for faster-whisper; ggml: what whisper.cpp's converter needs",
    )
    parser.add_argument("--output_dir", type=Path, help="default: MODEL-ct2 or MODEL-ggml, here")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of ctranslate2; default: float16 (int8 halves the files again)",
    )
    return parser


def check(args: argparse.Namespace) -> Path:
    """The folder to write. Raises: UserError for what can be known before anything is loaded."""
    name = args.model.rstrip("/")
    folder = args.output_dir or Path(f"{Path(name).name}{SUFFIXES[args.to]}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder}: is there already. Choose another.")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"MODEL {name}: no folder with a config.json. Name a trained model's folder."
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
    import huggingface_hub

    patterns = [*FILES_FOR_GGML, *COPIED_FILES, "run_info.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these
        raise UserError(
            f"MODEL {name}: {one_line(error)[:500]} Next: name the --output_dir of a training, or, "
            "if the model is private: hf auth login"
        ) from error


def to_ctranslate2(model: Path, folder: Path, quantization: str | None) -> None:
    """Writes a folder that faster-whisper loads. Raises: UserError."""
    import ctranslate2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    missing = [name for name in COPIED_FILES if not (model / name).is_file()]
    if missing:
        raise UserError(
            f"MODEL {model} lacks {', '.join(missing)}, which faster-whisper reads. Copy it from the "
            "model that it was fine-tuned from."
        )
    converter = ctranslate2.converters.TransformersConverter(str(model), copy_files=COPIED_FILES)
    try:
        converter.convert(str(folder), quantization=quantization or "float16", force=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"MODEL {model}: {type(error).__name__}: {one_line(error)[:500]}"
        ) from error


def to_ggml(model: Path, folder: Path, quantization: str | None) -> None:
    """Writes the model's files, and the two that transformers 5 no longer saves, for whisper.cpp's
    own converter. Raises: UserError."""
    folder.mkdir(parents=True)
    for pattern in FILES_FOR_GGML:
        for path in sorted(model.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    try:
        tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"MODEL {model}: no usable tokenizer.json ({one_line(error)})") from error
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
        steps = WHISPER_CPP_STEPS.format(folder=folder, language=language or "auto")
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
    from speech_finetuning.model.recogniser import language_of_folder

    model = local_copy(args.model)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        WRITERS[args.to](model, unfinished, args.quantization)
        text = next_steps(args.to, folder, language_of_folder(model))
        (unfinished / "README.md").write_text(text, encoding="utf-8")
        with contextlib.suppress(OSError):
            folder.rmdir()  # an empty one
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return text


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for what the user can fix."""
    try:
        args = make_parser().parse_args(argv)
        folder = check(args)
        steps = export(args, folder)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2
    sys.stdout.write(f"written: {folder}\n\n{steps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
