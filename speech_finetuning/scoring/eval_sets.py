"""Evaluation rows, decoded once."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import transformers

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection, describe_counts, list_new_rejections
from speech_finetuning.base.threads import map_in_order, read_ahead
from speech_finetuning.data.positions import FIRST_PLACE
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.stream import read_pass

logger = logging.getLogger(__name__)


def eval_set_key(item: SpeechDataset) -> str:
    """Changes with whatever changes the prepared rows: the files, the model's limits, the prefix, the text options."""
    source, preparer = item.source, item.preparer
    stats = [
        (url, os.path.getmtime(url), os.path.getsize(url))
        for url in source.data_files
        if os.path.exists(url)
    ]
    others = ("tokenizer", "mel_filters", "max_network_wait_in_seconds", "parts", "data_files")
    settings = {
        f.name: getattr(o, f.name)
        for o in (source, preparer)
        for f in fields(o)
        if f.name not in others
    }
    prefix = [
        preparer.mel_filters.shape[1],
        len(preparer.tokenizer),
        preparer.tokenizer.prefix_tokens,
    ]
    return datasets.fingerprint.Hasher.hash([stats, settings, prefix, item.max_rows])


def eval_rows(item: SpeechDataset, num_threads: int) -> Iterator[dict[str, Any]]:
    """The prepared rows of a split, features (n_mels, n_frames) as bytes; rejected ones with a reason instead."""
    blocks = read_ahead(
        read_pass(item, FIRST_PLACE["start"], None, 100), lambda block: block.size_in_bytes
    )
    rows = ((None, row) for block in blocks for row in block.rows)
    for _, example in map_in_order(item.preparer, rows, num_threads):
        if isinstance(example, Rejection):
            nothing = dict.fromkeys(("duration", "labels", "features"))
            yield {"id": example.row, "reason": example.reason, "text": example.detail, **nothing}
        else:
            del example["sampling_rate"]
            yield {**example, "features": example["features"].numpy().tobytes(), "reason": None}


def prepare_eval_set(
    item: SpeechDataset, num_threads: int, folder: Path
) -> tuple[datasets.Dataset, list[Rejection]]:
    """Decodes an evaluation split once; `datasets` keeps it, with the rejected rows, in a memory-mapped file.
    Raises: UserError if no row is usable, and the errors of the reader."""
    texts = {name: datasets.Value("string") for name in ("id", "text", "reason")}
    numbers = {
        "duration": datasets.Value("float64"),
        "labels": datasets.List(datasets.Value("int32")),
    }
    features = datasets.Features({**texts, **numbers, "features": datasets.Value("large_binary")})
    what = {
        "gen_kwargs": {"item": item, "num_threads": num_threads},
        "fingerprint": eval_set_key(item),
    }
    try:
        rows = datasets.Dataset.from_generator(
            eval_rows, features, str(folder), writer_batch_size=16, **what
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    rejected = rows.select([i for i, reason in enumerate(rows["reason"]) if reason is not None])
    rejections = [Rejection(row["reason"], row["text"], row["id"]) for row in rejected]
    if len(rejections) == len(rows):
        reasons = describe_counts(Counter(rows["reason"]))
        raise UserError(
            f"no usable row in split '{item.source.split}' of {item.source.name}. Rejected: {reasons}."
        )
    return rows, rejections


def join_eval_sets(sets: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """One set of all usable rows, longest clips first, each with its set's name and its index in the order of the
    files. Rows are selected last: columns added to a selection would make `datasets` write all features once more."""
    names = [name for name, rows in sets.items() for _ in range(len(rows))]
    rows = datasets.concatenate_datasets(list(sets.values())).add_column("set", names)
    rows = rows.add_column("index", list(range(len(rows))))
    durations = rows["duration"]
    usable = [i for i, duration in enumerate(durations) if duration is not None]
    return rows.select(sorted(usable, key=lambda i: -durations[i]))


def prepare_eval_sets(
    speech: dict[str, list[SpeechDataset]],
    num_threads: int,
    training_args: transformers.Seq2SeqTrainingArguments,
) -> dict[str, datasets.Dataset]:
    """Every scored split by role, decoded once, its rejections in the log and in rejected.jsonl."""
    output_dir = Path(training_args.output_dir)
    eval_sets: dict[str, datasets.Dataset] = {}
    for role in ("eval", "test", "predict"):
        prepared: dict[str, datasets.Dataset] = {}
        for dataset in speech.get(role, []):
            with training_args.main_process_first(
                local=False
            ):  # the others find the finished cache
                rows, rejections = prepare_eval_set(
                    dataset, num_threads, output_dir / "_eval_cache"
                )
            prepared[dataset.source.record] = rows
            if training_args.process_index == 0:
                list_new_rejections(output_dir, dataset.source.split, rejections)
            logger.info(
                "%s: %d rows to score, rejected: %s",
                f"{role} {dataset.source.record}".strip(),
                len(rows) - len(rejections),
                describe_counts(Counter(rejection.reason for rejection in rejections)),
            )
        if prepared:
            eval_sets[role] = join_eval_sets(prepared)
    return eval_sets
