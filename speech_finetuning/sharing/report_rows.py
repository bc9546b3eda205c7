"""What the report page says of scored rows: summaries, and the rows themselves as compact JSON."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from speech_finetuning.scoring.alignment import (
    AlignedRow,
    CommonErrors,
    change_between,
    count_common_errors,
    pair_rows,
)
from speech_finetuning.scoring.metrics import (
    Change,
    WordCounts,
    bootstrap_interval,
    total_counts,
)
from speech_finetuning.sharing.report_clips import Clip

NUM_COMMON_ERRORS = 20
MAX_GROUPS = 50
# Right ends of the ranges of duration, in seconds.
DURATIONS = (1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30)
MAX_ROWS_IN_BYTES = 7_500_000  # of JSON: with the clips the page stays below 15 MB
MAX_CLIPS_IN_BYTES = 6_500_000


@dataclass(kw_only=True)
class ScoredSet:
    """The rows of one evaluation."""

    role: str
    rows: list[AlignedRow]
    before: list[AlignedRow] = field(default_factory=list)  # by the untouched model
    clips: dict[int, Clip] = field(default_factory=dict)  # by the rows' index
    # Rows of what must not get worse, which count in nothing else here.
    guards: list[AlignedRow] = field(default_factory=list)
    guards_before: list[AlignedRow] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What most rows are counted in."""
        return Counter(row.unit for row in self.rows).most_common(1)[0][0] if self.rows else ""

    @property
    def rate_name(self) -> str:
        return "CER" if self.unit == "character" else "WER"

    def sets(self) -> list[dict[str, Any]]:
        """The entries of a mix that the rows are of, guards last: name, and what is counted."""
        units = {row.set_name: row.unit for row in [*self.rows, *self.guards]}
        guards = {row.set_name for row in self.guards}
        ordered = [*sorted(units.keys() - guards), *sorted(guards)]
        return [{"name": name, "unit": units[name], "isGuard": name in guards} for name in ordered]

    def common_errors(self) -> dict[str, list[tuple[Any, int]]]:
        """The most frequent ones of each kind, with their counts."""
        common: CommonErrors = count_common_errors(self.rows)
        return {
            "substitutions": common.substitutions.most_common(NUM_COMMON_ERRORS),
            "deletions": common.deletions.most_common(NUM_COMMON_ERRORS),
            "insertions": common.insertions.most_common(NUM_COMMON_ERRORS),
        }

    def by_duration(self) -> list[dict[str, Any]]:
        """Error rates of clips of about the same length, the shortest first."""
        return [
            describe_part(name, rows) for name, rows in split_by(self.rows, duration_range).items()
        ]

    def by_group(self) -> list[dict[str, Any]]:
        """Error rates by speaker, say, the worst first; of too many those with most rows."""
        groups = split_by([row for row in self.rows if row.group is not None], group_of)
        largest = sorted(groups.items(), key=number_of_rows)[:MAX_GROUPS]
        parts = [describe_part(name, rows) for name, rows in largest]
        return sorted(parts, key=highest_rate_first)

    @property
    def durations(self) -> list[float]:
        return [row.duration_in_seconds for row in self.rows]

    @property
    def hours(self) -> float:
        return sum(self.durations) / 3600


def duration_range(row: AlignedRow) -> str:
    low: float = 0
    for high in DURATIONS:
        if row.duration_in_seconds <= high:
            return f"{low:g} to {high:g} s"
        low = high
    return f"over {low:g} s"


def group_of(row: AlignedRow) -> str:
    return str(row.group)


def number_of_rows(entry: tuple[str, list[AlignedRow]]) -> tuple[int, str]:
    name, rows = entry
    return -len(rows), name


def highest_rate_first(part: dict[str, Any]) -> float:
    return -part["rate"]


def split_by(
    rows: list[AlignedRow], name_of: Callable[[AlignedRow], str]
) -> dict[str, list[AlignedRow]]:
    """Rows with a reference by a name, in the order of their durations."""
    parts: dict[str, list[AlignedRow]] = {}
    for row in sorted(rows, key=duration_of):
        if row.counts is not None:
            parts.setdefault(name_of(row), []).append(row)
    return parts


def duration_of(row: AlignedRow) -> float:
    return row.duration_in_seconds


def describe_part(name: str, rows: list[AlignedRow]) -> dict[str, Any]:
    counts: list[WordCounts] = [row.counts for row in rows if row.counts is not None]
    total = total_counts(counts)
    low, high = bootstrap_interval(counts)
    return {
        "name": name,
        "low": low,
        "high": high,
        "rows": len(rows),
        "units": total.num_reference_words,
        "rate": total.wer,
        "hours": sum(row.duration_in_seconds for row in rows) / 3600,
    }


