"""report.html in the output folder: what to look at and to listen to after each evaluation.

One self-contained file, written aside and renamed. Nothing that goes wrong with it ends a run.
"""

import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import jinja2
import transformers

from speech_finetuning.base.errors import RunEnded, one_line
from speech_finetuning.base.files import replace_text
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.scoring.alignment import (
    AlignedRow,
    rows_of_files,
    scored_rows,
)
from speech_finetuning.scoring.metrics import Change
from speech_finetuning.scoring.score_table import describe_nonspeech, describe_prompt_words
from speech_finetuning.scoring.scores import (
    BEFORE,
    EVAL,
    PREDICT,
    PROMPTED,
    ROLES,
    TEST,
    UNTOUCHED_PROMPTED,
    UNTOUCHED_TEST,
    ZERO_SHOT,
    last_scores,
    read_scores,
)
from speech_finetuning.sharing.public import (
    Scrubber,
    local_data_folders,
    public_row_id,
    public_run_info,
)
from speech_finetuning.sharing.report_charts import (
    draw_curve_picture,
    histogram,
    learning_charts,
    readable_hours,
    speed_charts,
)
from speech_finetuning.sharing.report_clips import ClipShelf
from speech_finetuning.sharing.report_rows import ScoredSet, changes_of, rows_as_json
from speech_finetuning.training.callbacks import ScoreKeeper, evaluation_name

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent
PAGE = "report.html"
CURVE = "curve.png"
# Where the page that may be uploaded waits for that.
PUBLIC_PAGE = Path("_report") / PAGE
MAX_LISTED_REJECTIONS = 300


@dataclass(kw_only=True)
class Findings:
    """All that the page tells."""

    name: str  # of the model
    group_name: str  # what rows are grouped by
    sets: dict[str, ScoredSet]  # by role
    metrics: dict[str, float]
    changes: dict[tuple[str, str], Change]  # by role and set name
    history: list[dict[str, Any]]
    run_info: dict[str, Any]
    totals: dict[str, float]  # of the training so far
    rejections: list[dict[str, str]]
    training_data: list[dict[str, Any]]  # of the data report
    step: int
    max_steps: int
    best_step: int | None = None  # of the model that is scored on the test split
    # "wer" or "cer" by the name of each set that must not get worse.
    guard_rates: dict[str, str] = field(default_factory=dict)


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
        rows = [row for row in scored_rows(self.trainer.compute_metrics) if self.is_shown(row)]
        if name in ROLES:
            self.take(metrics, rows, eval_set)
            self.write(state)
        else:
            self.tried[name] = (metrics, rows, eval_set)

    def is_shown(self, row: AlignedRow) -> bool:
        """Whether a row is one of those that the page is about: guards have a table of scores."""
        return row.set_name not in self.trainer.guard_bound.rates

    def take_tried(self, label: str, state: transformers.TrainerState) -> None:
        metrics, rows, eval_set = self.tried[label]
        renamed = {name.replace(label, EVAL, 1): value for name, value in metrics.items()}
        self.take(renamed, rows, eval_set)
        self.write(state)

    def take(
        self, metrics: dict[str, float], rows: list[AlignedRow], eval_set: datasets.Dataset
    ) -> None:
        """Notes what an evaluation has found."""
        role = evaluation_name(metrics)
        self.metrics |= metrics
        if not self.sets:
            self.recall_earlier_start(role)
        scored = ScoredSet(role=role, rows=rows)
        if role in BEFORE:
            before = self.sets.get(BEFORE[role])
            scored.before = before.rows if before is not None else []
        if self.shelf.num_clips:
            same_rows = {before: after for after, before in BEFORE.items()}.get(role, role)
            sources = self.speech.get(same_rows, [])
            scored.clips = self.shelf.clips_of(same_rows, scored.rows, eval_set, sources)
        self.sets[role] = scored

    def recall_earlier_start(self, role: str) -> None:
        """What the untouched model had, if this run goes on: it is not scored again."""
        record = self.output_dir / "zero_shot.json"
        if role not in BEFORE or not record.is_file():
            return
        try:
            self.metrics = json.loads(record.read_text(encoding="utf-8")) | self.metrics
            for before in BEFORE.values():
                files = sorted(self.output_dir.glob(f"predictions_{before}*.jsonl"))
                read = rows_of_files(files, self.trainer.compute_metrics)
                rows = [row for row in read if self.is_shown(row)]
                if rows:
                    self.sets[before] = ScoredSet(role=before, rows=rows)
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
        replace_text(self.output_dir / PAGE, render(findings))
        if not self.is_announced:
            self.is_announced = True
            logger.info("to look at and to listen to: %s", self.output_dir / PAGE)
        uploads = self.trainer.uploads
        if uploads is not None and uploads.with_transcripts:
            replace_text(self.output_dir / PUBLIC_PAGE, render(public_findings(findings)))
        if self.shelf.num_clips or uploads is not None:
            baseline = findings.metrics.get("zero_shot_wer")
            if draw_curve_picture(self.output_dir / CURVE, history, baseline):
                self.trainer.card_writer.curve_picture = CURVE


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


