"""--check_data: reads a whole data set once, without training, and tells what is odd about it.

Writes check.html (one page without anything from elsewhere), check.json, rejected.jsonl (rows that
no run would use) and suspects.jsonl (rows that may be wrong), whose lines --exclude_rows takes.
"""

import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import transformers

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted, json_line, printable, write_json
from speech_finetuning.base.network import retry_on_network_error
from speech_finetuning.base.rejections import Rejection, describe_counts, list_rejections
from speech_finetuning.base.threads import map_in_order, read_ahead
from speech_finetuning.cli.console import describe_source, set_up_logging
from speech_finetuning.cli.model_check import HeardRow, Listener, find_misfits, median_cer
from speech_finetuning.cli.terminal import typed
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.data_check import (
    SplitCheck,
    Suspect,
    describe_characters,
    find_suspects,
    num_listed_twice,
    repeated_texts,
    text_overlap,
)
from speech_finetuning.data.hold_out import USUAL_EVAL_SPLIT, load_or_hold_out
from speech_finetuning.data.passes import Block, read_pass
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.row_check import RowChecker, silent_share
from speech_finetuning.data.row_keys import count_speakers
from speech_finetuning.data.selection import read_excluded_ids
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.sources import MissingSplit, SpeechSource, load_source
from speech_finetuning.model.recogniser import load_recogniser

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("check_template.html")
RESULTS = ("check.html", "check.json", "rejected.jsonl", "suspects.jsonl")
USUAL_TEST_SPLIT = "test"
WINDOW_IN_FRAMES = 3_000  # of every Whisper checkpoint: 30 s
ROWS_PER_BLOCK = 100
ROWS_BETWEEN_LINES = 5_000  # of the log
MAX_SHOWN = 200  # rows in a table of the page; the files have all
EXAMPLE_BATCH_SIZE = 16


def preprocessor_without_model(data_args: Any) -> Preprocessor:
    """The row-to-example stage as far as it needs no checkpoint: without tokens and features."""
    return Preprocessor(
        tokenizer=None,  # type: ignore[arg-type]
        mel_filters=np.zeros((0, 0), np.float32),
        window_in_frames=WINDOW_IN_FRAMES,
        max_label_length=0,
        min_duration_in_seconds=data_args.min_duration_in_seconds,
        max_duration_in_seconds=data_args.max_duration_in_seconds,
        do_lower_case=data_args.do_lower_case,
        do_remove_punctuation=data_args.do_remove_punctuation,
        keeps_empty_text=data_args.keep_empty_text,
        max_network_wait_in_seconds=data_args.max_network_wait_in_seconds,
    )


def open_if_there(role: str, split: str, record: Any, cache_dir: str | None) -> SpeechSource | None:
    """None for an evaluation split that is not there and that nobody need have named."""
    load = functools.partial(
        load_source,
        record.dataset_name,
        config_name=record.dataset_config_name,
        audio_column=record.audio_column_name,
        text_column=record.text_column_name,
        cache_dir=cache_dir,
        streaming=record.streaming,
        record=record.name,
        allow_audio_urls=record.allow_audio_urls,
    )
    try:
        if role in ("train", "guard"):
            return load_or_hold_out(load, role, split, record)[0]
        return load(split=split)
    except MissingSplit:
        if split not in (USUAL_EVAL_SPLIT, USUAL_TEST_SPLIT):
            raise
        return None


def open_splits(records: list[Any], cache_dir: str | None) -> list[tuple[str, bool, SpeechDataset]]:
    """(name, whether it is trained on, split) of every data set's splits to train on and to score,
    as far as they are there. records: the script's. Raises: UserError."""
    opened = []
    for record in records:
        scored = [record.eval_split_name]
        if not record.guard:
            scored.append(record.test_split_name or USUAL_TEST_SPLIT)
        for split in dict.fromkeys([record.train_split_name, *scored]):
            if not split:
                continue
            scored_as = "guard" if record.guard else "eval"
            role = "train" if split == record.train_split_name else scored_as
            source = open_if_there(role, split, record, cache_dir)
            if source is None:
                continue
            dataset = SpeechDataset(
                source,
                preprocessor_without_model(record),
                excluded_ids=read_excluded_ids(record.exclude_rows),
            )
            name = f"{record.name} {source.split}".strip()
            opened.append((name, role == "train", dataset))
    return opened