def changes_of(sets: dict[str, ScoredSet]) -> dict[tuple[str, str], Change]:
    """Against the untouched model, for each role in total and by the name of the set."""
    changes = {}
    for role, scored in sets.items():
        if not scored.before:
            continue
        names = sorted({row.set_name for row in scored.rows} - {""})
        for name in ["", *(names if len(names) > 1 else [])]:
            before = [row for row in scored.before if name in ("", row.set_name)]
            after = [row for row in scored.rows if name in ("", row.set_name)]
            change = change_between(before, after)
            if change is not None:
                changes[role, name] = change
    return changes


# ---------------------------------------------------------------------------------- the explorer --
def rows_as_json(sets: list[ScoredSet], titles: dict[str, str]) -> Markup:
    """All rows for the page's script, safe within a script element.

    A row is a list: id, group, duration, errors, units, reference and prediction as they are
    counted, operations ("=3s1"), both as written, the untouched model's transcript and its errors,
    the place of its set among the table's. What can be told from something else is "".
    """
    room = MAX_ROWS_IN_BYTES
    clip_room = MAX_CLIPS_IN_BYTES // max(1, sum(bool(scored.clips) for scored in sets))
    tables = []
    for scored in sets:
        table = table_of(scored, room, clip_room)
        room -= sum(map(size_of, table["rows"]))
        tables.append({"title": titles[scored.role], **table})
    text = json.dumps(tables, ensure_ascii=False, separators=(",", ":"))
    # Within a script element only "</script" and "<!--" mean anything (HTML, 4.12.1.3).
    return Markup(
        text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def table_of(scored: ScoredSet, room_in_bytes: int, clip_room_in_bytes: int) -> dict[str, Any]:
    """The rows of one set, worst first; without texts as written if there is no room for them, and
    then without the best rows. clip_room_in_bytes: for sounds and pictures."""
    pairs = pair_rows([*scored.before, *scored.guards_before], [*scored.rows, *scored.guards])
    before = {id(row): earlier for earlier, row in pairs}
    sets = scored.sets()
    places = {each["name"]: place for place, each in enumerate(sets)}
    ordered = sorted([*scored.rows, *scored.guards], key=worst_first)
    records = [record_of(row, before.get(id(row)), places[row.set_name]) for row in ordered]
    is_short = sum(map(size_of, records)) > room_in_bytes
    if is_short:
        records = [[*record[:8], "", "", "", *record[11:]] for record in records]
    sizes = [size_of(record) for record in records]
    total = sum(sizes)
    num_left_out = 0
    while total > room_in_bytes:
        total -= sizes.pop()
        records.pop()
        num_left_out += 1
    clips, num_clips_left_out = clips_in_room(scored, ordered[: len(records)], clip_room_in_bytes)
    return {
        "sets": sets,
        "rows": records,
        "clips": clips,
        "leftOut": num_left_out,
        "clipsLeftOut": num_clips_left_out,
        "isShort": is_short,
    }


def worst_first(row: AlignedRow) -> tuple[int, float]:
    if row.counts is None:
        return 1, row.duration_in_seconds
    return -row.counts.num_errors, row.duration_in_seconds


def size_of(record: list[Any]) -> int:
    """In bytes of JSON, with the comma after it."""
    return 1 + len(json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace"))


def record_of(row: AlignedRow, before: AlignedRow | None, place_of_set: int) -> list[Any]:
    counts = row.counts
    is_right = counts is not None and counts.num_errors == 0
    operations = ""
    if not is_right:
        operations = "".join(f"{kind}{length}" for kind, length in row.operations or [])
    earlier = ""
    earlier_errors = None
    if before is not None and before.counts is not None:
        earlier = "" if before.prediction == row.prediction else before.prediction
        earlier_errors = before.counts.num_errors
    return [
        row.id,
        row.group or "",
        round(row.duration_in_seconds, 2),
        None if counts is None else counts.num_errors,
        0 if counts is None else counts.num_reference_words,
        row.read_reference,
        "" if is_right else row.read_prediction,
        operations,
        "" if row.reference == row.read_reference else row.reference,
        "" if row.prediction == row.read_prediction else row.prediction,
        earlier,
        earlier_errors,
        place_of_set,
    ]


def clips_in_room(
    scored: ScoredSet, ordered: list[AlignedRow], room_in_bytes: int
) -> tuple[dict[int, dict[str, str]], int]:
    """Clips by the place of their row in the table, as many as there is room for; and how many were
    left out."""
    clips: dict[int, dict[str, str]] = {}
    total = 0
    num_left_out = 0
    for place, row in enumerate(ordered):
        clip = scored.clips.get(row.index)
        if clip is None or not (clip.audio or clip.picture):
            continue
        total += clip.num_bytes
        if total > room_in_bytes:
            num_left_out += 1
        else:
            clips[place] = {"audio": clip.audio, "picture": clip.picture}
    return clips, num_left_out
