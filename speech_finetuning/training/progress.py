"""What has been trained so far."""

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted
from speech_finetuning.base.rejections import (
    TRAIN,
    describe_counts,
    list_rejections,
    rejection_lines,
    restart_listing,
)
from speech_finetuning.data.items import RejectedRow
from speech_finetuning.data.passes import ONE_RANK, RankShare
from speech_finetuning.data.positions import (
    VERSION,
    SourcePass,
    StreamPosition,
    in_this_version,
    position_after_resharding,
)
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.selection import HoldOut
from speech_finetuning.data.stream import can_shard_by_rank

logger = logging.getLogger(__name__)

ROWS_BEFORE_REJECTION_CHECK = 1_000


@dataclass(kw_only=True)
class StreamProgress:
    """What has been trained so far, as opposed to what the worker has already prepared. Counts are
    of all ranks together; `position` is this rank's."""

    output_dir: Path
    max_rejected_fraction: float
    pass_rows: dict[str, int | None]  # rows of a pass of each source, None until they are known
    revisions: dict[str, str | None] = field(default_factory=dict)  # of each source on the Hub
    phases: list[dict[str, Any]] = field(default_factory=list)  # see training.phases
    hold_outs: dict[str, HoldOut] = field(default_factory=dict)  # of the sources that have one
    share: RankShare = ONE_RANK
    position: StreamPosition | None = None  # None: the beginning
    num_rows: int = 0  # rejected ones included
    rejected: Counter[str] = field(default_factory=Counter)  # rows by reason
    num_lost_rows: int = 0  # behind a rejection that stands for the rest of a damaged file
    damaged_files: dict[str, int] = field(default_factory=dict)  # rows lost in a pass of each
    rejected_bytes: int = 0  # of their lines in rejected.jsonl, which earlier versions cut there
    rejected_in_pass: Counter[SourcePass] = field(default_factory=Counter)  # rows
    num_skipped_steps: int = 0  # steps whose loss was not finite
    audio_in_seconds: float = 0.0  # trained on, repeated passes included
    num_nonspeech_rows: int = 0  # that --nonspeech_fraction has made, and were trained on
    time_in_seconds: float = 0.0  # spent training, scoring not included

    def update(
        self, *, position: StreamPosition, num_rows: int, rejections: list[RejectedRow]
    ) -> None:
        """Counts a step's rows, of all ranks, and lists its rejections. Raises: UserError if there
        are too many, on every rank, as all have the same counts."""
        rows_before = self.rows_met()
        self.position = position
        self.num_rows += num_rows
        for rejected in rejections:
            self.count_rejection(rejected)
        if self.share.rank == 0:
            listed = [rejected.rejection for rejected in rejections]
            list_rejections(self.output_dir, TRAIN, listed)
            self.rejected_bytes += len(rejection_lines(TRAIN, listed).encode())
        if rows_before < self.rows_before_check() <= self.rows_met():
            self.check_rejections()
        if self.rows_before_check() <= self.rows_met():
            self.check_passes(rejections)

    def count_rejection(self, rejected: RejectedRow) -> None:
        rejection = rejected.rejection
        self.rejected[rejection.reason] += 1
        self.num_lost_rows += rejection.num_rows - 1
        if rejection.reason == "file_damaged":
            self.damaged_files[rejection.row] = rejection.num_rows
        self.rejected_in_pass[rejected.source_pass] += rejection.num_rows

    def rows_met(self) -> int:
        """Rows used, and those that could not be read."""
        return self.num_rows + self.num_lost_rows

    def rows_before_check(self) -> int:
        """1,000, or a whole pass if it is shorter."""
        known = [num_rows for num_rows in self.pass_rows.values() if num_rows]
        if len(known) < len(self.pass_rows):
            return ROWS_BEFORE_REJECTION_CHECK
        return min(ROWS_BEFORE_REJECTION_CHECK, sum(known))

    def check_rejections(self) -> None:
        """Checks all rows so far. Raises: UserError if more were rejected than
        --max_rejected_fraction allows."""
        num_rejected = self.rejected.total() + self.num_lost_rows
        if num_rejected > self.max_rejected_fraction * self.rows_met():
            rows = counted(self.rows_met(), "row")
            self.raise_rejected(f"rejected: {num_rejected:,} of the first {rows}")

    def check_passes(self, rejections: list[RejectedRow]) -> None:
        """Checks the passes of these rows, so that a run of many steps does not go on for long with
        a source that has become unreadable; where the rows of a pass are not known, nothing.
        Raises: UserError if more were rejected than --max_rejected_fraction allows."""
        for rejected in rejections:
            this_pass = rejected.source_pass
            name, num_rows = list(self.pass_rows.items())[this_pass.source]
            num_rejected = self.rejected_in_pass[this_pass]
            if num_rows is None:
                continue
            over = f" over {name}" if name else ""
            if num_rejected > self.max_rejected_fraction * num_rows:
                self.raise_rejected(
                    f"rejected: {num_rejected:,} of the {counted(num_rows, 'row')} of pass "
                    f"{this_pass.pass_number + 1}{over}"
                )
            if num_rejected >= num_rows:  # nothing would ever be trained, whatever the limit
                reasons = describe_counts(self.rejected)
                raise UserError(f"no usable row in a whole pass{over}: {reasons}.")

    def raise_rejected(self, found: str) -> NoReturn:
        reasons = describe_counts(self.rejected)
        if self.num_lost_rows:
            reasons += f", and {counted(self.num_lost_rows, 'row')} behind them in damaged files"
        raise UserError(
            f"{found} ({reasons}), more than --max_rejected_fraction "
            f"{self.max_rejected_fraction:g}. See {self.output_dir / 'rejected.jsonl'}; fix them "
            f"or raise the limit."
        )

    def log_summary(self) -> None:
        """At the end of the training: the rows, and which were lost in damaged files."""
        logger.info(
            "training rows: %s, rejected: %s",
            f"{self.num_rows:,}",
            describe_counts(self.rejected),
        )
        if self.num_nonspeech_rows:
            logger.info(
                "%s of the training rows became noise or silence (--nonspeech_fraction)",
                f"{self.num_nonspeech_rows:,}",
            )
        if self.damaged_files:
            files = [f"{count} in {name}" for name, count in sorted(self.damaged_files.items())]
            logger.warning(
                "damaged files: at least %s lost in each pass: %s",
                counted(sum(self.damaged_files.values()), "row"),
                ", ".join(files),
            )

    def figures(self) -> dict[str, float]:
        """For the log: passes over each source and its share of the rows, rows used and rejected
        (by reason)."""
        figures: dict[str, float] = {}
        for number, name in enumerate(self.pass_rows):
            figures[f"pass_{name}".rstrip("_")] = round(self.passes(number), 4)
            if name:
                assert self.position is not None
                rows_used = self.position.sources[number].rows_used
                figures[f"share_{name}"] = round(rows_used / self.position.row, 4)
        figures["rows"] = self.num_rows
        figures["rejected"] = self.rejected.total()
        for reason, count in sorted(self.rejected.items()):
            figures[f"rejected_{reason}"] = count
        if self.num_nonspeech_rows:
            figures["nonspeech_rows"] = self.num_nonspeech_rows
        if self.num_skipped_steps:
            figures["skipped_steps"] = self.num_skipped_steps
        return figures

    def passes(self, number: int) -> float:
        """Passes over the n-th source, with the part of the present one if its length is known."""
        assert self.position is not None
        source = self.position.sources[number]
        num_rows = source.rows_per_pass or self.expected_rows(number)
        if num_rows is None:
            return float(source.start.pass_number)
        part = (source.start.rows_before + source.offset) / num_rows
        return source.start.pass_number + min(1.0, part)

    def expected_rows(self, number: int) -> float | None:
        """Of a pass of this rank over the n-th source, where they can be known without reading."""
        num_rows = list(self.pass_rows.values())[number]
        if num_rows is not None and self.share.is_sharded_by_rank:
            return num_rows / self.share.world_size
        return num_rows

    def totals(self) -> dict[str, float]:
        """For the metrics and the card, by what is known so far."""
        totals: dict[str, float] = {
            "train_rows": self.num_rows,
            "train_rejected": self.rejected.total(),
            "train_audio_hours": self.audio_in_seconds / 3600,
            "train_hours": self.time_in_seconds / 3600,
        }
        if self.num_nonspeech_rows:
            totals["train_nonspeech_rows"] = self.num_nonspeech_rows
        return totals

    def state(self, *, micro_batch_size: int, positions: list[StreamPosition]) -> dict[str, Any]:
        """For stream_state.json, as plain JSON. positions: of every rank."""
        assert self.position is not None
        if self.share.is_sharded_by_rank:
            position = self.position
            rank_positions = positions
        else:
            # Rank 0 takes the first micro-batch of each round, the others' rows follow it.
            rows_to_skip = micro_batch_size * (self.share.world_size - 1)
            position = replace(self.position, rows_to_skip=rows_to_skip)
            rank_positions = []
        return {
            "version": VERSION,
            "position": position.to_json(),
            "rank_positions": [each.to_json() for each in rank_positions],
            "counts": {
                "num_rows": self.num_rows,
                "num_lost_rows": self.num_lost_rows,
                "num_skipped_steps": self.num_skipped_steps,
                "audio_in_seconds": self.audio_in_seconds,
                "num_nonspeech_rows": self.num_nonspeech_rows,
                "time_in_seconds": self.time_in_seconds,
            },
            "rejected": dict(self.rejected),
            "rejected_in_pass": [
                {**asdict(this_pass), "num_rows": count}
                for this_pass, count in sorted(self.rejected_in_pass.items())
            ],
            "damaged_files": self.damaged_files,
            "rejected_bytes": self.rejected_bytes,
            "revisions": self.revisions,
            "settings": self.phases[-1]["settings"] if self.phases else {},
            "phases": self.phases,
            "hold_outs": {name: hold_out.to_json() for name, hold_out in self.hold_outs.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint's stream_state.json contains; rows that were listed after it
        will be met, and listed, again. Raises: UserError if another version wrote it."""
        state = in_this_version(state)
        counts = state["counts"]
        self.num_rows = counts["num_rows"]
        self.num_lost_rows = counts["num_lost_rows"]
        self.num_skipped_steps = counts["num_skipped_steps"]
        self.audio_in_seconds = counts["audio_in_seconds"]
        self.num_nonspeech_rows = counts.get("num_nonspeech_rows", 0)  # none in earlier checkpoints
        self.time_in_seconds = counts["time_in_seconds"]
        self.rejected = Counter(state["rejected"])
        self.rejected_bytes = state["rejected_bytes"]
        self.rejected_in_pass = Counter()
        for entry in state["rejected_in_pass"]:
            this_pass = SourcePass(source=entry["source"], pass_number=entry["pass_number"])
            self.rejected_in_pass[this_pass] = entry["num_rows"]
        self.damaged_files = dict(state["damaged_files"])
        self.restore_position(
            StreamPosition.from_json(state["position"]),
            [StreamPosition.from_json(position) for position in state["rank_positions"]],
        )
        if self.share.rank == 0:
            restart_listing(self.output_dir, num_trained=self.rejected.total())

    def restore_position(
        self, position: StreamPosition, rank_positions: list[StreamPosition]
    ) -> None:
        """A global order is kept, whatever the number of ranks now; ranks with files of their own
        need the same number."""
        num_ranks = len(rank_positions)
        if num_ranks == 0:
            self.share = replace(self.share, is_sharded_by_rank=False)
            self.position = position
        elif self.share.is_sharded_by_rank and num_ranks == self.share.world_size:
            self.position = rank_positions[self.share.rank]
        else:
            logger.warning("the files were dealt to %d processes: the next pass begins.", num_ranks)
            self.position = position_after_resharding(rank_positions)


def resume_progress(
    *,
    checkpoint: Path | None,
    output_dir: Path,
    max_rejected_fraction: float,
    datasets: tuple[SpeechDataset, ...],
    phases: list[dict[str, Any]],
    rank: int,
    world_size: int,
) -> StreamProgress:
    """What has been trained so far, and so where the stream goes on: nothing yet, or what the
    checkpoint says."""
    progress = StreamProgress(
        output_dir=output_dir,
        max_rejected_fraction=max_rejected_fraction,
        pass_rows={dataset.source.record: dataset.rows_per_pass() for dataset in datasets},
        revisions={dataset.source.record: dataset.source.revision for dataset in datasets},
        phases=phases,
        hold_outs={
            dataset.source.record: dataset.selection.hold_out
            for dataset in datasets
            if dataset.selection is not None and dataset.selection.hold_out is not None
        },
        share=RankShare(
            rank=rank,
            world_size=world_size,
            is_sharded_by_rank=can_shard_by_rank(datasets, world_size),
        ),
    )
    if checkpoint is None:
        if rank == 0:
            restart_listing(output_dir, num_trained=None)
    else:
        state = (checkpoint / "stream_state.json").read_text(encoding="utf-8")
        progress.restore(json.loads(state))
    return progress
