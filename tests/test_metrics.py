"""Error rates: jiwer's numbers, three readings of a text, rows counted once."""

import datasets
import jiwer
import numpy as np
import pytest
from transformers import EvalPrediction

import run_speech_recognition_seq2seq_streaming as script


def scorecard(tokenizer, texts: list[str], language: str = "es", do_normalize: bool = True) -> script.Scorecard:
    card = script.Scorecard(tokenizer, {"": (language, do_normalize)})
    names = ["id", "set", "duration"]
    columns = {"index": list(range(len(texts))), "text": texts} | {name: [""] * len(texts) for name in names}
    card.use(datasets.Dataset.from_dict(columns))
    return card


def outputs(tokenizer, texts: list[str], indices: list[int]) -> EvalPrediction:
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, ids))
    padded = np.array([row + [-100] * (width - len(row)) for row in ids])
    losses, counts = np.arange(1.0, len(ids) + 1), np.array([2] * len(ids))
    return EvalPrediction((padded, losses, counts), np.array(indices))


def test_numbers_are_jiwers(preparer):
    references = ["Uno, dos.", "tres cuatro cinco", "seis"]
    predictions = ["uno dos", "tres cinco", "seis siete ocho"]
    card = scorecard(preparer.tokenizer, references)
    metrics = card(outputs(preparer.tokenizer, predictions, [0, 1, 2]))
    assert metrics["wer_ortho"] == pytest.approx(100 * jiwer.wer(references, predictions))
    assert metrics["cer_ortho"] == pytest.approx(100 * jiwer.cer(references, predictions))
    assert metrics["wer"] == metrics["wer_norm"] == pytest.approx(100 * 3 / 6)
    assert (metrics["substitutions"], metrics["deletions"], metrics["insertions"], metrics["hits"]) == (0, 1, 2, 5)
    assert metrics["loss"] == pytest.approx((1 + 2 + 3) / 6)
    as_written = scorecard(preparer.tokenizer, references, do_normalize=False)
    assert as_written(outputs(preparer.tokenizer, predictions, [0, 1, 2]))["wer"] == metrics["wer_ortho"]


def test_duplicates_of_several_processes_count_once_in_any_order(preparer):
    card = scorecard(preparer.tokenizer, ["uno", "dos", "tres"])
    metrics = card(outputs(preparer.tokenizer, ["tres", "uno", "dos", "tres"], [2, 0, 1, 2]))
    assert metrics["num_rows"] == 3 and metrics["wer"] == 0 and metrics["hits"] == 3
    assert [(row["reference"], row["prediction"]) for row in card.scored] == [(w, w) for w in ("uno", "dos", "tres")]


def test_marks_are_kept_where_whispers_normaliser_drops_them(preparer):
    normalize = script.text_normalizers("hi", True, preparer.tokenizer)
    assert normalize["_norm"]("नमस्ते, दुनिया!").split() == "नमस त द न य".split()
    assert normalize["_norm_marks"]("नमस्ते, दुनिया!").split() == "नमस्ते दुनिया".split()
    english = script.text_normalizers("en", True, preparer.tokenizer)
    assert english["_norm"]("I can't, twenty one").split() == "i can not 21".split()


def test_any_white_space_separates_words(preparer):
    card = scorecard(preparer.tokenizer, ["uno\u00a0dos\ntres"])
    assert card(outputs(preparer.tokenizer, ["uno dos tres"], [0]))["wer_ortho"] == 0


def test_references_that_normalise_to_nothing_are_counted_not_scored(preparer):
    card = scorecard(preparer.tokenizer, ["uno", "..."])
    metrics = card(outputs(preparer.tokenizer, ["uno", "dos dos dos"], [0, 1]))
    assert metrics["empty_references"] == 1 and metrics["wer"] == 0 and metrics["insertions"] == 0
    nothing = scorecard(preparer.tokenizer, ["!"])(outputs(preparer.tokenizer, ["uno"], [0]))
    assert "wer" not in nothing and "wer_ortho" in nothing


def test_inputs_are_not_modified(preparer):
    given = outputs(preparer.tokenizer, ["uno", "dos tres"], [0, 1])
    before = given.predictions[0].copy()
    scorecard(preparer.tokenizer, ["uno", "dos"])(given)
    assert np.array_equal(given.predictions[0], before)
