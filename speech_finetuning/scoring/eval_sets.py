"""Evaluation rows, decoded once and kept in a memory-mapped file."""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets.exceptions import DatasetGenerationError

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted, printable
from speech_finetuning.base.rejections import (
    Rejection,
    describe_counts,
    list_new_rejections,
    remedy_for,
)
from speech_finetuning.base.threads import map_in_order, read_ahead
from speech_finetuning.data.passes import Block, read_pass
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.scoring.scores import EVAL, PROMPTED

logger = logging.getLogger(__name__)

CACHE_VERSION = 4  # rises when the same rows are prepared otherwise than before
ROWS_PER_BLOCK = 100
ROWS_PER_WRITE = 16  # of unpadded features: some 10 MB
NUM_EXAMPLES = 3  # of rejected rows, in an error
# What is scored at once, by the role that it is scored as.
SCORED_TOGETHER = {"eval": ("eval", "guard"), "test": ("test",), "predict": ("predict",)}
SECONDS_BETWEEN_LINES = 15  # of the log, while rows are prepared

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "text": datasets.Value("string"),  # of a rejected row: the detail
        "reason": datasets.Value("string"),  # of the rejection; None: the row is usable
        "duration": datasets.Value("float64"),  # in seconds
        "group": datasets.Value("string"),  # of --group_column_name
        "labels": datasets.List(datasets.Value("int32")),
        "features": datasets.Value("large_binary"),  # (n_mels, n_frames) float32
        "prompt": datasets.Value("string"),  # of --prompt_column_name
        "prompt_ids": datasets.List(datasets.Value("int32")),
    }
)


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A prepared split: all its rows, and those that cannot be used."""

    rows: datasets.Dataset  # rejected ones have a reason and no features
    rejections: list[Rejection]

    @property
    def num_usable(self) -> int:
        return len(self.rows) - len(self.rejections)


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What changes with the content of a local file."""

    path: str
    modified_at: float
    size_in_bytes: int


