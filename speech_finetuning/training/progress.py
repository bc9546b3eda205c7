"""What has been trained so far."""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import describe_counts, list_rejections
from speech_finetuning.data.positions import position_after_resharding

logger = logging.getLogger(__name__)

ROWS_BEFORE_REJECTION_CHECK = 1_000


@dataclass
class StreamProgress:
    """What has been trained so far, as opposed to what the worker has already prepared."""

    COUNTS = ("num_rows", "num_skipped_steps", "audio_in_seconds", "time_in_seconds")
    output_dir: Path
    max_rejected_fraction: float
    pass_rows: dict[str, int | None]  # rows of a pass of each source, None until they are known
    rank: int = 0
    world_size: int = 1
    is_sharded_by_rank: bool = False  # every rank has files, and so a position, of its own
    position: dict[str, Any] | None = None
    num_rows: int = 0
    rejected: Counter = field(default_factory=Counter)
    num_skipped_steps: int = 0  # steps whose loss was not finite
    audio_in_seconds: float = 0.0  # trained on, repeated passes included
    time_in_seconds: float = 0.0  # spent training, scoring not included

    def update(self, ride: dict[str, Any]) -> None:
        """Counts a step's rows, of all ranks, and lists its rejections. Raises: UserError if there are too many, on
        every rank, as all have the same counts."""
        whole = (
            sum(self.pass_rows.values())
            if all(self.pass_rows.values())
            else ROWS_BEFORE_REJECTION_CHECK
        )
        limit = min(ROWS_BEFORE_REJECTION_CHECK, whole)
        was_judged = self.num_rows >= limit
        self.position, self.num_rows = ride["position"], self.num_rows + ride["num_rows"]
        self.rejected.update(rejection.reason for rejection in ride["rejections"])
        list_rejections(self.output_dir, "train", ride["rejections"] if self.rank == 0 else [])
        if self.num_rows >= limit and not was_judged:
            self.judge()

    def judge(self) -> None:
        """Raises UserError if more rows were rejected than --max_rejected_fraction allows."""
        if self.rejected.total() > self.max_rejected_fraction * self.num_rows:
            found = f"{self.rejected.total()} of the first {self.num_rows} rows were rejected"
            limit = f"more than --max_rejected_fraction {self.max_rejected_fraction:g}"
            where = f"See {self.output_dir / 'rejected.jsonl'}; mend them or raise the limit."
            raise UserError(f"{found} ({describe_counts(self.rejected)}), {limit}. {where}")

    def figures(self) -> dict[str, float]:
        """For the log: passes over each source and its share of the rows, rows used and rejected (by reason)."""
        figures: dict[str, float] = {}
        for (name, num_rows), place in zip(
            self.pass_rows.items(), self.position["sources"], strict=True
        ):
            share = num_rows / self.world_size if num_rows and self.is_sharded_by_rank else num_rows
            num_rows, start = place["rows_per_pass"] or share, place["start"]
            part = min(1.0, (start["rows"] + place["offset"]) / num_rows) if num_rows else 0.0
            figures[f"pass_{name}".rstrip("_")] = round(start["pass"] + part, 4)
            figures |= (
                {f"share_{name}": round(place["used"] / self.position["row"], 4)} if name else {}
            )
        reasons = {f"rejected_{reason}": count for reason, count in sorted(self.rejected.items())}
        skipped = {"skipped_steps": self.num_skipped_steps} if self.num_skipped_steps else {}
        return {
            **figures,
            "rows": self.num_rows,
            "rejected": self.rejected.total(),
            **reasons,
            **skipped,
        }

    def totals(self) -> dict[str, float]:
        """For the metrics and the card, by what is known so far."""
        hours = {
            "train_audio_hours": self.audio_in_seconds / 3600,
            "train_hours": self.time_in_seconds / 3600,
        }
        return {"train_rows": self.num_rows, "train_rejected": self.rejected.total(), **hours}

    def state(self, micro_batch_size: int, positions: list[dict[str, Any]]) -> dict[str, Any]:
        """For stream_state.json. positions: of every rank. Where they are parts of one order, rank 0 takes the first
        micro-batch of each round, the others' rows follow it."""
        listing, skip = self.output_dir / "rejected.jsonl", micro_batch_size * (self.world_size - 1)
        return {
            "position": self.position | {"skip": 0 if self.is_sharded_by_rank else skip},
            "dealt": [position | {"skip": 0} for position in positions if self.is_sharded_by_rank],
            "counts": {name: getattr(self, name) for name in self.COUNTS},
            "rejected": dict(self.rejected),
            "rejected_bytes": listing.stat().st_size if listing.exists() else 0,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint saved; rows that were listed after it will be met, and listed, again. A global
        order is kept, whatever the number of ranks now; ranks with files of their own need the same number.
        Raises: UserError if an older version wrote it."""
        if "shard_row" not in state["position"]["sources"][0]["start"]:
            advice = "Finish the run with that version, or start anew in another --output_dir."
            raise UserError(
                f"the checkpoint's place in the data is in the form of an older version. {advice}"
            )
        positions, was_possible = state.get("dealt", []), self.is_sharded_by_rank
        self.is_sharded_by_rank, self.position, self.rejected = (
            False,
            state["position"],
            Counter(state["rejected"]),
        )
        if positions and was_possible and len(positions) == self.world_size:
            self.is_sharded_by_rank, self.position = True, positions[self.rank]
        elif positions:
            logger.warning(
                "the files were dealt to %d processes: the next pass begins.", len(positions)
            )
            self.is_sharded_by_rank, self.position = (
                was_possible,
                position_after_resharding(positions),
            )
        vars(self).update(state["counts"])
        listing = self.output_dir / "rejected.jsonl"
        if self.rank == 0 and listing.exists() and listing.stat().st_size > state["rejected_bytes"]:
            os.truncate(listing, state["rejected_bytes"])