# ---------------------------------------------------------------------------------- what is told --
def titles_of(findings: Findings) -> dict[str, str]:
    """What a role is called on the page."""
    after = "as it is"
    if findings.totals["train_rows"]:
        after = (
            f"step {findings.step:,}" if findings.step < findings.max_steps else "after training"
        )
    tested = "test split"
    if findings.best_step not in (None, findings.step):
        tested += f", by the best model (step {findings.best_step:,})"
    return {
        ZERO_SHOT: "before training",
        EVAL: after,
        TEST: tested,
        PREDICT: "predicted",
        UNTOUCHED_TEST: "test split, before training",
        UNTOUCHED_PROMPTED: "with prompts, before training",
        PROMPTED: f"with prompts, {after}",
    }


def score_lines(findings: Findings) -> list[dict[str, Any]]:
    """The lines of the score table."""
    titles = titles_of(findings)
    names = {row.set_name for scored in findings.sets.values() for row in scored.rows} - {""}
    lines = []
    for role in ROLES:
        for name in ["", *sorted(names)]:
            scores = read_scores(findings.metrics, role=role, set_name=name)
            if scores is None or scores.leading is None:
                continue
            rate_name = findings.sets[role].rate_name if role in findings.sets else "WER"
            lines.append(
                {
                    "title": titles[role],
                    "set": name,
                    "is_before": role in BEFORE.values(),
                    "scores": scores,
                    "change": findings.changes.get((role, name)),
                    "rate_name": rate_name,
                    "rate": scores.leading.wer if rate_name == "WER" else scores.leading.cer,
                    "interval": scores.interval if rate_name == "WER" else None,
                }
            )
    return lines


def guard_lines(findings: Findings) -> list[dict[str, Any]]:
    """The lines of the table of what must not get worse."""
    lines = []
    for name, rate in findings.guard_rates.items():
        before = read_scores(findings.metrics, role=ZERO_SHOT, set_name=name)
        after = read_scores(findings.metrics, role=EVAL, set_name=name)
        now = after or before
        if now is None or now.leading is None:
            continue
        line = {"set": name, "rate_name": rate.upper(), "scores": now, "before": None}
        line["change"] = None
        if after is not None and after.leading and before is not None and before.leading:
            line["before"] = before.leading
            interval = after.cer_change if rate == "cer" else after.wer_change
            if interval is not None:
                points = getattr(after.leading, rate) - getattr(before.leading, rate)
                line["change"] = Change(points=points, low=interval.low, high=interval.high)
        lines.append(line)
    return lines