def tagged_rows(dataset: SpeechDataset, result: SplitCheck) -> Iterator[tuple[None, SourceRow]]:
    """Every row of a split, undecoded, as `map_in_order` takes them; those that are left out are
    counted."""
    for block in read_ahead(read_pass(dataset, block_size=ROWS_PER_BLOCK), size_of_block):
        for row in block.rows:
            if row.id in dataset.excluded_ids:
                result.num_excluded += 1
            else:
                yield None, row


def size_of_block(block: Block) -> int:
    return block.size_in_bytes


def check_split(
    dataset: SpeechDataset,
    name: str,
    *,
    is_trained: bool,
    num_threads: int,
    listener: Listener | None,
) -> SplitCheck:
    """Decodes and measures every row of a split. listener: has a model hear each; None: none."""
    result = SplitCheck(name=name, is_trained=is_trained)
    if dataset.source.row_groups is not None:
        result.rows_of_speakers = retry_on_network_error(
            count_speakers,
            dataset.source,
            limit_in_seconds=dataset.preprocessor.max_network_wait_in_seconds,
            task=f"reading speakers of {dataset.source.name}",
        )
    checker = RowChecker(preprocessor=dataset.preprocessor, keeps_waveform=listener is not None)
    rows = map_in_order(checker, tagged_rows(dataset, result), num_threads)
    for number, (_, checked) in enumerate(rows, start=1):
        if listener is None or isinstance(checked, Rejection):
            result.add(checked)
        else:
            result.add(listener.add(checked))
        if number % ROWS_BETWEEN_LINES == 0:
            logger.info("%s: %s rows read", name, f"{number:,}")
    if listener is not None:
        listener.finish()
    left_out = f", left out: {result.num_excluded:,}" if result.num_excluded else ""
    logger.info(
        "%s: %s, %.2f h, rejected: %s%s",
        name,
        counted(len(result.rows), "usable row"),
        result.seconds() / 3600,
        describe_counts(result.reasons()),
        left_out,
    )
    return result


def check_splits(
    opened: list[tuple[str, bool, SpeechDataset]], listeners: dict[str, Listener], num_threads: int
) -> list[SplitCheck]:
    """opened: as `open_splits`; listeners: by the name of the record."""
    return [
        check_split(
            dataset,
            name,
            is_trained=is_trained,
            num_threads=num_threads,
            listener=listeners.get(dataset.source.record),
        )
        for name, is_trained, dataset in opened
    ]


def summarise(
    data: list[str],
    splits: list[SplitCheck],
    suspects: list[Suspect],
    seconds: float,
    num_threads: int,
) -> dict[str, Any]:
    """What check.json contains. data: as `names_of_data`."""
    rows = [row for split in splits for row in split.rows]
    trained = [row for split in splits if split.is_trained for row in split.rows]
    # One for the rest of a damaged file, whose rows were not read.
    num_read = len(rows) + sum(len(split.rejections) for split in splits)
    reasons = Counter(reason for suspect in suspects for reason in suspect.reasons)
    rate = num_read / seconds
    return {
        "data": data,
        "splits": {split.name: split.summary() for split in splits},
        "suspects": {"num_rows": len(suspects), "reasons": dict(reasons.most_common())},
        "listed_twice": num_listed_twice(rows),
        "text_in_training_and_evaluation": text_overlap(splits),
        "texts_of_most_rows": repeated_texts(trained),
        "characters": describe_characters(rows),
        "reading": {
            "seconds": round(seconds, 1),
            "threads": num_threads,
            "rows_per_second": round(rate, 1),
        },
        "one_pass": {
            "rows": len(trained),
            "hours_of_speech": sum(row.seconds for row in trained) / 3600,
            "steps_of_16_rows": math.ceil(len(trained) / EXAMPLE_BATCH_SIZE),
            "minutes_of_decoding": len(trained) / rate / 60 if rate else 0.0,
        },
    }


def names_of_data(records: list[Any]) -> list[str]:
    """What is checked, whole: two folders of one name, or two languages, are two data sets."""
    names = []
    for record in records:
        path = Path(record.dataset_name)
        name = str(path.resolve()) if path.exists() else record.dataset_name
        names.append(" ".join(filter(None, [name, record.dataset_config_name])))
    return names


