"""What has been trained: counts, limits, figures of the log, and what a checkpoint has of it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.cli import demonstration
from speech_finetuning.data.items import RejectedRow
from speech_finetuning.data.passes import RankShare
from speech_finetuning.data.positions import (
    BlockStart,
    SourcePass,
    SourcePosition,
    StreamPosition,
)
from speech_finetuning.training.progress import StreamProgress, resume_progress


def make_progress(folder: Path, **changes: Any) -> StreamProgress:
    settings = {"max_rejected_fraction": 0.5, "pass_rows": {"": 900}} | changes
    return StreamProgress(output_dir=folder, **settings)


def position_at(row: int, **source: Any) -> StreamPosition:
    return StreamPosition(row=row, sources=(SourcePosition(rows_used=row, **source),))


def reject(rejection: Rejection, source: int = 0, pass_number: int = 0) -> RejectedRow:
    source_pass = SourcePass(source=source, pass_number=pass_number)
    return RejectedRow(rejection=rejection, source_pass=source_pass)


def make_rejections(
    count: int, reason: str = "audio_empty", source: int = 0, pass_number: int = 0
) -> list[RejectedRow]:
    rejections = [Rejection(reason, "", str(number)) for number in range(count)]
    return [reject(rejection, source, pass_number) for rejection in rejections]


def test_a_mix_is_judged_over_all_its_rows(tmp_path: Path):
    progress = make_progress(tmp_path, pass_rows={"big": 900, "small": 4})
    progress.update(position=position_at(5), num_rows=5, rejections=make_rejections(5))
    with pytest.raises(UserError, match="905 of the first 1000|904 of the first 904 rows"):
        progress.update(position=position_at(904), num_rows=899, rejections=make_rejections(899))


def test_a_later_pass_is_checked_by_itself(tmp_path: Path):
    """Four good passes do not outweigh one that cannot be read, nor does a start in between."""
    progress = make_progress(tmp_path, pass_rows={"": 40})
    for row in range(10, 161, 10):
        progress.update(position=position_at(row), num_rows=10, rejections=[])
    rejections = make_rejections(10, pass_number=4)
    progress.update(position=position_at(170), num_rows=10, rejections=rejections)
    state = json.loads(json.dumps(progress.state(micro_batch_size=10, positions=[])))
    restored = make_progress(tmp_path, pass_rows={"": 40})
    restored.restore(state)
    restored.update(position=position_at(180), num_rows=10, rejections=rejections)
    with pytest.raises(UserError, match="rejected: 21 of the 40 rows of pass 5"):
        restored.update(position=position_at(190), num_rows=10, rejections=rejections[:1])


def test_each_source_of_a_mix_is_checked_by_itself(tmp_path: Path):
    progress = make_progress(tmp_path, pass_rows={"big": 2_000, "small": 100, "unknown": None})
    progress.update(position=position_at(1_000), num_rows=1_000, rejections=[])
    rejections = make_rejections(50, source=1)
    progress.update(position=position_at(1_100), num_rows=100, rejections=rejections)
    other = make_rejections(100, source=2) + make_rejections(50, source=1, pass_number=1)
    progress.update(position=position_at(1_300), num_rows=200, rejections=other)
    with pytest.raises(UserError, match="rejected: 51 of the 100 rows of pass 1 over small"):
        progress.update(position=position_at(1_400), num_rows=100, rejections=rejections[:1])


def test_a_pass_without_a_usable_row_ends_whatever_the_limit(tmp_path: Path):
    progress = make_progress(tmp_path, pass_rows={"": 20}, max_rejected_fraction=1.0)
    progress.update(position=position_at(10), num_rows=10, rejections=make_rejections(10))
    with pytest.raises(UserError, match="no usable row in a whole pass: 20 audio_empty"):
        progress.update(position=position_at(20), num_rows=10, rejections=make_rejections(10))


def test_a_run_names_the_damaged_files_at_its_end(
    train: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Three files of ten rows; of one only the footer is whole."""
    folder = demonstration.make_speech(tmp_path / "data", {"train": 30}, num_shards=3)
    file = sorted(folder.glob("*.parquet"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:200] + bytes(len(data) - 2_200) + data[-2_000:])
    words = f"--do_train --max_steps 8 --per_device_train_batch_size 4 --dataset_name {folder}"
    train(words)
    assert f"10 rows lost in each pass: 10 in train/0/1/{file.name}" in caplog.text
    words += f" --max_rejected_fraction 0.3 --output_dir {tmp_path / 'stricter'}"
    with pytest.raises(UserError, match="rejected: 10 of the first 3. rows"):
        train(words)


