"""What --dataset_name names: a path is never asked of the Hub, but answered with what is there."""

import difflib
import itertools
import os
import re
from pathlib import Path

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.data.annotations import REMEDIES, advice_on, remedy_for
from speech_finetuning.data.places import AUDIO_SUFFIXES
from speech_finetuning.data.tables import TABLE_SUFFIXES

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TRANSCRIPT_SUFFIXES = (".srt", ".vtt")
ARCHIVE_SUFFIXES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Endings of file names, which no id of a data set has.
FILE_SUFFIXES = (
    *TABLE_SUFFIXES,
    *(".parquet", ".arrow", ".tar", ".txt"),
    *ARCHIVE_SUFFIXES,
    *REMEDIES,
    *TRANSCRIPT_SUFFIXES,
    *AUDIO_SUFFIXES,
)
# Data sets that have left the Hub, and their kin, whose clips are Common Voice's.
COMMON_VOICE = re.compile(r"(\w[\w-]*/)?(common_voice(_\d+_\d+)?|covost2)")
# As difflib counts it, from 0 to 1.
ALMOST_THE_SAME = 0.75
SIMILAR = 0.5
EMPTY_FOLDER = (
    "this folder holds no data. Put a list of your clips into it, as train.csv with the columns path "
    "and sentence, or parquet files, named train-*.parquet."
)
MAX_LOOKED_AT = 10_000  # files of a folder that holds no data
MAX_NAMES = 10  # of a folder, in a message
MAX_CONFIGURATIONS = 40  # in a message
# How `datasets` (5.2, builder.py) begins to say which configurations there are: a list in Python.
CONFIGURATIONS = re.compile(r"(?:Available: |available configs: )\[(.*?)\]")


