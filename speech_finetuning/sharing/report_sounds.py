"""The sounds of a report's clips, read from the data once more while the training goes on."""

import base64
import io
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
import soundfile

from speech_finetuning.base.errors import RunEnded, one_line
from speech_finetuning.base.threads import FORK_LOCK
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader
from speech_finetuning.scoring.alignment import AlignedRow
from speech_finetuning.sharing.public import ROW_ID

logger = logging.getLogger(__name__)

MAX_FETCHING_IN_SECONDS = 60.0  # after each evaluation; the clips that are left come next time
MAX_CLIP_IN_SECONDS = 60.0  # of a long recording only the beginning is played
COMPRESSION_LEVEL = 0.9  # of mp3 by libsndfile: about 3 kB a second of speech

SoundKey = tuple[str, int]  # role and index of a row


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A row whose clip is looked for: its place in its file."""

    row: AlignedRow
    num_rows_before: int  # in the same file


@dataclass(frozen=True, kw_only=True)
class SoundOrder:
    """Rows of one evaluation whose sounds are wanted."""

    role: str
    rows: list[AlignedRow]
    eval_set: datasets.Dataset
    sources: list[SpeechDataset]  # that the rows come from


@dataclass(kw_only=True)
class SoundReader:
    """Reads on a thread, one order after the other. Decoders let go of the GIL, as those of the
    training do; a GPU does not wait for it. Nothing that goes wrong there is more than a warning."""

    orders: deque[SoundOrder] = field(default_factory=deque)
    found: dict[SoundKey, str] = field(default_factory=dict)
    asked: set[SoundKey] = field(default_factory=set)  # that are on their way
    thread: threading.Thread | None = field(default=None, repr=False)

    def start(self, order: SoundOrder) -> None:
        """Has these read, too."""
        self.asked |= {(order.role, row.index) for row in order.rows}
        self.orders.append(order)
        self.is_reading()

    def is_reading(self) -> bool:
        """Whether there is more to come; what has been ordered is on its way after this."""
        if self.thread is not None and self.thread.is_alive():
            return True
        if not self.orders:
            return False
        # A daemon: the end of a run does not wait for a network.
        self.thread = threading.Thread(target=self.read, name="report sounds", daemon=True)
        self.thread.start()
        return True

    def read(self) -> None:
        """On the thread."""
        while self.orders:
            order = self.orders.popleft()
            for index, sound in fetch_sounds(order.rows, order.eval_set, order.sources).items():
                self.found[order.role, index] = sound
            self.asked -= {(order.role, row.index) for row in order.rows}

    def wait(self) -> None:
        """Until all has been read, or time is up; a signal may interrupt it."""
        deadline = time.monotonic() + MAX_FETCHING_IN_SECONDS
        while self.is_reading() and time.monotonic() < deadline:
            assert self.thread is not None
            self.thread.join(0.1)

    def collect(self) -> dict[SoundKey, str]:
        """mp3 in base64, of all that has been read since the last call."""
        keys = list(self.found)
        return {key: self.found.pop(key) for key in keys}


def fetch_sounds(
    rows: list[AlignedRow], eval_set: datasets.Dataset, sources: list[SpeechDataset]
) -> dict[int, str]:
    """mp3 in base64 by the rows' index, read from the source once more. Rows are left out when time
    is up, or the network is lost."""
    deadline = time.monotonic() + MAX_FETCHING_IN_SECONDS
    by_name = {dataset.source.record: dataset for dataset in sources}
    sounds: dict[int, str] = {}
    for shard, wanted in places_in_files(rows, eval_set).items():
        dataset = by_name.get(wanted[0].row.set_name)
        if dataset is None or time.monotonic() > deadline:
            continue
        try:
            add_sounds(sounds, read_rows(dataset, shard, wanted, deadline))
        except RunEnded as ending:
            logger.warning("report: clips could not be read: %s", ending.reason)
            break  # the network is lost for other files as well
        except Exception as error:  # whatever a source brings; pictures are there all the same
            logger.warning("report: clips could not be read: %s", one_line(error)[:300])
    return sounds


def add_sounds(sounds: dict[int, str], rows: Iterator[tuple[AlignedRow, np.ndarray]]) -> None:
    """Reads row by row, between which a process may be forked."""
    while True:
        with FORK_LOCK:
            row, waveform = next(rows, (None, None))
        if row is None or waveform is None:
            return
        sounds[row.index] = encode_sound(waveform)


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
