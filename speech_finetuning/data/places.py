"""Where the clips of a list lie, as its rows name them."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec

# Where a list's clips are, seen from it: beside it, as in Common Voice, as in LJSpeech.
FOLDERS_OF_CLIPS = ("", "clips", "wavs")
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm", ".mp4", ".aac", ".amr", ".wma"),
    *(".3gp", ".mov", ".mka", ".mkv", ".aiff", ".aif", ".sph"),
)


MAX_FILES_BELOW = 1_000_000  # of a folder, that are looked at
UPLOADED = "/data/upload/"  # where Label Studio has clips, which are elsewhere after its export


@dataclass(frozen=True, kw_only=True)
class AudioPlace:
    """What stands before and after the names of a list's clips. has_folders: they lie in folders
    below, anywhere, and are found by their names."""

    folder: str
    suffix: str = ""
    has_folders: bool = False

    def path_of(self, name: str) -> str:
        if "://" in name:
            return name
        if name.startswith(UPLOADED) and not os.path.isfile(name):
            name = os.path.basename(name)
        if self.has_folders:
            return str(Path(self.folder) / clips_below(self.folder).get(name, name))
        file_name = f"{name}{self.suffix}"
        if "\\" in name and not os.path.isfile(os.path.join(self.folder, file_name)):
            file_name = file_name.replace("\\", "/")  # written on Windows
        if "://" in self.folder and not os.path.isabs(name):
            return f"{self.folder}/{PurePosixPath(file_name)}"
        return str(Path(self.folder) / file_name)


def looks_like_audio(cell: Any, folder: str) -> bool:
    return has_audio_suffix(cell) or clip_exists(folder, cell) or lies_below(folder, cell)


def audio_tests(folder: str) -> tuple[Callable[[Any], bool], ...]:
    """Suffixes first: a number may be the name of a clip too, without its suffix."""
    if "://" in folder:  # where each look is a request
        return (has_audio_suffix,)
    return (
        has_audio_suffix,
        functools.partial(clip_exists, folder),
        functools.partial(lies_below, folder),
    )


def has_audio_suffix(cell: Any) -> bool:
    return isinstance(cell, str) and cell.strip().lower().endswith(AUDIO_SUFFIXES)


def clip_exists(folder: str, name: Any) -> bool:
    if not isinstance(name, str) or not name:
        return False
    return is_file(place_of_clips(folder, [name]).path_of(name))


def lies_below(folder: str, name: Any) -> bool:
    """Whether a clip of this name, without folders, lies in one below the folder."""
    if not isinstance(name, str) or not name or "/" in name or "://" in folder:
        return False
    return name in clips_below(folder)


@functools.lru_cache(maxsize=4)
def clips_below(folder: str) -> dict[str, str]:
    """{name, with its suffix and without: path from the folder} of the clips in the folders below
    it; without names that several have."""
    found: dict[str, str | None] = {}
    num_files = 0
    for place, _, files in os.walk(folder or os.curdir):
        num_files += len(files)
        if num_files > MAX_FILES_BELOW:
            break
        for file in filter(has_audio_suffix, files):
            path = os.path.relpath(os.path.join(place, file), folder or os.curdir)
            for name in (file, os.path.splitext(file)[0]):
                found[name] = None if name in found else path
    return {name: path for name, path in found.items() if path is not None}


def is_file(path: str) -> bool:
    if "://" not in path:
        return os.path.isfile(path)
    if not path.startswith("hf://"):
        return False  # a server may answer anything
    return cast(Any, fsspec.open(path)).fs.isfile(path)


def place_of_clips(folder: str, first_names: list[Any]) -> AudioPlace:
    """Where the first clip that is found is: beside the list, in `clips` (Common Voice), or in `wavs`
    and without its suffix in the list (LJSpeech). Others are looked for in the same place.

    first_names: the cells of the first rows; some of the clips may be missing.
    """
    own = AudioPlace(folder=folder)
    names = [name for name in first_names if isinstance(name, str) and name]
    if "://" in folder:
        names = names[:1]  # each look is a request
    for name in names:
        if "://" in name or os.path.isabs(name):
            return own
        place = place_of_clip(folder, name)
        if place is not None:
            return place
    # None of them is there: the others may be where Common Voice has them.
    clips = os.path.join(folder, "clips")
    if names and Path(names[0]).name == names[0] and os.path.isdir(clips):
        return AudioPlace(folder=clips)
    if any(lies_below(folder, name) for name in names):
        return AudioPlace(folder=folder, has_folders=True)
    return own


def place_of_clip(folder: str, name: str) -> AudioPlace | None:
    """None if it is nowhere."""
    suffixes = ("", ".wav", ".flac", ".mp3")
    if Path(name).suffix.lower() in AUDIO_SUFFIXES:
        suffixes = ("",)
    for suffix in suffixes:
        for subfolder in FOLDERS_OF_CLIPS:
            place = AudioPlace(folder=os.path.join(folder, subfolder).rstrip("/"), suffix=suffix)
            if is_file(place.path_of(name)):
                return place
    return None