def expanded(name: str) -> Path:
    """With the home folder in place of ~, as in a shell; of somebody unknown, as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def check_path_exists(name: str, flag: str = "--dataset_name") -> None:
    """Raises: UserError for a path that is neither a folder nor a list, unless it may be an id on
    the Hub. flag: which names it."""
    path = expanded(name)
    if "://" in name or path.is_dir():
        return
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise UserError(f"{flag} {name}: {remedy_for_file(path)}")
        return
    is_typing_error = "/" not in name and nearest_name(path, ALMOST_THE_SAME) is not None
    if is_path(name) or is_typing_error:
        raise UserError(f"{flag} {name}: does not exist. {what_is_there(name)}")


def check_recordings_exist(flag: str, name: str) -> None:
    """As `check_path_exists`, of noises or rooms: those on the Hub have an owner, so that a name
    without one is looked for here alone. flag: which names them. Raises: UserError."""
    check_path_exists(name, flag)
    if "/" not in name and not expanded(name).exists():
        raise UserError(f"{flag} {name}: does not exist. {what_is_there(name)}")


def is_path(name: str) -> bool:
    """Whether a name that does not exist here is meant as a path all the same."""
    if HUB_ID.fullmatch(name) is None or name.startswith("."):
        return True
    path = Path(name)
    # A folder may well be called as an owner on the Hub; a version there ends in a digit.
    is_file_beside_others = "/" in name and path.parent.is_dir() and path.suffix[1:].isalpha()
    return is_file_beside_others or name.lower().endswith(FILE_SUFFIXES)


def remedy_for_file(path: Path) -> str:
    lists = ", ".join(TABLE_SUFFIXES)
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".tar"):
        return f"pass its folder, {path.parent}: such files are the splits of a data set."
    if suffix in REMEDIES:
        return remedy_for(path)
    if suffix in TRANSCRIPT_SUFFIXES:
        return f"pass its folder, {path.parent}, with the recording beside it."
    if suffix in ARCHIVE_SUFFIXES:
        return "an archive is not read. Unpack it, and pass the folder."
    if suffix in AUDIO_SUFFIXES:
        return f"one clip is not a data set. Pass its folder, {path.parent}, or a list of clips."
    return f"not a kind of file that is read. Pass a folder, or a list of clips ({lists})."


def nearest_name(path: Path, similarity: float) -> str | None:
    """What the folder has under a name like this."""
    if not path.parent.is_dir():
        return None
    names = [file.name for file in path.parent.iterdir() if file.name != path.name]
    return next(iter(difflib.get_close_matches(path.name, names, n=1, cutoff=similarity)), None)


def what_folder_lacks(folder: Path) -> str:
    """Of a folder in which nothing is found that can be trained on."""
    if advice := advice_on(str(folder)):
        return advice.strip()
    files = [path for path in itertools.islice(folder.rglob("*"), MAX_LOOKED_AT) if path.is_file()]
    clips = sorted(path for path in files if path.suffix.lower() in AUDIO_SUFFIXES)
    if clips:
        place = clips[0].relative_to(folder)
        return (
            f"audio files, such as {place}, but nothing says what is said in them. Put a list into "
            "the folder: train.csv with the columns path and sentence."
        )
    return EMPTY_FOLDER


def what_is_there(name: str) -> str:
    """The entries of the nearest folder that exists, and the nearest name."""
    path = expanded(name)
    nearest = nearest_name(path, SIMILAR)
    folder = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    listed = ", ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        listed += f" and {len(names) - MAX_NAMES} more"
    here = "this folder" if folder == Path() else os.fspath(folder)
    text = f"In {here}: {listed or 'nothing'}."
    if nearest is not None:
        text += f" Did you mean {path.parent / nearest}?"
    if "/" not in name and not is_path(name):
        text += f" (A data set on the Hub: write its owner too, OWNER/{name}.)"
    return text


def where_it_is_now(name: str) -> str | None:
    """What to do about a data set that has left the Hub; None for all others.

    Mozilla took Common Voice from the Hub in October 2025: its repositories answer 404.
    """
    if COMMON_VOICE.fullmatch(name) is None:
        return None
    return (
        "Common Voice has left the Hub. Download your language from "
        "https://mozilladatacollective.com, unpack it, and pass the folder: --dataset_name FOLDER "
        "--dataset_config_name es (its code), with --eval_split_name dev. See docs/data.md."
    )


def not_opened(
    name: str, config_name: str | None, revision: str | None, error: Exception
) -> UserError:
    """Why `datasets` cannot open a data set, and what to do."""
    if problem := configuration_problem(name, config_name, str(error)):
        return UserError(problem)
    if Path(name).is_dir():
        typed = name.removeprefix("./")  # which keeps `datasets` from asking the Hub
        return UserError(f"--dataset_name {typed}: {what_folder_lacks(Path(name))}")
    advice = where_it_is_now(name)
    if advice is None:
        advice = "Pass a Hub id or a folder; set HF_TOKEN for a private one."
        if "/" in name and Path(name).parent.is_dir():
            advice += f" {what_is_there(name)}"
    if revision is not None and "Revision" in str(error):
        advice = (
            "The run began with this revision, which is gone. Start another run, with an "
            "--output_dir of its own."
        )
    return UserError(f"--dataset_name {name}: {one_line(error)} {advice}")


def configuration_problem(name: str, config_name: str | None, reason: str) -> str | None:
    """What to pass as --dataset_config_name, if that is what `datasets` (5.2) complains of.

    reason: its message.
    """
    found = CONFIGURATIONS.search(" ".join(reason.split()))
    if found is None:
        return None
    there = re.findall(r"'([^']+)'", found[1])
    listed = ", ".join(there[:MAX_CONFIGURATIONS])
    if len(there) > MAX_CONFIGURATIONS:
        others = len(there) - MAX_CONFIGURATIONS
        listed += f" and {others} more (https://huggingface.co/datasets/{name})"
    if config_name is None:
        return f"--dataset_config_name is missing: {name} has several. Pass one of: {listed}."
    text = (
        f"--dataset_config_name {config_name}: {name} has no such configuration. Found: {listed}."
    )
    if there == ["default"]:
        return f"{text} Leave the flag out."
    nearest = difflib.get_close_matches(config_name, there, n=1, cutoff=SIMILAR)
    return f"{text} Did you mean {nearest[0]}?" if nearest else text


def check_has_not_left(name: str) -> None:
    """Raises: UserError for Mozilla's own repositories, to be told along with other mistakes; alone
    they are asked for all the same, as they may come back."""
    advice = where_it_is_now(name)
    if advice is not None and name.startswith("mozilla-foundation/") and not Path(name).is_dir():
        raise UserError(f"--dataset_name {name}: {advice}")
