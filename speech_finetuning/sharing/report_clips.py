"""Sound and picture of a few scored rows, for the report page."""

import base64
import io
import logging
import random
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


@dataclass(kw_only=True)
class Clip:
    """What a row sounds and looks like, in base64; empty if it could not be had."""

    audio: str = ""  # mp3, which every browser plays
    picture: str = ""  # webp


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
        undrawn = [row for row in chosen if (role, row.index) not in self.pictures]
        for index, picture in draw_pictures(undrawn, eval_set).items() if undrawn else ():
            self.pictures[role, index] = picture
        unheard = [row for row in chosen if (role, row.index) not in self.sounds]
        for index, sound in fetch_sounds(unheard, eval_set, sources).items():
            self.sounds[role, index] = sound
        return {
            row.index: Clip(
                audio=self.sounds.get((role, row.index), ""),
                picture=self.pictures.get((role, row.index), ""),
            )
            for row in chosen
        }


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


# ------------------------------------------------------------------------------------ pictures ---
def draw_pictures(rows: list[AlignedRow], eval_set: datasets.Dataset) -> dict[int, str]:
    """The log-mel spectrograms that the model reads, by the rows' index, as webp in base64."""
    import librosa.display  # here: seconds and 150 MB, for pictures only
    import matplotlib.figure

    place_of = {index: place for place, index in enumerate(eval_set["index"])}
    figure = matplotlib.figure.Figure(figsize=(6.4, 2.2), dpi=75)
    pictures = {}
    for row in rows:
        if row.index not in place_of:
            continue
        values = np.frombuffer(eval_set[place_of[row.index]]["features"], np.float32)
        num_frames = round(row.duration_in_seconds * FRAMES_PER_SECOND)
        features = values.reshape(num_mel_bins(len(values), num_frames), -1)
        longest = int(LONGEST_PICTURE_IN_SECONDS * FRAMES_PER_SECOND)
        figure.clear()
        axes = figure.add_axes((0.11, 0.2, 0.88, 0.77))  # a layout engine takes twice the time
        librosa.display.specshow(
            features[:, :longest],
            x_axis="time",
            y_axis="mel",
            sr=SAMPLE_RATE_IN_HZ,
            hop_length=HOP_LENGTH_IN_SAMPLES,
            fmax=SAMPLE_RATE_IN_HZ / 2,
            cmap="magma",
            ax=axes,
        )
        axes.set(xlabel="seconds", ylabel="Hz")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="webp", pil_kwargs={"quality": 60})
        pictures[row.index] = base64.b64encode(buffer.getvalue()).decode()
    return pictures


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