def refuse_check_of_others(output_dir: Path, data: list[str]) -> None:
    """Raises: UserError if the folder has the check of other data, which would be replaced."""
    try:
        earlier = json.loads((output_dir / "check.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if earlier != data:
        raise UserError(
            f"--output_dir {output_dir} has the check of {', '.join(map(str, earlier))}. "
            f"Pass another --output_dir, such as {output_dir}-2."
        )


def no_usable_row(name: str, splits: list[SplitCheck], record: Any, output_dir: Path) -> UserError:
    """Why there is none."""
    if not any(split.rejections for split in splits):
        if num_excluded := sum(split.num_excluded for split in splits):
            return UserError(
                f"no usable row in {name}: --exclude_rows {record.exclude_rows} leaves out all "
                f"{num_excluded:,}."
            )
        return UserError(f"no row in {name}.")
    return UserError(f"no usable row in {name}. See {output_dir / 'rejected.jsonl'}.")


def write_results(
    output_dir: Path, name: str, splits: list[SplitCheck], suspects: list[Suspect], found: Any
) -> None:
    """The page and the files beside it, in place of those of an earlier check."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for file in RESULTS:
        (output_dir / file).unlink(missing_ok=True)
    write_json(output_dir / "check.json", found)
    for split in splits:
        list_rejections(output_dir, split.name, split.rejections)
    lines = [json_line(suspect.to_json()) for suspect in suspects]
    (output_dir / "suspects.jsonl").write_text("".join(lines), encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["printable"] = printable
    environment.filters["counted"] = counted
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        found=found,
        rejections=[(split.name, rejection) for split in splits for rejection in split.rejections],
        suspects=suspects,
        max_shown=MAX_SHOWN,
        date=time.strftime("%Y-%m-%d"),
    )
    (output_dir / "check.html").write_text(page, encoding="utf-8")


def make_listeners(records: list[Any], model_name: str | None) -> dict[str, Listener]:
    """By the name of each record, whose language may be another; none without a model.
    Raises: UserError."""
    if model_name is None:
        return {}
    recogniser = load_recogniser("--model_name_or_path", model_name)
    return {record.name: Listener.of(recogniser, record.language) for record in records}


def check_data(
    records: list[Any],
    cache_dir: str | None,
    training_args: transformers.Seq2SeqTrainingArguments,
    model_name: str | None,
) -> dict[str, float]:
    """Reads everything once and writes what was found. Returns its figures.

    records: the script's, of the data. model_name: of one that is to hear each row, or None.
    Raises: UserError if a data set cannot be opened or has no
    usable row, and errors of the network that lasted too long.
    """
    set_up_logging(training_args)
    if training_args.world_size > 1:
        raise UserError("--check_data reads with threads: start one process.")
    assert training_args.output_dir is not None
    output_dir = Path(training_args.output_dir)
    num_threads = records[0].num_decoding_threads
    data = names_of_data(records)
    refuse_check_of_others(output_dir, data)
    datasets = retry_on_network_error(
        open_splits,
        records,
        cache_dir,
        task="opening the data",
        limit_in_seconds=records[0].max_network_wait_in_seconds,
    )
    for split, _, dataset in datasets:
        logger.info("%s: %s", split, describe_source(dataset))
    name = ", ".join(dict.fromkeys(record.dataset_name for record in records))
    # Has librosa imported before the clock runs.
    silent_share(np.ones(SAMPLE_RATE_IN_HZ, np.float32))
    listeners = make_listeners(records, model_name)
    began = time.perf_counter()
    splits = check_splits(datasets, listeners, num_threads)
    seconds = time.perf_counter() - began
    suspects = find_suspects(splits, find_misfits(list(listeners.values())))
    found = summarise(data, splits, suspects, seconds, num_threads)
    found["model"] = describe_model(model_name, list(listeners.values()))
    write_results(output_dir, name, splits, suspects, found)
    num_rows = sum(len(split.rows) for split in splits)
    num_rejected = sum(split.num_rejected() for split in splits)
    if num_rows == 0:
        raise no_usable_row(name, splits, records[0], output_dir)
    logger.info("suspects: %s", ", ".join(describe_suspects(found)) or "none")
    logger.info("page: %s", output_dir / "check.html")
    if suspects:
        logger.info("without them: --exclude_rows %s", typed(output_dir / "suspects.jsonl"))
    return {"rows": num_rows, "rejected": num_rejected, "suspects": len(suspects)}


def describe_model(name: str | None, listeners: list[Listener]) -> dict[str, Any] | None:
    """For check.json: which model heard the rows, and how near it came; None if none did."""
    if name is None:
        return None
    heard: dict[str, HeardRow] = {}
    for listener in listeners:
        heard |= listener.heard
    return {"name": name, "num_rows": len(heard), "median_cer": median_cer(heard)}


def describe_suspects(found: dict[str, Any]) -> list[str]:
    return [f"{count} {reason}" for reason, count in found["suspects"]["reasons"].items()]
