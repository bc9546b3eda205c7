"""What the data is like, before any training."""

import logging
import math
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from speech_finetuning.base.rejections import Rejection, describe_counts
from speech_finetuning.base.threads import map_in_order
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.stream import SpeechStream, read_pass

logger = logging.getLogger(__name__)


def histogram(name: str, values: list[float]) -> str:
    """One line: how many values lie in each twentieth of the range up to the 99th percentile, and percentiles."""
    low, middle, high, last = np.percentile(values, [5, 50, 95, 99])
    counts, _ = np.histogram(np.minimum(values, last), bins=20, range=(0, last))
    bars = "".join(" .:-=+*#%@"[math.ceil(9 * count / max(counts))] for count in counts)
    spread = f"5 % {low:.1f}, median {middle:.1f}, 95 % {high:.1f}, max {max(values):.1f}"
    return f"{name}: 0 [{bars}] {last:.1f}   {spread}"


def describe_style(texts: list[str]) -> str:
    """'upper case, no punctuation' and the like, of transcripts as they are trained."""
    letters = [c for text in texts for c in text if c.lower() != c.upper()]
    share = sum(c.isupper() for c in letters) / max(1, len(letters))
    case = (
        "upper case"
        if share > 0.9
        else "mixed case"
        if share > 0.001
        else "lower case"
        if letters
        else "no case"
    )
    marked = sum(
        any(unicodedata.category(c)[0] == "P" and c not in "'-\u2019" for c in text)
        for text in texts
    )
    return f"{case}, {'punctuation' if marked > 0.2 * len(texts) else 'no punctuation'}"


def report_data(stream: SpeechStream, num_rows: int, curves: Path | None) -> None:
    """Prepares the first rows of every training source, and logs what they are like; warns where sources differ.
    curves: folder for TensorBoard's histograms. The threads end here, before any loader forks."""
    figures: dict[str, list[float]] = {"durations in s": [], "tokens": []}
    styles: dict[str, str] = {}
    for item in stream.sets:
        name = item.source.record or item.source.name
        blocks = read_pass(replace(item, max_rows=num_rows), block_size=50)
        rows = ((None, row) for block in blocks for row in block.rows)
        prepared = [example for _, example in map_in_order(item.preparer, rows, stream.num_threads)]
        good = [example for example in prepared if isinstance(example, dict)]
        reasons = Counter(example.reason for example in prepared if isinstance(example, Rejection))
        logger.info(
            "data report: first %d rows of %s, rejected: %s",
            len(prepared),
            name,
            describe_counts(reasons),
        )
        if good:
            found = {
                "durations in s": [e["duration"] for e in good],
                "tokens": [len(e["labels"]) for e in good],
            }
            for label, values in found.items():
                figures[label] += values
                logger.info("  %s", histogram(label, values))
            styles[name] = describe_style([example["text"] for example in good])
            rates = describe_counts(
                Counter(f"at {example['sampling_rate']} Hz" for example in good)
            )
            logger.info("  clips: %s; transcripts: %s; first label:", rates, styles[name])
            logger.info("  %s", item.preparer.tokenizer.decode(good[0]["labels"]))
    if len(set(styles.values())) > 1:
        found = "; ".join(f"{name}: {style}" for name, style in styles.items())
        logger.warning(
            "transcripts differ (%s): see --do_lower_case and --do_remove_punctuation.", found
        )
    elif "upper case, no punctuation" in styles.values():
        logger.warning(
            "transcripts are in upper case: so will the model's be. --do_lower_case makes them lower case."
        )
    if curves is not None:
        with SummaryWriter(curves) as writer:
            for label, values in figures.items():
                writer.add_histogram(f"data/{label}", np.array(values), 0)


def warn_of_overlap(speech: dict[str, list[SpeechDataset]]) -> None:
    """Warns where scored rows are also trained on."""
    trained = {url for dataset in speech.get("train", []) for url in dataset.source.data_files}
    for role in ("eval", "test"):
        scored = {url for dataset in speech.get(role, []) for url in dataset.source.data_files}
        if any(not Path(url).name.startswith("metadata.") for url in trained & scored):
            logger.warning(
                "The %s split shares files with the training split: its score will flatter.", role
            )
