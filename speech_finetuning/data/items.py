"""What the stream delivers: rows with their positions, and what a micro-batch tells of them."""

from dataclasses import dataclass
from typing import Any

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.positions import SourcePass, StreamPosition


@dataclass(frozen=True, kw_only=True)
class StreamItem:
    """What became of one row: an example, or a rejection, or an error that ends the stream."""

    position: StreamPosition | None  # after this row; None with an error
    example: dict[str, Any] | None = None  # as Preprocessor makes it
    rejection: Rejection | None = None
    error: Exception | None = None  # as data: a DataLoader's worker would lose its type

    def place(self) -> StreamPosition:
        """The position of an item that is no error."""
        assert self.position is not None
        return self.position

    def content(self) -> dict[str, Any]:
        """The example of an item that has one."""
        assert self.example is not None
        return self.example


@dataclass(frozen=True, kw_only=True)
class RejectedRow:
    """A rejection, and the pass in which it was met."""

    rejection: Rejection
    source_pass: SourcePass


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What the trainer has to know of a micro-batch beside its tensors."""

    position: StreamPosition | None  # after its last row; None if that is an error
    num_rows: int  # rejected ones included
    ids: list[str]  # of the accepted rows
    audio_in_seconds: float  # of the accepted rows
    num_nonspeech_rows: int  # of the accepted rows that became noise or silence
    rejections: list[RejectedRow]
    error: Exception | None  # ends the run

    @classmethod
    def of(cls, items: list[StreamItem]) -> "StepInfo":
        examples = [item.example for item in items if item.example is not None]
        rejections = [
            RejectedRow(rejection=item.rejection, source_pass=item.place().last_pass())
            for item in items
            if item.rejection is not None
        ]
        errors = [item.error for item in items if item.error is not None]
        return cls(
            position=items[-1].position,
            num_rows=len(items),
            ids=[example["id"] for example in examples],
            audio_in_seconds=sum(example["duration"] for example in examples),
            num_nonspeech_rows=sum("is_nonspeech" in example for example in examples),
            rejections=rejections,
            error=errors[0] if errors else None,
        )
