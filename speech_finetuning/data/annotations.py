"""What other programs leave beside clips and is no list of them: how to make one of it."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from speech_finetuning.data.places import lies_below

TRANS = ".trans.txt"  # of LibriSpeech, one in each folder of clips
MAX_FILES = 10_000  # of a folder, that are looked at
SPLIT = re.compile("train|dev|test|val|eval", re.IGNORECASE)  # begins the name of its folder
AS_SUBTITLES = "File, Export As, Subtitles Text writes {stem}.srt, to be put beside the recording."
BY_FFMPEG = "subtitles of this format are not read. Convert them: ffmpeg -i {path} {subtitles}"
AS_SUBRIP = "subtitles of this format are not read. Save them as SubRip: {subtitles}"
AS_TEXT = (
    "a document is not read. Save it as plain text in UTF-8, {stem}.txt, beside the recording."
)
AS_CSV = (
    "a spreadsheet is not read. Save it as CSV in UTF-8: {stem}.csv, each sheet as one of its own."
)
# {suffix: what to do}; path and stem are those of a file with it, subtitles and text lie beside it.
# What a file is called is a stranger's: in commands, which are pasted, every name is quoted.
REMEDIES = {
    ".eaf": f"ELAN's annotations are not read. In ELAN, {AS_SUBTITLES}",
    ".textgrid": "Praat's annotations are not read. Open them in ELAN by File, Import, Praat "
    f"TextGrid File; there {AS_SUBTITLES}",
    **dict.fromkeys((".ass", ".ssa", ".lrc", ".smi"), BY_FFMPEG),
    **dict.fromkeys((".ttml", ".dfxp", ".sbv", ".stl"), AS_SUBRIP),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf"), AS_TEXT),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), AS_CSV),
    ".lab": "texts of this suffix are not read. Copy each: cp {path} {text}",
}
# NIST's: recording, channel, speaker, start, end, perhaps <labels>, text.
TABLE_OF_STM = (
    'find {place} -name {pattern} -exec awk \'BEGIN {{OFS = "\\t"; '
    'print "path", "start", "end", "speaker", "text"}} '
    "!/^;;/ && !/ignore_time_segment/ {{i = ($6 ~ /^</) ? 7 : 6; text = $i; "
    'while (i++ < NF) text = text " " $i; print $1, $4, $5, $3, text}}\' {{}} + > {table}'
)
TABLE_OF_NAMES = (
    "find {place} -name {pattern} -exec awk '{{sub(/[ \\t]+/, \"\\t\"); print}}' {{}} + > {table}"
)
# Of files that have one text each, as in VCTK.
TABLE_OF_TEXTS = (
    "find {place} -name {pattern} -exec awk 'FNR == 1 {{name = FILENAME; "
    'sub(/.*\\//, "", name); sub(/[.]txt$/, "", name); print name "\\t" $0}}\' {{}} + > {table}'
)
# Its tasks have one result for each region, with the region's times.
TABLE_OF_LABEL_STUDIO = (
    'import csv, json; out = csv.writer(open({csv}, "w")); '
    'out.writerow(["path", "start", "end", "text"]); out.writerows([task["data"][{audio}], '
    'value.get("start"), value.get("end"), " ".join(value["text"])] for task in '
    'json.load(open({json})) for each in task["annotations"][:1] for value in '
    '[result["value"] for result in each["result"]] if "text" in value)'
)


def advice_on(folder: str) -> str:
    """What to do about the first such file below a folder, with a space before it; else empty."""
    for path in files_below(folder):
        suffix = path.suffix.lower()
        if suffix in REMEDIES:
            return f" {path}: {remedy_for(path)}"
        if suffix == ".stm":
            command = tables_of(folder, path, "*.stm", TABLE_OF_STM)
            return f" {path}: transcripts of this format are not read. {command}"
        if suffix == ".txt" and names_a_clip(folder, path):
            pattern = f"*{TRANS}" if path.name.endswith(TRANS) else path.name
            command = tables_of(folder, path, pattern, TABLE_OF_NAMES)
            return f" {path} lists clips by their names. {command}"
        if suffix == ".txt" and lies_below(folder, path.stem):
            command = tables_of(folder, path, "*.txt", TABLE_OF_TEXTS)
            return f" {path} lies in another folder than its clip. {command}"
    return ""


def files_below(folder: str) -> Iterator[Path]:
    num_files = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            num_files += 1
            if num_files > MAX_FILES:
                return
            if not name.startswith((".", "~$")):
                yield Path(place, name)


def remedy_for(path: Path) -> str:
    """Of a file with one of these suffixes."""
    return REMEDIES[path.suffix.lower()].format(
        path=shlex.quote(str(path)),
        subtitles=shlex.quote(str(path.with_suffix(".srt"))),
        text=shlex.quote(str(path.with_suffix(".txt"))),
        stem=path.stem,
    )


def names_a_clip(folder: str, path: Path) -> bool:
    """Whether the first line is a clip's name and a text, as in LibriSpeech, MLS and AISHELL."""
    try:
        with open(path, encoding="utf-8") as file:
            name, *text = file.readline().split(maxsplit=1)
    except (OSError, ValueError):
        return False
    return bool(text) and lies_below(folder, name)


def tables_of(folder: str, path: Path, pattern: str, command: str) -> str:
    """Ends in the command that makes a table of this file and its kin; of each split where folders
    are named as splits are."""
    place = Path(folder)
    for part in path.relative_to(folder).parts[:-1]:
        if SPLIT.match(part):
            folders = filter(os.path.isdir, place.iterdir())
            names = sorted(each.name for each in folders if SPLIT.match(each.name))
            inner = f'{shlex.quote(str(place))}/"$split"'
            of_split = command.format(
                place=inner, pattern=shlex.quote(pattern), table=f"{inner}.tsv"
            )
            loop = f"for split in {' '.join(map(shlex.quote, names))}; do {of_split}; done"
            return f"Make a table of each split, and pass {place}: {loop}"
        place /= part
    table = shlex.quote(str(Path(folder, "train.tsv")))
    of_all = command.format(place=shlex.quote(folder), pattern=shlex.quote(pattern), table=table)
    return f"Make a table of it: {of_all}"


def table_of_label_studio(path: str, audio: str) -> str:
    """The command that makes a table of Label Studio's JSON. audio: the name of its data."""
    table = os.path.join(os.path.dirname(path), "train.csv")
    program = TABLE_OF_LABEL_STUDIO.format(
        csv=json.dumps(table), json=json.dumps(path), audio=json.dumps(audio)
    )
    return f"python -c {shlex.quote(program)}"
