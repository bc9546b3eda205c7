"""Sound and picture of a few scored rows, for the report page.

Both come later than the page: until then a word stands in the place of each, which is then replaced.
"""

import random
import secrets
from dataclasses import dataclass, field

import datasets
import numpy as np

from speech_finetuning.data.audio import HOP_LENGTH_IN_SAMPLES, SAMPLE_RATE_IN_HZ
from speech_finetuning.scoring.alignment import AlignedRow
from speech_finetuning.sharing.report_sounds import MAX_CLIP_IN_SECONDS, SoundKey

FRAMES_PER_SECOND = SAMPLE_RATE_IN_HZ / HOP_LENGTH_IN_SAMPLES
LONGEST_PICTURE_IN_SECONDS = 30.0
PICTURE_IN_BYTES = 20_000  # of base64, at most
SOUND_IN_BYTES_PER_SECOND = 5_000  # of base64, about


@dataclass(kw_only=True)
class Clip:
    """What a row sounds and looks like, in base64; empty if it could not be had."""

    audio: str = ""  # mp3, which every browser plays; or the word in its place
    picture: str = ""  # webp; or the word in its place
    expected_bytes: int = 0  # in the page, when both are there

    @property
    def num_bytes(self) -> int:
        """In the page."""
        return max(self.expected_bytes, len(self.audio) + len(self.picture))


@dataclass(kw_only=True)
class ClipShelf:
    """The clips that have been made so far, by set and index of the row: neither sound nor picture
    of a row ever changes."""

    num_clips: int
    pictures: dict[SoundKey, str] = field(default_factory=dict)
    sounds: dict[SoundKey, str] = field(default_factory=dict)
    # Of the pages as they are now, by the word in the place of what is not there yet.
    unheard: dict[str, tuple[SoundKey, Clip]] = field(default_factory=dict)
    undrawn: dict[str, tuple[SoundKey, Clip]] = field(default_factory=dict)
    spectrograms: dict[str, np.ndarray] = field(default_factory=dict)  # (n_mels, n_frames) of these
    secret: str = field(default_factory=secrets.token_hex)  # no transcript contains it

    def clips_of(
        self, role: str, rows: list[AlignedRow], eval_set: datasets.Dataset
    ) -> dict[int, Clip]:
        """Clips by the rows' index, of the rows that `choose_rows` takes: with what has been made
        before, and words in the places of the rest. role: whose rows they are."""
        self.forget_places(role)
        clips = {}
        for row in choose_rows(rows, self.num_clips):
            key = (role, row.index)
            seconds = min(row.duration_in_seconds, MAX_CLIP_IN_SECONDS)
            clip = Clip(
                audio=self.sounds.get(key, ""),
                picture=self.pictures.get(key, ""),
                expected_bytes=round(seconds * SOUND_IN_BYTES_PER_SECOND) + PICTURE_IN_BYTES,
            )
            clips[row.index] = clip
            if not clip.audio:
                clip.audio = self.place("sound", key)
                self.unheard[clip.audio] = (key, clip)
        unseen = [row for row in rows if row.index in clips and not clips[row.index].picture]
        for index, spectrogram in spectrograms_of(unseen, eval_set).items():
            clip = clips[index]
            clip.picture = self.place("picture", (role, index))
            self.undrawn[clip.picture] = ((role, index), clip)
            self.spectrograms[clip.picture] = spectrogram
        return clips

    def place(self, kind: str, key: SoundKey) -> str:
        """The word in the place of a sound or picture."""
        return f"@{kind}-{self.secret}-{key[0]}-{key[1]}@"

    def forget_places(self, role: str) -> None:
        """Of an earlier evaluation, whose rows the next page no longer shows."""
        for place, (key, clip) in list(self.unheard.items()):
            if key[0] == role:
                del self.unheard[place]
                clip.audio = ""
        for place, (key, clip) in list(self.undrawn.items()):
            if key[0] == role:
                del self.undrawn[place]
                del self.spectrograms[place]
                clip.picture = ""

    def put_sounds(self, sounds: dict[SoundKey, str]) -> dict[str, str]:
        """Takes what has been read, and returns it by the word in its place; what is missing is empty,
        and tried again after the next evaluation."""
        self.sounds |= sounds
        by_place = {}
        for place, (key, clip) in self.unheard.items():
            clip.audio = self.sounds.get(key, "")
            by_place[place] = clip.audio
        self.unheard.clear()
        return by_place

    def put_pictures(self, pictures: dict[str, str]) -> None:
        """Takes what has been drawn, by the word in its place; what is missing is tried again after
        the next evaluation."""
        for place, (key, clip) in self.undrawn.items():
            clip.picture = pictures.get(place, "")
            if clip.picture:
                self.pictures[key] = clip.picture
        self.undrawn.clear()
        self.spectrograms.clear()

    def places(self) -> str:
        """A regular expression of all words in places."""
        return rf"@(?:sound|picture)-{self.secret}-\w+-\d+@"


def choose_rows(rows: list[AlignedRow], number: int) -> list[AlignedRow]:
    """At most `number` rows: those with most errors, and a random sample that is the same after
    every evaluation."""
    scored = [row for row in rows if row.counts is not None and row.counts.num_errors > 0]
    worst = sorted(scored, key=most_errors_first)[: number // 2]
    taken = {row.index for row in worst}
    shuffled = sorted(rows, key=index_of)
    random.Random(0).shuffle(shuffled)
    sample = [row for row in shuffled if row.index not in taken]
    return worst + sample[: number - len(worst)]


def most_errors_first(row: AlignedRow) -> int:
    return 0 if row.counts is None else -row.counts.num_errors


def index_of(row: AlignedRow) -> int:
    return row.index


# -------------------------------------------------------------------------------- spectrograms ---
def spectrograms_of(rows: list[AlignedRow], eval_set: datasets.Dataset) -> dict[int, np.ndarray]:
    """The log-mel spectrograms that the model reads, (n_mels, n_frames), by the rows' index."""
    if not rows:
        return {}
    place_of = {index: place for place, index in enumerate(eval_set["index"])}
    longest = int(LONGEST_PICTURE_IN_SECONDS * FRAMES_PER_SECOND)
    spectrograms = {}
    for row in rows:
        if row.index not in place_of:
            continue
        values = np.frombuffer(eval_set[place_of[row.index]]["features"], np.float32)
        num_frames = round(row.duration_in_seconds * FRAMES_PER_SECOND)
        features = values.reshape(num_mel_bins(len(values), num_frames), -1)
        spectrograms[row.index] = features[:, :longest]
    return spectrograms


def num_mel_bins(num_values: int, num_frames: int) -> int:
    """80 or 128: whichever fits the number of frames."""
    distances = {bins: abs(num_values / bins - num_frames) for bins in (80, 128)}
    return 80 if distances[80] <= distances[128] else 128