def test_the_rest_of_a_damaged_file_counts_as_rejected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A pass of 100 rows in two files, of which the second is damaged after 5 rows."""
    rejection = Rejection("file_damaged", "no snappy", "train/0/1/b.parquet", 45)
    caplog.set_level(logging.INFO)
    progress = make_progress(tmp_path, pass_rows={"": 100}, max_rejected_fraction=0.45)
    for row, pass_number in ((56, 0), (112, 1)):
        rejections = [reject(rejection, pass_number=pass_number)]
        progress.update(position=position_at(row), num_rows=56, rejections=rejections)
    progress.log_summary()
    assert "training rows: 112, rejected: 2 file_damaged" in caplog.text
    assert "at least 45 rows lost in each pass: 45 in train/0/1/b.parquet" in caplog.text
    state = json.loads(json.dumps(progress.state(micro_batch_size=28, positions=[])))
    restored = make_progress(tmp_path, pass_rows={"": 100}, max_rejected_fraction=0.45)
    restored.restore(state)
    assert restored == progress
    stricter = make_progress(tmp_path, pass_rows={"": 100}, max_rejected_fraction=0.44)
    stricter.update(position=position_at(28), num_rows=28, rejections=[])
    with pytest.raises(UserError, match="45 of the first 100 rows .* and 44 rows behind them"):
        stricter.update(position=position_at(56), num_rows=28, rejections=[reject(rejection)])


def test_without_damage_the_summary_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    progress = make_progress(tmp_path)
    progress.update(position=position_at(8), num_rows=8, rejections=make_rejections(2))
    progress.log_summary()
    assert [record.getMessage() for record in caplog.records] == [
        "training rows: 8, rejected: 2 audio_empty"
    ]


def test_a_checkpoint_of_an_older_version_says_so(tmp_path: Path):
    start = {"pass": 0, "block": 0, "shard": 0, "shard_state": {"epoch": 0}, "rows": 0}
    state = {"position": {"row": 16, "sources": [{"start": start}]}}
    with pytest.raises(UserError, match="an older version"):
        make_progress(tmp_path).restore(state)


def test_a_checkpoint_restores_what_was_counted(tmp_path: Path):
    known = {"revisions": {"": "abc"}, "phases": [{"settings": {"--learning_rate": 1e-3}}]}
    progress = make_progress(tmp_path, **known)
    progress.update(position=position_at(8), num_rows=8, rejections=make_rejections(2))
    progress.num_skipped_steps = 1
    progress.audio_in_seconds = 12.5
    progress.time_in_seconds = 3.5
    progress.num_nonspeech_rows = 3
    state = json.loads(json.dumps(progress.state(micro_batch_size=4, positions=[])))
    progress.update(position=position_at(16), num_rows=8, rejections=make_rejections(3))
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 5
    restored = make_progress(tmp_path, **known)
    restored.restore(state)
    # Rows that were listed after the checkpoint will be met, and listed, again.
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 2
    assert restored.position == position_at(8)
    assert restored.totals() == {
        "train_rows": 8,
        "train_rejected": 2,
        "train_audio_hours": 12.5 / 3600,
        "train_hours": 3.5 / 3600,
        "train_nonspeech_rows": 3,
    }
    assert restored.num_skipped_steps == 1
    assert restored.state(micro_batch_size=4, positions=[]) == state
    del state["counts"]["num_nonspeech_rows"]  # as earlier checkpoints are
    restored.restore(state)
    assert "train_nonspeech_rows" not in restored.totals()


def test_a_fresh_start_forgets_what_an_earlier_one_listed(tmp_path: Path):
    make_progress(tmp_path).update(
        position=position_at(8), num_rows=8, rejections=make_rejections(2)
    )
    for rank in (1, 0):
        assert (tmp_path / "rejected.jsonl").exists()
        resume_progress(
            checkpoint=None,
            output_dir=tmp_path,
            max_rejected_fraction=0.5,
            datasets=(),
            phases=[],
            rank=rank,
            world_size=2,
        )
    assert not (tmp_path / "rejected.jsonl").exists()


def test_only_the_first_rank_lists_rejections(tmp_path: Path):
    for rank in (1, 0, 1):
        progress = make_progress(tmp_path, share=RankShare(rank=rank, world_size=2))
        progress.update(position=position_at(8), num_rows=8, rejections=make_rejections(2))
        assert progress.rejected.total() == 2
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 2


def test_ranks_of_one_order_leave_out_what_the_others_have_trained_on(tmp_path: Path):
    progress = make_progress(tmp_path, share=RankShare(rank=0, world_size=3))
    progress.update(position=position_at(4), num_rows=12, rejections=[])
    state = progress.state(micro_batch_size=4, positions=[position_at(n) for n in (4, 8, 12)])
    assert state["position"]["row"] + state["position"]["rows_to_skip"] == 12
    assert state["rank_positions"] == []


SHARDED = [RankShare(rank=rank, world_size=2, is_sharded_by_rank=True) for rank in (0, 1)]


def sharded_state(folder: Path) -> dict[str, Any]:
    """A checkpoint of two ranks with files of their own, after 10 and 12 rows."""
    progress = make_progress(folder, share=SHARDED[0])
    progress.update(position=position_at(10), num_rows=22, rejections=[])
    return progress.state(micro_batch_size=4, positions=[position_at(10), position_at(12)])


def test_ranks_with_files_of_their_own_go_on_at_their_own_positions(tmp_path: Path):
    for share, row in zip(SHARDED, (10, 12), strict=True):
        progress = make_progress(tmp_path, share=share)
        progress.restore(sharded_state(tmp_path))
        assert progress.position == position_at(row) and progress.share == share


@pytest.mark.parametrize(
    "share",
    [RankShare(), RankShare(world_size=3, is_sharded_by_rank=True), RankShare(world_size=2)],
)
def test_another_number_of_ranks_begins_the_next_pass(
    tmp_path: Path, share: RankShare, caplog: pytest.LogCaptureFixture
):
    progress = make_progress(tmp_path, share=share)
    progress.restore(sharded_state(tmp_path))
    start = BlockStart(pass_number=1)
    source = SourcePosition(start=start, rows_used=22)
    assert progress.position == StreamPosition(row=22, sources=(source,))
    assert progress.share == share
    assert "the next pass begins" in caplog.text


def test_one_order_is_kept_though_ranks_could_now_have_files_of_their_own(tmp_path: Path):
    progress = make_progress(tmp_path)
    progress.update(position=position_at(8), num_rows=8, rejections=[])
    state = progress.state(micro_batch_size=4, positions=[position_at(8)])
    for share in SHARDED:
        restored = make_progress(tmp_path, share=share)
        restored.restore(state)
        assert not restored.share.is_sharded_by_rank
        assert (restored.share.rank, restored.share.world_size) == (share.rank, 2)
        assert restored.position == position_at(8)


def test_figures_are_passes_shares_and_reasons(tmp_path: Path):
    progress = make_progress(tmp_path, pass_rows={"big": 40, "small": None})
    start = BlockStart(pass_number=1, block=1, rows_before=7)
    position = StreamPosition(
        row=80,
        sources=(
            SourcePosition(start=start, offset=3, rows_per_pass=40, rows_used=50),
            SourcePosition(offset=30, rows_used=30),
        ),
    )
    rejections = [*make_rejections(1, "text_empty"), *make_rejections(2)]
    progress.update(position=position, num_rows=80, rejections=rejections)
    progress.num_skipped_steps = 2
    assert progress.figures() == {
        "pass_big": 1.25,
        "share_big": 0.625,
        "pass_small": 0.0,  # not known before its first pass is over
        "share_small": 0.375,
        "rows": 80,
        "rejected": 3,
        "rejected_audio_empty": 2,
        "rejected_text_empty": 1,
        "skipped_steps": 2,
    }


def test_a_rank_with_files_of_its_own_counts_passes_over_them(tmp_path: Path):
    progress = make_progress(tmp_path, pass_rows={"": 100}, share=SHARDED[1])
    progress.update(position=position_at(20, offset=20), num_rows=40, rejections=[])
    assert progress.figures()["pass"] == 0.4
