"""report.html in the output folder: what to look at and to listen to after each evaluation.

One self-contained file, written aside and renamed; sounds and pictures of its clips follow a few seconds
later, as they are read and drawn beside the training. Nothing that goes wrong with it ends a run.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers

from speech_finetuning.base.errors import RunEnded, one_line
from speech_finetuning.base.files import replace_text
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.scoring.alignment import (
    AlignedRow,
    rows_of_files,
    scored_rows,
)
from speech_finetuning.scoring.scores import BEFORE, EVAL, ROLES, TEST, last_scores
from speech_finetuning.sharing.picture_process import fill_places
from speech_finetuning.sharing.report_charts import points_of
from speech_finetuning.sharing.report_clips import ClipShelf
from speech_finetuning.sharing.report_findings import Findings, public_findings, render
from speech_finetuning.sharing.report_pictures import Painter, PictureOrder
from speech_finetuning.sharing.report_rows import ScoredSet, changes_of
from speech_finetuning.sharing.report_sounds import SoundOrder, SoundReader
from speech_finetuning.training.callbacks import ScoreKeeper, evaluation_name

logger = logging.getLogger(__name__)

PAGE = "report.html"
CURVE = "curve.png"
# Where the page that may be uploaded waits for that.
PUBLIC_PAGE = Path("_report") / PAGE
DRAWING = Path("_report") / "drawing"  # what a process draws pictures from


class ReportPage(ScoreKeeper):
    """Writes report.html after each evaluation, and the learning curve for the model card."""

    def __init__(
        self, trainer: Any, speech: dict[str, list[SpeechDataset]], data_args: Any
    ) -> None:
        """trainer: a SpeechTrainer. speech: its data sets by role. data_args: the script's, with
        report_clips and group_column_name."""
        self.trainer = trainer
        self.speech = speech
        self.shelf = ClipShelf(num_clips=data_args.report_clips)
        self.group_name: str = data_args.group_column_name or "speaker"
        self.output_dir: Path = trainer.output_dir()
        self.reader = SoundReader()
        self.painter = Painter(folder=self.output_dir / DRAWING)
        self.waiting: PictureOrder | None = None  # for its sounds
        self.drawing: PictureOrder | None = None
        self.sets: dict[str, ScoredSet] = {}
        self.metrics: dict[str, float] = {}
        self.is_announced = False
        # By label, of weights that were tried: metrics, rows and the prepared set.
        self.tried: dict[str, tuple[dict[str, float], list[AlignedRow], datasets.Dataset]] = {}
        if (self.output_dir / CURVE).is_file():  # of an earlier start
            trainer.card_writer.curve_picture = CURVE

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises: RunEnded of a signal, and nothing else."""
        if state.is_world_process_zero:
            self.attempt(self.follow, metrics or {}, eval_dataloader.dataset, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A process is forked next, in which what a thread locks at that moment stays locked. None
        reads yet, unless something was scored that `take` does not know of."""
        self.attempt(self.reader.wait)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A curve that has been drawn meanwhile goes onto the card of the next save."""
        if self.waiting is not None or self.painter.is_finished():
            self.attempt(self.advance)

    def advance(self) -> None:
        """Has drawn what has its sounds by now, and takes what has been drawn. Raises: OSError."""
        if self.painter.is_finished():
            self.collect()
        if not self.reader.is_reading():
            self.draw()

    def draw(self) -> None:
        """Has the newest page completed with what has been read. Raises: OSError."""
        order = self.waiting
        if order is None:
            return
        self.waiting = None
        order.sounds = self.shelf.put_sounds(self.reader.collect())
        if order.sounds or order.spectrograms or order.curve is not None:
            self.painter.start(order)
            self.drawing = order

    def collect(self) -> None:
        """Takes what has been drawn; waits for it. Raises: OSError."""
        pictures = self.painter.collect()
        if (
            pictures is None and self.drawing is not None
        ):  # what has been read is there all the same
            for path, page in self.drawing.pages.items():
                replace_text(path, fill_places(page, self.drawing.places, self.drawing.sounds))
        self.drawing = None
        self.shelf.put_pictures(pictures or {})
        if (self.output_dir / CURVE).is_file():
            self.trainer.card_writer.curve_picture = CURVE

    def finish(self) -> None:
        """Waits until the last page is complete, or time is up. Raises: OSError."""
        self.reader.wait()
        self.draw()
        self.collect()

    def adopt(self, label: str, state: transformers.TrainerState) -> None:
        """The page is of the weights that are saved, not of those that were scored last."""
        self.attempt(self.take_tried, label, state)

    def attempt(self, write: Callable[..., None], *args: Any) -> None:
        """write(*args); a page to look at is never worth a run. Raises: RunEnded."""
        try:
            write(*args)
        except RunEnded:
            raise
        except Exception as error:
            kind = type(error).__name__
            logger.warning("%s could not be written: %s: %s", PAGE, kind, one_line(error)[:300])

    def follow(self, metrics: dict[str, float], eval_set: datasets.Dataset, state: Any) -> None:
        """Writes what an evaluation has found; of weights that are only tried it is kept."""
        name = evaluation_name(metrics)
        rows = scored_rows(self.trainer.compute_metrics)
        if name in ROLES:
            self.take(metrics, rows, eval_set)
            self.write(state)
        else:
            self.tried[name] = (metrics, rows, eval_set)

    def is_guard(self, row: AlignedRow) -> bool:
        """Whether a row is of what must not get worse: the page is about the others."""
        return row.set_name in self.trainer.guard_bound.rates

    def without_guards(self, role: str, rows: list[AlignedRow]) -> ScoredSet:
        """The rows of an evaluation, those of guards aside."""
        return ScoredSet(
            role=role,
            rows=[row for row in rows if not self.is_guard(row)],
            guards=[row for row in rows if self.is_guard(row)],
        )

    def take_tried(self, label: str, state: transformers.TrainerState) -> None:
        metrics, rows, eval_set = self.tried[label]
        renamed = {name.replace(label, EVAL, 1): value for name, value in metrics.items()}
        self.take(renamed, rows, eval_set)
        self.write(state)

    def take(
        self, metrics: dict[str, float], rows: list[AlignedRow], eval_set: datasets.Dataset
    ) -> None:
        """Notes what an evaluation has found."""
        if self.painter.is_finished():
            self.collect()
        self.painter.cancel()  # the page that is written next has all that was to be drawn
        self.drawing = None
        self.shelf.sounds |= self.reader.collect()
        role = evaluation_name(metrics)
        self.metrics |= metrics
        if not self.sets:
            self.recall_earlier_start(role)
        scored = self.without_guards(role, rows)
        before = self.sets.get(BEFORE.get(role, ""))
        if before is not None:
            scored.before = before.rows
            scored.guards_before = before.guards
        if self.shelf.num_clips:
            same_rows = {before: after for after, before in BEFORE.items()}.get(role, role)
            scored.clips = self.shelf.clips_of(same_rows, scored.rows, eval_set)
            # Before a training they come with its first evaluation: a process is forked in between.
            if role not in BEFORE.values() or not self.trainer.args.do_train:
                self.read_sounds(same_rows, scored, eval_set)
        self.sets[role] = scored

    def read_sounds(self, role: str, scored: ScoredSet, eval_set: datasets.Dataset) -> None:
        """Has those read that are not there yet."""
        keys = {key for key, _ in self.shelf.unheard.values()} - self.reader.asked
        rows = [row for row in scored.rows if (role, row.index) in keys]
        sources = self.speech.get(role, [])
        if rows:
            self.reader.start(SoundOrder(role=role, rows=rows, eval_set=eval_set, sources=sources))

    def recall_earlier_start(self, role: str) -> None:
        """What the untouched model had, if this run goes on: it is not scored again."""
        record = self.output_dir / "zero_shot.json"
        if role not in BEFORE or not record.is_file():
            return
        try:
            self.metrics = json.loads(record.read_text(encoding="utf-8")) | self.metrics
            for before in BEFORE.values():
                files = sorted(self.output_dir.glob(f"predictions_{before}*.jsonl"))
                rows = rows_of_files(files, self.trainer.compute_metrics)
                if rows:
                    self.sets[before] = self.without_guards(before, rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: the untouched model's rows: %s", PAGE, one_line(error)[:300])

    def write(self, state: Any) -> None:
        """The page, the page that may be uploaded, and the curve. Raises: OSError, jinja2's."""
        history = list(state.log_history)
        findings = Findings(
            name=self.trainer.card_writer.model_name,
            group_name=self.group_name,
            sets=self.sets,
            metrics=last_scores(history) | self.metrics,
            changes=changes_of(self.sets),
            guard_rates=self.trainer.guard_bound.rates,
            history=history,
            run_info=self.trainer.card_writer.run_info,
            totals=self.trainer.progress.totals(),
            rejections=read_lines(self.output_dir / "rejected.jsonl"),
            training_data=read_lines(self.output_dir / "data_report.jsonl"),
            step=state.global_step,
            max_steps=state.max_steps,
            best_step=state.best_global_step if TEST in self.sets else None,
        )
        pages = {self.output_dir / PAGE: render(findings)}
        uploads = self.trainer.uploads
        if uploads is not None and uploads.with_transcripts:
            pages[self.output_dir / PUBLIC_PAGE] = render(public_findings(findings))
        for path, page in pages.items():
            replace_text(path, fill_places(page, self.shelf.places(), {}))
        if not self.is_announced:
            self.is_announced = True
            logger.info("report, to look at and listen to: %s", self.output_dir / PAGE)
        self.have_drawn(pages, findings)

    def have_drawn(self, pages: dict[Path, str], findings: Findings) -> None:
        """The pictures of these pages, and the learning curve for the card. Raises: OSError."""
        curve = None
        points = points_of(findings.history, "eval_wer")
        if points and (self.shelf.num_clips or self.trainer.uploads is not None):
            curve = {
                "points": points,
                "baseline": findings.metrics.get("zero_shot_wer"),
                "target": str((self.output_dir / CURVE).resolve()),
            }
        self.waiting = PictureOrder(
            spectrograms=dict(self.shelf.spectrograms),
            pages=pages,
            places=self.shelf.places(),
            curve=curve,
        )
        self.advance()


def final_card(trainer: Any, metrics: dict[str, float]) -> str:
    """The text of the card at the end of a SpeechTrainer's run, after a wait of at most three minutes
    for the sounds and pictures of the last report."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ReportPage):
            callback.attempt(callback.finish)
    return trainer.card_writer.write(metrics, trainer.state.log_history)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; none if there is none. A kill may have torn its last line."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records