def note_lines(findings: Findings) -> list[str]:
    """What was written where nobody speaks, and of the words in prompts, a sentence for each set
    that has such rows."""
    titles = titles_of(findings)
    names = {row.set_name for scored in findings.sets.values() for row in scored.rows} - {""}
    lines = []
    for role in ROLES:
        for name in ["", *sorted(names)]:
            scores = read_scores(findings.metrics, role=role, set_name=name)
            if scores is None:
                continue
            title = f"{titles[role]} · {name}" if name else titles[role]
            if scores.nonspeech is not None:
                lines.append(f"{title}: {describe_nonspeech(scores.nonspeech).strip()}.")
            if scores.prompt_words is not None:
                lines.append(f"{title}: {describe_prompt_words(scores.prompt_words).strip()}.")
    return lines


def data_of(findings: Findings) -> dict[str, Any]:
    """Rows, hours, durations and tokens of what was trained on and scored."""
    reasons: dict[tuple[str, str], int] = {}
    for rejection in findings.rejections:
        key = (rejection.get("split", ""), rejection.get("reason", ""))
        reasons[key] = reasons.get(key, 0) + 1
    return {
        "reasons": sorted(reasons.items(), key=count_first),
        "rejections": findings.rejections[:MAX_LISTED_REJECTIONS],
        "num_rejections": len(findings.rejections),
        "training": [
            source
            | {
                "duration_bars": histogram(source.get("durations", [])),
                "token_bars": histogram(source.get("tokens", [])),
            }
            for source in findings.training_data
        ],
        "scored": {role: histogram(each.durations) for role, each in findings.sets.items()},
    }


def count_first(entry: tuple[tuple[str, str], int]) -> int:
    return -entry[1]


@functools.cache
def templates() -> jinja2.Environment:
    """Of this folder; compiled once in a process, which takes as long as a page of 100 rows."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["hours"] = readable_hours
    return environment


def render(findings: Findings) -> str:
    """The page. Raises: jinja2.TemplateError."""
    titles = titles_of(findings)
    shown = [scored for role, scored in findings.sets.items() if role not in BEFORE.values()]
    shown = shown or list(findings.sets.values())
    info = findings.run_info
    return (
        templates()
        .get_template("report_template.html")
        .render(
            name=findings.name,
            group_name=findings.group_name,
            base=Path(info["identity"]["model_name_or_path"]).name,
            language=info["identity"].get("language"),
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            step=findings.step,
            max_steps=findings.max_steps,
            titles=titles,
            lines=score_lines(findings),
            notes=note_lines(findings),
            guards=guard_lines(findings),
            learning=learning_charts(findings.history, findings.metrics),
            speed=speed_charts(findings.history),
            sets=shown,
            data=data_of(findings),
            totals=findings.totals,
            info=info,
            rows=rows_as_json(shown, titles),
        )
    )


def public_findings(findings: Findings) -> Findings:
    """The same as everybody may see it: no local names, in texts neither."""
    info = findings.run_info
    scrubber = Scrubber.of(info)
    folders = local_data_folders(info)
    sets = {}
    for role, scored in findings.sets.items():
        sets[role] = replace(
            scored,
            rows=[public_row(row, scrubber, folders) for row in scored.rows],
            before=[public_row(row, scrubber, folders) for row in scored.before],
        )
    rejections = [
        {
            **rejection,
            "row": public_row_id(str(rejection.get("row", "")), folders),
            "detail": scrubber.text(str(rejection.get("detail", ""))),
        }
        for rejection in findings.rejections
    ]
    return replace(
        findings,
        sets=sets,
        run_info=scrubber.json(public_run_info(info)),
        rejections=rejections,
        training_data=scrubber.json(
            [source | {"name": "training data"} for source in findings.training_data]
        ),
    )


def public_row(row: AlignedRow, scrubber: Scrubber, folders: list[str]) -> AlignedRow:
    shown = replace(
        row,
        id=scrubber.text(public_row_id(row.id, folders)),
        group=None if row.group is None else scrubber.text(row.group),
        reference=scrubber.text(row.reference),
        prediction=scrubber.text(row.prediction),
        read_reference=scrubber.text(row.read_reference),
        read_prediction=scrubber.text(row.read_prediction),
    )
    texts = (row.read_reference, row.read_prediction)
    if (shown.read_reference, shown.read_prediction) != texts:
        return replace(shown, operations=None)  # the units are others now
    return shown
