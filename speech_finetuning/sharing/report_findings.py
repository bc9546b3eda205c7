"""What the report page tells of a run, and the page itself, as text."""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2

from speech_finetuning.base.files import counted
from speech_finetuning.scoring.alignment import AlignedRow
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
    Scores,
    read_scores,
)
from speech_finetuning.sharing.public import (
    Scrubber,
    local_data_folders,
    public_row_id,
    public_run_info,
)
from speech_finetuning.sharing.report_charts import (
    histogram,
    learning_charts,
    readable_hours,
    speed_charts,
)
from speech_finetuning.sharing.report_rows import ScoredSet, rows_as_json

TEMPLATES = Path(__file__).parent
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


def names_with_lines(findings: Findings) -> list[str]:
    """Those of the sets that have lines of their own beside the total. A single one, beside guards,
    is the total."""
    names = {row.set_name for scored in findings.sets.values() for row in scored.rows} - {""}
    return sorted(names) if len(names) > 1 or not findings.guard_rates else []


def scored_sets(findings: Findings) -> Iterator[tuple[str, str, Scores]]:
    """(role, name, scores) of all that was scored; the name is empty for all sets of a role."""
    for role in ROLES:
        for name in ["", *names_with_lines(findings)]:
            scores = read_scores(findings.metrics, role=role, set_name=name)
            if scores is not None:
                yield role, name, scores


def score_lines(findings: Findings) -> list[dict[str, Any]]:
    """The lines of the score table."""
    titles = titles_of(findings)
    lines = []
    for role, name, scores in scored_sets(findings):
        if scores.leading is None:
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
    lines = []
    for role, name, scores in scored_sets(findings):
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
    environment.filters["counted"] = counted
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
            guards=[public_row(row, scrubber, folders) for row in scored.guards],
            guards_before=[public_row(row, scrubber, folders) for row in scored.guards_before],
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