@dataclass(frozen=True, kw_only=True)
class EvalSetKey:
    """Everything that changes the prepared rows."""

    cache_version: int
    files: tuple[FileState, ...]  # local ones; those of the Hub have a revision
    # the source
    record: str
    name: str
    config_name: str | None
    split: str
    kind: str
    revision: str | None
    root: str | None
    allow_audio_urls: bool
    audio_column: str
    text_column: str | None
    sampling_rate_column: str | None
    are_segments: bool
    group_column: str | None
    prompt_column: str | None
    has_previous_prompts: bool
    num_rows: int | None
    max_rows: int | None
    order_version: int  # of which max_rows depends
    selection: str | None
    excluded_ids: str | None
    # how its rows are prepared
    window_in_frames: int
    num_mel_bins: int
    max_label_length: int
    min_duration_in_seconds: float
    max_duration_in_seconds: float
    do_lower_case: bool
    do_remove_punctuation: bool
    needs_text: bool
    keeps_empty_text: bool
    takes_long_clips: bool
    num_tokens: int
    prefix_tokens: tuple[int, ...]

    def fingerprint(self) -> str:
        """A name for the cached file."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def eval_set_key(dataset: SpeechDataset) -> EvalSetKey:
    """The key of a split as it is now."""
    source = dataset.source
    preprocessor = dataset.preprocessor
    return EvalSetKey(
        cache_version=CACHE_VERSION,
        files=tuple(file_states(dataset)),
        record=source.record,
        name=source.name,
        config_name=source.config_name,
        split=source.split,
        kind=source.kind,
        revision=source.revision,
        root=source.root,
        allow_audio_urls=source.allow_audio_urls,
        audio_column=source.columns.audio,
        text_column=source.columns.text,
        sampling_rate_column=source.columns.sampling_rate,
        are_segments=source.columns.segments is not None,
        group_column=source.columns.group,
        prompt_column=source.columns.prompt,
        has_previous_prompts=source.columns.has_previous_prompts,
        num_rows=source.num_rows,
        max_rows=dataset.max_rows,
        order_version=dataset.order_version,
        selection=None if dataset.selection is None else dataset.selection.fingerprint(),
        excluded_ids=fingerprint_of(dataset.excluded_ids),
        window_in_frames=preprocessor.window_in_frames,
        num_mel_bins=preprocessor.mel_filters.shape[1],
        max_label_length=preprocessor.max_label_length,
        min_duration_in_seconds=preprocessor.min_duration_in_seconds,
        max_duration_in_seconds=preprocessor.max_duration_in_seconds,
        do_lower_case=preprocessor.do_lower_case,
        do_remove_punctuation=preprocessor.do_remove_punctuation,
        needs_text=preprocessor.needs_text,
        keeps_empty_text=preprocessor.keeps_empty_text,
        takes_long_clips=preprocessor.takes_long_clips,
        num_tokens=len(preprocessor.tokenizer),
        prefix_tokens=tuple(preprocessor.tokenizer.prefix_tokens),
    )


def fingerprint_of(ids: frozenset[str]) -> str | None:
    if not ids:
        return None
    return hashlib.sha256("\n".join(sorted(ids)).encode(errors="surrogatepass")).hexdigest()[:16]


def file_states(dataset: SpeechDataset) -> Iterator[FileState]:
    """Of the local files of a split, and of the audio that a list names: missing clips that have
    been put in their place must not stay rejected."""
    paths = list(dataset.source.data_files)
    if dataset.source.data_files_name_audio:
        for block in read_split(dataset):
            for row in block.rows:
                path = row.audio.get("path") if isinstance(row.audio, dict) else row.audio
                paths.append(path or "")
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # on another machine, missing, or no path at all
            continue
        yield FileState(path=path, modified_at=status.st_mtime, size_in_bytes=status.st_size)


def read_split(dataset: SpeechDataset) -> Iterator[Block]:
    """The undecoded rows of a split in the order of its files."""
    for block in read_pass(dataset, block_size=ROWS_PER_BLOCK):
        if dataset.excluded_ids:
            block.rows = [row for row in block.rows if row.id not in dataset.excluded_ids]
        yield block


def tagged_rows(dataset: SpeechDataset) -> Iterator[tuple[None, SourceRow]]:
    """The rows as `map_in_order` takes them."""
    for block in read_ahead(read_split(dataset), size_of=block_size_in_bytes):
        for row in block.rows:
            yield None, row


def block_size_in_bytes(block: Block) -> int:
    return block.size_in_bytes


def eval_rows(dataset: SpeechDataset, num_threads: int) -> Iterator[dict[str, Any]]:
    """The rows of a split as FEATURES says; the log tells how far it is, if that takes long."""
    told_at = time.monotonic()
    prepared = map_in_order(dataset.preprocessor, tagged_rows(dataset), num_threads)
    for number, (_, example) in enumerate(prepared):
        if time.monotonic() - told_at > SECONDS_BETWEEN_LINES:
            told_at = time.monotonic()
            logger.info("%s: %d rows are prepared", dataset.source.split, number)
        if isinstance(example, Rejection):
            yield {
                "id": storable(example.row),
                "text": storable(example.detail),
                "reason": example.reason,
                "duration": None,
                "group": None,
                "labels": None,
                "features": None,
                "prompt": None,
                "prompt_ids": None,
            }
        else:
            yield {
                "id": storable(example["id"]),
                "text": storable(example["text"]),
                "reason": None,
                "duration": example["duration"],
                "group": storable(example["group"]) if "group" in example else None,
                "labels": example["labels"],
                "features": example["features"].numpy().tobytes(),
                "prompt": storable(example["prompt"]) if "prompt" in example else None,
                "prompt_ids": example.get("prompt_ids"),
            }


def storable(text: str) -> str:
    """Arrow takes only UTF-8: a file name in another encoding has lone surrogates."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def prepare_eval_set(dataset: SpeechDataset, *, num_threads: int, folder: Path) -> EvalSet:
    """Decodes a split once; `datasets` keeps it in `folder`, rejected rows included.

    Raises: the errors of the reader.
    """
    try:
        rows = datasets.Dataset.from_generator(
            eval_rows,
            features=FEATURES,
            cache_dir=str(folder),
            gen_kwargs={"dataset": dataset, "num_threads": num_threads},
            fingerprint=eval_set_key(dataset).fingerprint(),
            writer_batch_size=ROWS_PER_WRITE,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    rejected = [place for place, reason in enumerate(rows["reason"]) if reason is not None]
    rejections = []
    for row in rows.select(rejected).select_columns(["id", "text", "reason"]).to_list():
        rejections.append(Rejection(row["reason"], row["text"], row["id"]))
    return EvalSet(rows=rows, rejections=rejections)


def check_usable(dataset: SpeechDataset, eval_set: EvalSet) -> None:
    """Raises: UserError, with the reasons and three examples, if no row can be scored."""
    if eval_set.num_usable > 0:
        return
    source = dataset.source
    counts = Counter(rejection.reason for rejection in eval_set.rejections)
    examples = []
    for rejection in eval_set.rejections[:NUM_EXAMPLES]:
        example = f"{rejection.row}: {rejection.reason}"
        if rejection.detail and rejection.detail not in rejection.row:
            example += f" ({rejection.detail})"
        examples.append(printable(example))
    shown = f" For example {'; '.join(examples)}." if examples else ""
    raise UserError(
        f"no usable row in split '{source.split}' of {source.name}. "
        f"Rejected: {describe_counts(counts)}.{shown}{remedy_for(counts)}"
    )


def join_eval_sets(sets: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """One set of all usable rows, longest clips first, by the name of the set.

    Each row has its set's name and its index in the order of the files. Rows are selected last:
    columns added to a selection would make `datasets` write all features once more.
    """
    set_names = []
    for set_name, rows in sets.items():
        set_names += [set_name] * len(rows)
    joined = datasets.concatenate_datasets(list(sets.values()))
    joined = joined.add_column("set", set_names)
    joined = joined.add_column("index", list(range(len(joined))))
    durations = list(joined["duration"])
    usable = [place for place, duration in enumerate(durations) if duration is not None]
    usable.sort(key=lambda place: -durations[place])
    return joined.select(usable)


def prepare_eval_sets(
    speech: dict[str, list[SpeechDataset]],
    num_threads: int,
    training_args: transformers.Seq2SeqTrainingArguments,
) -> dict[str, datasets.Dataset]:
    """Every scored split by role, decoded once, its rejections in the log and in rejected.jsonl.
    Guards are scored with the evaluation set, and come after its rows. Sets with prompts are there
    twice: they are also scored with them.

    Raises: UserError if no row of a split is usable, and the errors of the reader.
    """
    assert training_args.output_dir is not None
    output_dir = Path(training_args.output_dir)
    eval_sets: dict[str, datasets.Dataset] = {}
    for role, roles in SCORED_TOGETHER.items():
        prepared: dict[str, datasets.Dataset] = {}
        for opened_as in roles:
            for dataset in speech.get(opened_as, []):
                # The other processes find the finished file.
                with training_args.main_process_first(local=False):
                    eval_set = prepare_eval_set(
                        dataset, num_threads=num_threads, folder=output_dir / "_eval_cache"
                    )
                prepared[dataset.source.record] = eval_set.rows
                if training_args.process_index == 0:
                    list_new_rejections(output_dir, dataset.source.split, eval_set.rejections)
                check_usable(dataset, eval_set)
                logger.info(
                    "%s: %s to %s, rejected: %s",
                    f"{opened_as} {dataset.source.record}".strip(),
                    counted(eval_set.num_usable, "row"),
                    "transcribe" if role == "predict" else "score",
                    describe_counts(Counter(item.reason for item in eval_set.rejections)),
                )
            if opened_as == "eval" and prepared:
                check_has_text(prepared.values())
        if prepared:
            eval_sets[role] = join_eval_sets(prepared)
            if role == EVAL and any(eval_sets[role]["prompt_ids"]):
                eval_sets[PROMPTED] = rows_with_prompts(eval_sets[role])
    return eval_sets


def rows_with_prompts(rows: datasets.Dataset) -> datasets.Dataset:
    """Those of sets in which some row has a prompt."""
    columns = zip(rows["set"], rows["prompt_ids"], strict=True)
    names = {name for name, prompt_ids in columns if prompt_ids}
    return rows.select([place for place, name in enumerate(rows["set"]) if name in names])


def check_has_text(eval_sets: Iterable[datasets.Dataset]) -> None:
    """Raises: UserError if nothing is spoken in any row."""
    for rows in eval_sets:
        usable = zip(rows["text"], rows["reason"], strict=True)
        if any(text and reason is None for text, reason in usable):
            return
    raise UserError(
        "no row that --do_eval scores has a text (see keep_empty_text): there is no WER. Score "
        "speech as well: add an entry with speech to --data_mix."
    )
