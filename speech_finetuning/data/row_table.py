"""Rows that are only paths, at hand by number, so that they can be permuted one by one."""

import pickle
import tempfile
from array import array

from speech_finetuning.data.positions import FIRST_ORDER_VERSION
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader, SourceRow

MAX_BYTES_IN_MEMORY = 64 * 2**20  # of a table; a longer one lies in a temporary file


class RowTable:
    """All undecoded rows of a source: 8 bytes of memory for each, and some 300 of its file."""

    def __init__(self, dataset: SpeechDataset) -> None:
        """Reads every row once. Raises: errors of the network that lasted too long."""
        self.file = tempfile.SpooledTemporaryFile(MAX_BYTES_IN_MEMORY)  # noqa: SIM115
        self.ends = array("q", [0])
        for place in dataset.source.shards():
            reader = ShardReader(
                dataset.source,
                place,
                num_rows=0,
                wait_in_seconds=dataset.preprocessor.max_network_wait_in_seconds,
            )
            for row in reader:
                data = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
                self.file.write(data)
                self.ends.append(self.ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def row(self, number: int) -> SourceRow:
        start = self.ends[number]
        self.file.seek(start)
        return pickle.loads(self.file.read(self.ends[number + 1] - start))


def table_of(dataset: SpeechDataset) -> RowTable | None:
    """None if the rows of the source hold their audio, or an older run reads them file by file."""
    is_new = dataset.order_version > FIRST_ORDER_VERSION
    return RowTable(dataset) if is_new and dataset.source.has_rows_of_paths else None
