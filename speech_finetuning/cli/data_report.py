"""What the data is like, before any training."""

import itertools
import logging
import math
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted, json_line, printable, write_text
from speech_finetuning.base.rejections import (
    DATA_REPORT,
    REMEDIES,
    Rejection,
    describe_counts,
    list_rejections,
)
from speech_finetuning.base.threads import map_in_order
from speech_finetuning.cli.terminal import SCREEN
from speech_finetuning.data.oddities import DESCRIPTIONS, find_oddities
from speech_finetuning.data.passes import read_pass
from speech_finetuning.data.preprocessing import Example, SpeechDataset
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.data.text import has_inner_apostrophe, spelled_letters
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3
NUM_BINS = 14  # of a histogram, so that its line has 80 columns
# Shares of capitals above which a text is in upper case, or in mixed case, and of transcripts with
# punctuation above which it is a habit.
UPPER_CASE_SHARE = 0.9
MIXED_CASE_SHARE = 0.001
PUNCTUATION_SHARE = 0.2
NUM_LETTERS = 3  # in the warning of letters that are written in two ways

Spelling = tuple[str, str]  # (letter in Unicode's form NFC, the same as it is written)


@dataclass(frozen=True, kw_only=True)
class PreparedRows:
    """The first rows of one source, as they would be trained, and how their letters beyond ASCII
    were written."""

    examples: list[Example] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    spellings: Counter[Spelling] = field(default_factory=Counter)

    @property
    def num_rows(self) -> int:
        return len(self.examples) + len(self.rejections)

    def count_reasons(self) -> Counter[str]:
        return Counter(rejection.reason for rejection in self.rejections)


def report_training_data(trainer: SpeechTrainer, num_rows: int) -> None:
    """The data report of a training that begins. num_rows: of each source; 0: no report."""
    if num_rows == 0:
        return
    assert trainer.args.output_dir is not None
    output_dir = Path(trainer.args.output_dir)
    loggers = cast(list[str], trainer.args.report_to)  # since its __post_init__
    curves = output_dir / "runs" / "data" if "tensorboard" in loggers else None
    report_data(trainer.train_dataset, num_rows, curves, output_dir)


def report_data(
    stream: SpeechStream, num_rows: int, curves: Path | None, output_dir: Path | None
) -> None:
    """Prepares the first rows of every training source and logs what they are like; warns where
    sources differ. The threads end here, before any loader forks.

    curves: folder for TensorBoard's histograms; output_dir: for data_report.jsonl, which report.html
    shows, and for rejected.jsonl.
    Raises: UserError if none of a source's rows can be used.
    """
    durations: list[float] = []
    label_lengths: list[int] = []
    styles: dict[str, str] = {}
    spellings: Counter[Spelling] = Counter()
    lines = []
    for dataset in stream.sets:
        name = dataset.source.record or dataset.source.name
        rows = prepare_rows(dataset, num_rows, stream.num_threads)
        log_rejections(name, rows, output_dir)
        if not rows.examples:
            refuse_source(dataset, rows, output_dir)
        styles[name] = describe_style([example["text"] for example in rows.examples])
        describe_rows(dataset, rows, styles[name])
        spellings += rows.spellings
        lines.append(json_line(figures_of(dataset, rows)))
        durations += [example["duration"] for example in rows.examples]
        label_lengths += [len(example["labels"]) for example in rows.examples]
        warn_of_oddities(name, [example["text"] for example in rows.examples])
    warn_of_styles(styles)
    warn_of_spellings(spellings)
    if output_dir is not None:
        write_text(output_dir / "data_report.jsonl", "".join(lines))
    if curves is not None:
        with SummaryWriter(curves) as writer:
            writer.add_histogram("data/durations in s", np.array(durations), 0)
            writer.add_histogram("data/tokens", np.array(label_lengths), 0)


