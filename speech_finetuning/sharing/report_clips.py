"""Sound and picture of a few scored rows, for the report page."""

import base64
import io
import logging
import random
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
import soundfile

from speech_finetuning.base.errors import RunEnded, one_line
from speech_finetuning.data.audio import HOP_LENGTH_IN_SAMPLES, SAMPLE_RATE_IN_HZ
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader
from speech_finetuning.scoring.alignment import AlignedRow
from speech_finetuning.sharing.public import ROW_ID

logger = logging.getLogger(__name__)

FRAMES_PER_SECOND = SAMPLE_RATE_IN_HZ / HOP_LENGTH_IN_SAMPLES
MAX_FETCHING_IN_SECONDS = 60.0  # after each evaluation; the clips that are left come next time
MAX_CLIP_IN_SECONDS = 60.0  # of a long recording only the beginning is played
LONGEST_PICTURE_IN_SECONDS = 30.0
COMPRESSION_LEVEL = 0.9  # of mp3 by libsndfile: about 3 kB a second of speech
PICTURE_IN_BYTES = 20_000  # of base64, at most


@dataclass(kw_only=True)
class Clip:
    """What a row sounds and looks like, in base64; empty if it could not be had."""

    audio: str = ""  # mp3, which every browser plays
    picture: str = ""  # webp; while it is drawn, the word that stands in its place
    is_drawn: bool = True

    @property
    def num_bytes(self) -> int:
        """In the page."""
        return len(self.audio) + (len(self.picture) if self.is_drawn else PICTURE_IN_BYTES)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A row whose clip is looked for: its place in its file."""

    row: AlignedRow
    num_rows_before: int  # in the same file


@dataclass(kw_only=True)
class ClipShelf:
    """The clips that have been made so far, by set and index of the row: neither sound nor picture
    of a row ever changes."""

    num_clips: int
    pictures: dict[tuple[str, int], str] = field(default_factory=dict)
    sounds: dict[tuple[str, int], str] = field(default_factory=dict)
    # Those whose pictures have still to be drawn, by the word in the picture's place.
    undrawn: dict[str, tuple[tuple[str, int], Clip]] = field(default_factory=dict)
    spectrograms: dict[str, np.ndarray] = field(default_factory=dict)  # (n_mels, n_frames) of these
    secret: str = field(default_factory=secrets.token_hex)  # no transcript contains it

    def clips_of(
        self,
        role: str,
        rows: list[AlignedRow],
        eval_set: datasets.Dataset,
        sources: list[SpeechDataset],
    ) -> dict[int, Clip]:
        """Clips by the rows' index: half of them of the worst rows, half of a random sample. role:
        whose rows they are; sources: the data sets that they come from. Raises: RunEnded of a
        signal."""
        chosen = choose_rows(rows, self.num_clips)
        unheard = [row for row in chosen if (role, row.index) not in self.sounds]
        for index, sound in fetch_sounds(unheard, eval_set, sources).items():
            self.sounds[role, index] = sound
        clips = {
            row.index: Clip(
                audio=self.sounds.get((role, row.index), ""),
                picture=self.pictures.get((role, row.index), ""),
            )
            for row in chosen
        }
        unseen = [row for row in chosen if not clips[row.index].picture]
        for index, spectrogram in spectrograms_of(unseen, eval_set).items():
            self.have_drawn((role, index), clips[index], spectrogram)
        return clips

    def have_drawn(self, key: tuple[str, int], clip: Clip, spectrogram: np.ndarray) -> None:
        """Puts a word where the picture of (n_mels, n_frames) will be."""
        clip.picture = f"@picture-{self.secret}-{len(self.undrawn)}@"
        clip.is_drawn = False
        self.undrawn[clip.picture] = (key, clip)
        self.spectrograms[clip.picture] = spectrogram

    def put(self, pictures: dict[str, str]) -> None:
        """Takes what has been drawn, by the word in its place; what is missing is tried again after
        the next evaluation."""
        for place, (key, clip) in self.undrawn.items():
            clip.picture = pictures.get(place, "")
            clip.is_drawn = True
            if clip.picture:
                self.pictures[key] = clip.picture
        self.undrawn.clear()
        self.spectrograms.clear()

    def without_places(self, page: str) -> str:
        """The page as it is shown until the pictures are drawn."""
        return re.sub(rf"@picture-{self.secret}-\d+@", "", page)


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


# -------------------------------------------------------------------------------------- sounds ---
def fetch_sounds(
    rows: list[AlignedRow], eval_set: datasets.Dataset, sources: list[SpeechDataset]
) -> dict[int, str]:
    """mp3 in base64 by the rows' index, read from the source once more. Rows are left out when time
    is up, or the network is lost. Raises: RunEnded of a signal."""
    deadline = time.monotonic() + MAX_FETCHING_IN_SECONDS
    by_name = {dataset.source.record: dataset for dataset in sources}
    sounds: dict[int, str] = {}
    try:
        for shard, wanted in places_in_files(rows, eval_set).items():
            dataset = by_name.get(wanted[0].row.set_name)
            if dataset is None or time.monotonic() > deadline:
                continue
            for row, waveform in read_rows(dataset, shard, wanted, deadline):
                sounds[row.index] = encode_sound(waveform)
    except RunEnded as ending:
        if ending.code >= 128:
            raise
        logger.warning("report: clips could not be read: %s", ending.reason)
    except Exception as error:  # whatever a source brings; pictures are there all the same
        logger.warning("report: clips could not be read: %s", one_line(error)[:300])
    return sounds


def places_in_files(
    rows: list[AlignedRow], eval_set: datasets.Dataset
) -> dict[tuple[str, int, int], list[Wanted]]:
    """By set, part and shard, the wanted rows in the order of their file."""
    ids = eval_set.data["id"].to_pylist()  # also of rejected rows, in the order of the files
    set_names = eval_set.data["set"].to_pylist()
    wanted_indices = {row.index: row for row in rows}
    counts: dict[tuple[str, int, int], int] = {}
    found: dict[tuple[str, int, int], list[Wanted]] = {}
    for index, (row_id, set_name) in enumerate(zip(ids, set_names, strict=True)):
        match = ROW_ID.fullmatch(row_id)
        if match is None:
            continue
        part, shard = match.group(1).split("/")[-2:]
        place = (set_name, int(part), int(shard))
        row = wanted_indices.get(index)
        if row is not None and row.id == row_id:
            wanted = Wanted(row=row, num_rows_before=counts.get(place, 0))
            found.setdefault(place, []).append(wanted)
        counts[place] = counts.get(place, 0) + 1
    return found


def read_rows(
    dataset: SpeechDataset,
    place: tuple[str, int, int],
    wanted: list[Wanted],
    deadline: float,
) -> Iterator[tuple[AlignedRow, np.ndarray]]:
    """Rows of one file with their waveforms, (n_samples,) at 16 kHz. Raises: the reader's errors."""
    by_number = {item.num_rows_before: item.row for item in wanted}
    first = min(by_number)
    reader = ShardReader(dataset.source, place[1:], num_rows=first, wait_in_seconds=0)
    for number, source_row in enumerate(reader, first):
        if number > max(by_number) or time.monotonic() > deadline:
            return
        row = by_number.get(number)
        if row is None or source_row.rejection is not None or source_row.id != row.id:
            continue
        waveform, _ = dataset.preprocessor.prepare_audio(source_row.audio, source_row.segment, 1.0)
        yield row, waveform


def encode_sound(waveform: np.ndarray) -> str:
    """(n_samples,) at 16 kHz as mp3 in base64: what the model heard."""
    num_samples = int(MAX_CLIP_IN_SECONDS * SAMPLE_RATE_IN_HZ)
    peak = max(1.0, float(np.abs(waveform).max()))  # louder than full scale would be clipped
    buffer = io.BytesIO()
    soundfile.write(
        buffer,
        waveform[:num_samples] / peak,
        SAMPLE_RATE_IN_HZ,
        format="MP3",
        compression_level=COMPRESSION_LEVEL,
    )
    return base64.b64encode(buffer.getvalue()).decode()
