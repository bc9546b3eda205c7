"""The script's collators: what the trainer gets of the rows of a micro-batch or of a scored set."""

import torch

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.items import RejectedRow, StreamItem
from speech_finetuning.data.positions import (
    BlockStart,
    SourcePass,
    SourcePosition,
    StreamPosition,
)

ONE = {"id": "r1", "duration": 1.0, "features": torch.ones(2, 3), "labels": [7, 1, 2, 9]}
TWO = {
    "id": "r2",
    "duration": 2.5,
    "features": torch.full((2, 5), 2.0),
    "labels": [7, 1, 2, 3, 4, 9],
}
REJECTION = Rejection("text_empty", "", "r3")
SECOND_PASS = SourcePass(source=0, pass_number=1)
COLLATOR = script.TrainCollator(decoder_start_token_id=7, pad_token_id=9, n_mels=2)


def position_at(row: int) -> StreamPosition:
    source = SourcePosition(start=BlockStart(pass_number=1))
    return StreamPosition(row=row, sources=(source,))


def test_labels_are_shifted_and_padded_and_clips_lie_end_to_end():
    items = [
        StreamItem(position=position_at(1), example=ONE),
        StreamItem(position=position_at(2), rejection=REJECTION),
        StreamItem(position=position_at(3), example=TWO),
    ]
    batch = COLLATOR(items)
    assert batch["labels"].tolist() == [[1, 2, 9, -100, -100], [1, 2, 3, 4, 9]]
    assert batch["decoder_input_ids"].tolist() == [[7, 1, 2, 9, 9], [7, 1, 2, 3, 4]]
    assert batch["frames"].tolist() == [[1.0] * 3 + [2.0] * 5] * 2
    assert batch["frame_counts"] == [3, 5]
    info = batch["step_info"]
    assert info.position == position_at(3)
    assert info.num_rows == 3
    assert info.ids == ["r1", "r2"]
    assert info.audio_in_seconds == 3.5
    assert info.rejections == [RejectedRow(rejection=REJECTION, source_pass=SECOND_PASS)]
    assert info.error is None


def test_a_micro_batch_without_a_usable_row_has_a_dummy_without_labels():
    batch = COLLATOR([StreamItem(position=position_at(4), rejection=REJECTION)])
    assert batch["labels"].tolist() == [[-100]]
    assert batch["decoder_input_ids"].tolist() == [[7]]
    assert batch["frames"].tolist() == [[-1.5], [-1.5]] and batch["frame_counts"] == [1]
    info = batch["step_info"]
    assert (info.num_rows, info.ids, info.audio_in_seconds) == (1, [], 0)


def test_an_error_travels_with_the_rows_before_it():
    error = UserError("no usable row")
    items = [
        StreamItem(position=position_at(1), example=ONE),
        StreamItem(position=None, error=error),
    ]
    info = COLLATOR(items)["step_info"]
    assert info.error is error and info.ids == ["r1"] and info.position is None


def test_windows_of_a_packer_take_the_place_of_rows():
    seen = []

    class OneWindow:
        def __call__(self, items: list[StreamItem]) -> list[dict]:
            seen.extend(item.position.row for item in items)
            return [{"features": torch.zeros(2, 8), "labels": [7, 5, 9]}]

    collator = script.TrainCollator(
        decoder_start_token_id=7, pad_token_id=9, n_mels=2, packer=OneWindow()
    )
    items = [
        StreamItem(position=position_at(1), example=ONE),
        StreamItem(position=position_at(2), rejection=REJECTION),
        StreamItem(position=position_at(3), example=TWO),
    ]
    batch = collator(items)
    assert seen == [1, 3]
    assert batch["frame_counts"] == [8] and batch["labels"].tolist() == [[5, 9]]
    info = batch["step_info"]
    assert info.num_rows == 3 and info.ids == ["r1", "r2"]  # a step stays a number of rows
    dummy = collator([StreamItem(position=position_at(4), rejection=REJECTION)])
    assert seen == [1, 3] and dummy["labels"].tolist() == [[-100]]


def test_prepared_evaluation_rows_are_read_from_their_bytes():
    rows = [
        {
            "features": row["features"].numpy().tobytes(),
            "labels": row["labels"],
            "index": index,
            "prompt_ids": prompt_ids,
        }
        for index, row, prompt_ids in ((4, TWO, [7, 8]), (0, ONE, None))
    ]
    batch = script.EvalCollator(pad_token_id=9, n_mels=2)(rows)
    assert batch["index"].tolist() == [4, 0]
    assert batch["frames"].tolist() == [[2.0] * 5 + [1.0] * 3] * 2
    assert batch["frame_counts"] == [5, 3]
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 9], [1, 2, 9, -100, -100]]
    assert batch.pop("prompts") == [[7, 8], []]  # only read where they are scored
    assert set(batch) == {"labels", "decoder_input_ids", "frames", "frame_counts", "index"}