def warn_of_oddities(name: str, texts: list[str]) -> None:
    """Says what stands in transcripts and is not said, each kind with its number and an example."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for text in texts:
        for kind, example in find_oddities(text).items():
            counts[kind] += 1
            examples.setdefault(kind, example)
    if not counts:
        return
    found = [
        f"{DESCRIPTIONS[kind]} in {count:,} (as {printable(examples[kind])[:30]})"
        for kind, count in counts.most_common()
    ]
    logger.warning(
        "%s: of %s some contain what nobody says: %s. They are trained as they stand; "
        "--check_data lists the rows.",
        name,
        counted(len(texts), "transcript"),
        "; ".join(found),
    )


def prepare_rows(dataset: SpeechDataset, num_rows: int, num_threads: int) -> PreparedRows:
    """The first rows of a source, in its own order."""
    blocks = read_pass(dataset, block_size=50)
    kept = (row for block in blocks for row in block.rows if row.id not in dataset.excluded_ids)
    with_text = ((row.text, row) for row in itertools.islice(kept, num_rows))
    rows = PreparedRows()
    for text, prepared in map_in_order(dataset.preprocessor, with_text, num_threads):
        if isinstance(prepared, Rejection):
            rows.rejections.append(prepared)
        else:
            rows.examples.append(prepared)
            rows.spellings.update(spelled_letters(text or ""))
    return rows


def log_rejections(name: str, rows: PreparedRows, output_dir: Path | None) -> None:
    """Says how many of the first rows of a source cannot be used, and lists them all: training may
    meet only some of them."""
    if not rows.rejections:
        logger.info("data report: %s, rejected: none", first_rows(rows, name))
        return
    place = ""
    if output_dir is not None:
        list_rejections(output_dir, DATA_REPORT, rows.rejections)
        place = f"; see {output_dir / 'rejected.jsonl'}"
    logger.warning(
        "data report: %s, rejected: %s%s",
        first_rows(rows, name),
        describe_counts(rows.count_reasons()),
        place,
    )


def first_rows(rows: PreparedRows, name: str) -> str:
    """'first 300 rows of speech train'."""
    return f"first {counted(rows.num_rows, 'row')} of {name}"


def refuse_source(dataset: SpeechDataset, rows: PreparedRows, output_dir: Path | None) -> None:
    """Raises: UserError with the reasons, three rows and the remedy; all are in rejected.jsonl."""
    source = dataset.source
    name = " ".join(part for part in (source.name, source.config_name, source.split) if part)
    if not rows.rejections:
        raise UserError(f"{name} has no rows.")
    reasons = rows.count_reasons()
    lines = [f"none of the {first_rows(rows, name)} can be used: {describe_counts(reasons)}."]
    for rejection in rows.rejections[:NUM_EXAMPLES]:
        lines.append(
            printable(f"  {rejection.row}: {rejection.reason} {rejection.detail}".rstrip())
        )
    remedy = REMEDIES.get(reasons.most_common(1)[0][0])
    if remedy is not None:
        lines.append(remedy)
    if output_dir is not None:
        lines.append(f"All of them: {output_dir / 'rejected.jsonl'}")
        lines.append("If later rows are better: --data_report_samples 0 leaves this test out.")
    raise UserError("\n".join(lines))


def figures_of(dataset: SpeechDataset, rows: PreparedRows) -> dict[str, Any]:
    """A line of data_report.jsonl: durations in seconds and label lengths of the rows that were
    looked at; num_rows and hours of a pass, None if they are not known."""
    durations = [round(row["duration"], 2) for row in rows.examples]
    num_rows = dataset.rows_per_pass()
    hours = None
    if num_rows is not None:
        hours = round(num_rows * sum(durations) / rows.num_rows / 3600, 3)
    return {
        "name": dataset.source.record or dataset.source.name,
        "num_rows": num_rows,
        "hours": hours,
        "durations": durations,
        "tokens": [len(row["labels"]) for row in rows.examples],
    }


def describe_rows(dataset: SpeechDataset, rows: PreparedRows, style: str) -> None:
    """Logs durations, tokens, sampling rates, and the first label as the model will see it."""
    logger.info("  %s", histogram("seconds", [row["duration"] for row in rows.examples]))
    logger.info("  %s", histogram("tokens", [len(row["labels"]) for row in rows.examples]))
    rates = Counter(f"at {row['sampling_rate']} Hz" for row in rows.examples)
    num_rows = dataset.rows_per_pass()
    if num_rows is not None:
        durations = [row["duration"] for row in rows.examples]
        hours = num_rows * sum(durations) / rows.num_rows / 3600
        logger.info("  about %.2f h of speech in %s", hours, counted(num_rows, "row"))
    logger.info("  clips: %s; transcripts: %s; first label:", describe_counts(rates), style)
    label = dataset.preprocessor.tokenizer.decode(rows.examples[0]["labels"])
    logger.info("  %s", printable(label))
    num_with_apostrophe = sum(has_inner_apostrophe(row["text"]) for row in rows.examples)
    if dataset.preprocessor.do_remove_punctuation and num_with_apostrophe:
        logger.info(
            "  apostrophes inside words, in %s, are letters: --do_remove_punctuation leaves them.",
            counted(num_with_apostrophe, "transcript"),
        )


def histogram(name: str, values: list[float]) -> str:
    """One line: how many values lie in each part of the range up to the 99th percentile, and
    percentiles."""
    low, middle, high, last = np.percentile(values, [5, 50, 95, 99])
    counts, _ = np.histogram(np.minimum(values, last), bins=NUM_BINS, range=(0, last))
    heights = SCREEN.writable(" ▁▂▃▄▅▆▇█", " 12345678")
    bars = "".join(heights[math.ceil(8 * count / max(counts))] for count in counts)
    spread = f"5 % {low:.1f}  median {middle:.1f}  95 % {high:.1f}  max {max(values):.1f}"
    return f"{name:8} 0 [{bars}] {last:<5.1f} {spread}"


def describe_style(texts: list[str]) -> str:
    """'upper case, no punctuation' and the like, of transcripts as they are trained."""
    num_marked = sum(has_punctuation(text) for text in texts)
    is_marked = num_marked > PUNCTUATION_SHARE * len(texts)
    return f"{describe_case(texts)}, {'punctuation' if is_marked else 'no punctuation'}"


def describe_case(texts: list[str]) -> str:
    """Upper, mixed, lower or, in scripts without capitals, no case."""
    letters = [
        character for text in texts for character in text if character.lower() != character.upper()
    ]
    if not letters:
        return "no case"
    upper_case_share = sum(letter.isupper() for letter in letters) / len(letters)
    if upper_case_share > UPPER_CASE_SHARE:
        return "upper case"
    return "mixed case" if upper_case_share > MIXED_CASE_SHARE else "lower case"


def has_punctuation(text: str) -> bool:
    """Beyond what stands within words: apostrophes and hyphens."""
    return any(
        unicodedata.category(character).startswith("P") and character not in "'-\u2019"
        for character in text
    )


def warn_of_styles(styles: dict[str, str]) -> None:
    """Warns of sources that are written differently, and of capitals only. styles: by source."""
    if len(set(styles.values())) > 1:
        found = "; ".join(f"{name}: {style}" for name, style in styles.items())
        advice = "see --do_lower_case and --do_remove_punctuation"
        logger.warning("transcripts differ (%s): %s.", found, advice)
    elif "upper case, no punctuation" in styles.values():
        logger.warning(
            "transcripts are in upper case: so will the model's be. --do_lower_case makes them "
            "lower case."
        )


def warn_of_spellings(spellings: Counter[Spelling]) -> None:
    """Warns of letters that are written in several ways, such as ñ in one code point and in two."""
    ways: dict[str, list[str]] = {}
    for (letter, written), count in spellings.most_common():
        codes = " ".join(f"U+{ord(character):04X}" for character in written)
        ways.setdefault(letter, []).append(f"{codes} ({counted(count, 'time')})")
    mixed = [
        f"{letter}: {' and '.join(written)}" for letter, written in ways.items() if len(written) > 1
    ]
    if mixed:
        more = f", and {len(mixed) - NUM_LETTERS} more" if len(mixed) > NUM_LETTERS else ""
        logger.warning(
            "transcripts write the same letters in several ways (%s%s). All are trained and scored "
            "in one, Unicode's form NFC.",
            printable("; ".join(mixed[:NUM_LETTERS])),
            more,
        )


def warn_of_rows(speech: dict[str, list[SpeechDataset]]) -> None:
    """What is odd about the rows that are read, as far as it is known before."""
    warn_of_overlap(speech)
    warn_of_foreign_ids(speech)


def warn_of_overlap(speech: dict[str, list[SpeechDataset]]) -> None:
    """Warns where scored rows are also trained on."""
    trained = files_of(speech.get("train", []))
    for role in ("eval", "guard", "test", "predict"):
        scored = [each for each in speech.get(role, []) if not each.is_held_out]
        shared = trained & files_of(scored)
        if any(not Path(url).name.startswith("metadata.") for url in shared):
            logger.warning(
                "The %s split shares files with the training split: its score will flatter.", role
            )


def warn_of_foreign_ids(speech: dict[str, list[SpeechDataset]]) -> None:
    """Warns of --exclude_rows with ids of other sets, or of another form: they leave out nothing.
    Those of this run's sets are looked for while these are read."""
    sets = [dataset for of_role in speech.values() for dataset in of_role]
    ids = set().union(*(dataset.excluded_ids for dataset in sets))
    prefixes = tuple({dataset.source.id_prefix for dataset in sets})
    foreign = sorted(row_id for row_id in ids if not row_id.startswith(prefixes))
    if foreign:
        logger.warning(
            "--exclude_rows: ids of no split that is read here (%s): %d of %d, such as %s. "
            "They have the form of those in rejected.jsonl and suspects.jsonl.",
            ", ".join(sorted(prefixes)),
            len(foreign),
            len(ids),
            foreign[0],
        )


def files_of(datasets: list[SpeechDataset]) -> set[str]:
    return {url for dataset in datasets for url in dataset.source.data_files}
