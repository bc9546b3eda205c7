"""Error rates: jiwer's numbers, three readings of a text, rows counted once."""

import importlib.util
import json
import time
import zlib
from collections.abc import Sequence

import datasets
import jiwer
import numpy as np
import pytest
from transformers import EvalPrediction

from speech_finetuning.scoring.metrics import (
    SpeechErrors,
    bootstrap_rates,
    ends_in_loop,
    has_loop,
    paired_change,
    translation_scores,
)
from speech_finetuning.scoring.normalization import (
    NORM,
    NORM_MARKS,
    ScoringTarget,
    text_normalizers,
)
from speech_finetuning.scoring.predictions import write_predictions
from speech_finetuning.scoring.scorecard import Scorecard

# Accents in one and in two code points, scripts without capitals or spaces, an elision.
LATIN_WORDS = "uno dos tres año über cafe\u0301 café żółć naïve l'été x".split()
WORDS = [*LATIN_WORDS, *"नमस्ते ภาษาไทย 你好 Ελλάδα привет".split()]


def random_pairs(num_pairs: int, seed: int) -> tuple[list[str], list[str]]:
    """References, and hypotheses with words left out, swapped, doubled, added; some are empty."""
    generator = np.random.default_rng(seed)
    references, hypotheses = [], []
    for number in range(num_pairs):
        reference = [str(word) for word in generator.choice(WORDS, generator.integers(1, 13))]
        hypothesis = []
        for word in reference if number % 10 else []:
            other = str(generator.choice(WORDS))
            kinds = ([word], [], [other], [word, word], [other, word], [word[:-1]])
            hypothesis += kinds[generator.choice(len(kinds), p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])]
        references.append(" ".join(reference))
        hypotheses.append(" ".join(word for word in hypothesis if word))
    return references, hypotheses


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein's distance by the textbook: shares nothing with jiwer."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(hypothesis, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != found))
            diagonal, row[j] = row[j], best
    return row[-1]


def scorecard(
    tokenizer, texts: list[str], language: str = "es", do_normalize: bool = True
) -> Scorecard:
    target = ScoringTarget(language=language, leads_normalized=do_normalize)
    card = Scorecard(tokenizer=tokenizer, targets={"": target})
    columns = {"index": list(range(len(texts))), "text": texts, "duration": [3.0] * len(texts)}
    columns |= {name: [""] * len(texts) for name in ("id", "set")}
    card.set_references(datasets.Dataset.from_dict(columns))
    return card


def outputs(tokenizer, texts: list[str], indices: list[int]) -> EvalPrediction:
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, ids))
    padded = np.array([row + [-100] * (width - len(row)) for row in ids])
    losses, counts = np.arange(1.0, len(ids) + 1), np.array([2] * len(ids))
    return EvalPrediction((padded, losses, counts), np.array(indices))


def test_numbers_are_jiwers(tokenizer):
    references = ["Uno, dos.", "tres cuatro cinco", "seis"]
    predictions = ["uno dos", "tres cinco", "seis siete ocho"]
    card = scorecard(tokenizer, references)
    metrics = card(outputs(tokenizer, predictions, [0, 1, 2]))
    assert metrics["wer_ortho"] == pytest.approx(100 * jiwer.wer(references, predictions))
    assert metrics["cer_ortho"] == pytest.approx(100 * jiwer.cer(references, predictions))
    assert metrics["wer"] == metrics["wer_norm"] == pytest.approx(100 * 3 / 6)
    assert (
        metrics["substitutions"],
        metrics["deletions"],
        metrics["insertions"],
        metrics["hits"],
    ) == (0, 1, 2, 5)
    assert metrics["loss"] == pytest.approx((1 + 2 + 3) / 6)
    as_written = scorecard(tokenizer, references, do_normalize=False)
    assert as_written(outputs(tokenizer, predictions, [0, 1, 2]))["wer"] == metrics["wer_ortho"]


def test_words_of_prompts_are_counted_where_they_are_spoken(tokenizer):
    target = ScoringTarget(language="es", leads_normalized=True)
    card = Scorecard(tokenizer=tokenizer, targets={"": target})
    columns = {
        "index": [0, 1, 2],
        "set": [""] * 3,
        "id": ["a", "b", "c"],
        "text": ["Eva y Ana y Eva", "Pau", "nada"],
        "duration": [3.0] * 3,
        "prompt": ["Ana, Eva, Pau.", "Eva", None],
    }
    card.set_references(datasets.Dataset.from_dict(columns), role="prompted")
    metrics = card(outputs(tokenizer, ["eva y Anna y Eva Eva Pau", "Eva", "nada"], [0, 1, 2]))
    # Eva twice and Ana; Ana is misspelt, a third Eva and a Pau have not been spoken.
    assert (metrics["prompt_words"], metrics["prompt_words_written"]) == (3, 2)
    assert "prompt_words" not in card.score_set(card.scored[2:], set_name="").to_metrics()


def test_guards_have_no_part_in_the_total_nor_in_the_loss(tokenizer):
    new = ScoringTarget(language="es", leads_normalized=True)
    old = ScoringTarget(language="es", leads_normalized=True, is_guard=True)
    card = Scorecard(tokenizer=tokenizer, targets={"new": new, "old": old})
    columns = {
        "index": [0, 1, 2],
        "set": ["new", "old", "new"],
        "id": ["a", "b", "c"],
        "text": ["uno", "dos tres", "seis"],
        "duration": [3.0] * 3,
    }
    card.set_references(datasets.Dataset.from_dict(columns), role="zero_shot")
    card(outputs(tokenizer, ["uno", "dos tres", "seis"], [0, 1, 2]))
    for role in ("eval", "eval_share_0.3"):  # the second: weights that are tried
        card.set_references(datasets.Dataset.from_dict(columns), role=role)
        metrics = card(outputs(tokenizer, ["uno", "nada tres", "seis"], [0, 1, 2]))
        assert (metrics["num_rows"], metrics["wer"], metrics["hits"]) == (2, 0, 2)
        assert metrics["loss"] == pytest.approx((1 + 3) / 4)
        assert (metrics["old_wer"], metrics["old_num_rows"], metrics["new_wer"]) == (50, 1, 0)
        assert metrics["old_wer_change_low"] == metrics["old_wer_change_high"] == 50


def test_duplicates_of_several_processes_count_once_in_any_order(tokenizer):
    card = scorecard(tokenizer, ["uno", "dos", "tres"])
    metrics = card(outputs(tokenizer, ["tres", "uno", "dos", "tres"], [2, 0, 1, 2]))
    assert metrics["num_rows"] == 3 and metrics["wer"] == 0 and metrics["hits"] == 3
    assert [(row.row.reference, row.prediction) for row in card.scored] == [
        (w, w) for w in ("uno", "dos", "tres")
    ]


def test_marks_are_kept_where_whispers_normaliser_drops_them(tokenizer):
    normalize = text_normalizers("hi", tokenizer)
    assert normalize[NORM]("नमस्ते, दुनिया!").split() == "नमस त द न य".split()
    assert normalize[NORM_MARKS]("नमस्ते, दुनिया!").split() == "नमस्ते दुनिया".split()
    english = text_normalizers("en", tokenizer)
    assert english[NORM]("I can't, twenty one").split() == "i can not 21".split()


def test_any_white_space_separates_words(tokenizer):
    card = scorecard(tokenizer, ["uno\u00a0dos\ntres"])
    assert card(outputs(tokenizer, ["uno dos tres"], [0]))["wer_ortho"] == 0


def test_references_that_normalise_to_nothing_are_counted_not_scored(tokenizer):
    card = scorecard(tokenizer, ["uno", "..."])
    metrics = card(outputs(tokenizer, ["uno", "dos dos dos"], [0, 1]))
    assert metrics["empty_references"] == 1 and metrics["wer"] == 0 and metrics["insertions"] == 0
    nothing = scorecard(tokenizer, ["!"])(outputs(tokenizer, ["uno"], [0]))
    assert "wer" not in nothing and "wer_ortho" in nothing


def test_inputs_are_not_modified(tokenizer):
    given = outputs(tokenizer, ["uno", "dos tres"], [0, 1])
    before = given.predictions[0].copy()
    scorecard(tokenizer, ["uno", "dos"])(given)
    assert np.array_equal(given.predictions[0], before)


def test_prediction_files_hold_every_row_even_without_references(tokenizer, tmp_path):
    card = scorecard(tokenizer, ["uno dos", "!", "tres"])
    card(outputs(tokenizer, ["uno tres", "dos", "tres tres"], [0, 1, 2]))
    write_predictions(tmp_path, "eval", card.scored)
    rows = [
        json.loads(line) for line in (tmp_path / "predictions_eval.jsonl").read_text().splitlines()
    ]
    assert {row["reference"]: row.get("wer") for row in rows} == {
        "uno dos": 50,
        "tres": 100,
        "!": None,
    }
    assert (
        rows[0] | {"id": ""} == rows[0]
        and rows[0]["substitutions"] == 1
        and rows[1]["insertions"] == 1
    )
    worst = (tmp_path / "worst_eval.txt").read_text()
    assert "REF: uno  dos" in worst and worst.count("SENTENCE") == 2
    nothing = scorecard(tokenizer, ["!"])
    nothing(outputs(tokenizer, ["uno"], [0]))
    write_predictions(tmp_path, "eval", nothing.scored)
    assert (tmp_path / "predictions_eval.jsonl").read_text().count("\n") == 1


def test_prediction_files_show_control_characters_and_do_not_obey_them(tokenizer, tmp_path):
    hostile = "uno\x1b]0;title\x07 \x08dos\x9b31m \u202etres"
    card = scorecard(tokenizer, [hostile])
    card(outputs(tokenizer, [hostile + " cuatro"], [0]))
    write_predictions(tmp_path, "eval", card.scored)
    lines = (tmp_path / "predictions_eval.jsonl").read_text(encoding="utf-8")
    worst = (tmp_path / "worst_eval.txt").read_text(encoding="utf-8")
    for text in (lines, worst):
        assert text.replace("\n", "").isprintable()
    assert json.loads(lines)["reference"] == hostile
    assert json.loads(lines)["prediction"] == hostile + " cuatro"


def test_the_interval_is_seeded_and_contains_the_rate(tokenizer):
    generator = np.random.default_rng(3)
    words = "uno dos tres cuatro cinco".split()
    references = [" ".join(generator.choice(words, 6)) for _ in range(60)]
    predictions = [" ".join(generator.permutation(text.split())) for text in references]
    card = scorecard(tokenizer, references)
    given = outputs(tokenizer, predictions, list(range(60)))
    first, second = card(given), card(given)
    assert first["wer_low"] < first["wer"] < first["wer_high"] and first == second
    assert first["wer_high"] - first["wer_low"] < 20


def test_shares_of_empty_repeating_and_cut_outputs(tokenizer):
    card = scorecard(tokenizer, ["uno", "dos", "tres", "seis"])
    card.max_new_tokens = 40
    given = outputs(tokenizer, ["", "dos " * 30, "tres", "x" * 40], [0, 1, 2, 3])
    metrics = card(given)
    assert (metrics["empty_outputs"], metrics["repetition_loops"], metrics["cut_outputs"]) == (
        25,
        50,
        50,
    )


def test_loops_are_looked_for_in_stretches_of_30_s():
    """Any long text compresses well: ten minutes of speech are no loop, half a minute of one is."""
    generator, words = (
        np.random.default_rng(0),
        "uno dos tres cuatro cinco seis siete ocho nueve diez once doce".split(),
    )
    plain = " ".join(f"{word}{generator.integers(99)}" for word in generator.choice(words, 800))
    assert len(plain) > 2.4 * len(zlib.compress(plain.encode()))
    assert not has_loop(plain, 600.0)
    assert has_loop(plain, 10.0)
    assert has_loop(plain + " y otra vez" * 40, 600.0)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 3.0, 7200.0])
def test_hostile_transcripts_are_looked_through_quickly(seconds: float):
    assert not has_loop("", seconds)
    assert not has_loop("a", seconds)
    assert not has_loop("\ud800", seconds)
    began = time.process_time()
    assert has_loop("a" * 10_000_000, seconds)
    assert ends_in_loop("ab" * 5_000_000)
    assert not ends_in_loop("".join(map(chr, range(1000, 50_000))))
    assert time.process_time() - began < 10


@pytest.mark.parametrize("text", ["aaaa", "uno dos dos dos dos", "la la la la", "x" * 12])
def test_a_loop_at_the_end_is_found_in_few_characters(text: str):
    assert ends_in_loop(text)
    assert not has_loop(text, 3.0)


@pytest.mark.parametrize("text", ["", "a", "aaa", "uno dos", "no no no, uno", "1000", "dos dos"])
def test_speech_that_ends_is_no_loop(text: str):
    assert not ends_in_loop(text)


def test_a_short_loop_counts_where_the_output_was_cut(tokenizer, caplog: pytest.LogCaptureFixture):
    """A dozen tokens of "aaaa", of a model that does not stop: too short for zlib."""
    card = scorecard(tokenizer, ["uno", "dos", "tres"])
    card.max_new_tokens = 12
    given = outputs(tokenizer, ["a" * 12, "uno dos tres", "jajajaja"], [0, 1, 2])
    card.role = "zero_shot"  # an untouched model is not to blame, and its score tells the share
    card(given)
    assert "length limit" not in caplog.text
    card.role = "eval"
    metrics = card(given)
    assert metrics["repetition_loops"] == pytest.approx(100 / 3)
    assert metrics["cut_outputs"] == pytest.approx(200 / 3)
    assert "67 % of 3 transcripts end at the length limit of 12 tokens" in caplog.text
    card.max_new_tokens = 13
    caplog.clear()
    assert card(given)["repetition_loops"] == 0
    assert caplog.text == ""


def test_two_hundred_random_pairs_equal_jiwer(tokenizer):
    generator = np.random.default_rng(7)
    words = "uno dos tres cuatro cinco seis siete ocho nueve diez".split()
    references = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(200)]
    predictions = [" ".join(generator.choice(words, generator.integers(0, 9))) for _ in range(200)]
    metrics = scorecard(tokenizer, references)(outputs(tokenizer, predictions, list(range(200))))
    truth = jiwer.process_words(references, predictions)
    assert metrics["wer"] == 100 * truth.wer and metrics["cer"] == 100 * jiwer.cer(
        references, predictions
    )
    counts = ("substitutions", "deletions", "insertions", "hits")
    assert [metrics[name] for name in counts] == [getattr(truth, name) for name in counts]


def test_two_hundred_random_pairs_equal_a_plain_levenshtein():
    references, hypotheses = random_pairs(200, seed=11)
    errors = SpeechErrors(keep_in_memory=True).compute(
        references=references, predictions=hypotheses
    )
    pairs = [
        (reference.split(), hypothesis.split())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]
    distances = [edit_distance(*pair) for pair in pairs]
    assert errors["wer"] == pytest.approx(
        100 * sum(distances) / sum(len(reference) for reference, _ in pairs), abs=1e-12, rel=0
    )
    characters = sum(map(edit_distance, references, hypotheses))
    assert errors["cer"] == pytest.approx(
        100 * characters / len("".join(references)), abs=1e-12, rel=0
    )
    assert [row.num_errors for row in errors["rows"]] == distances
    assert [row.num_reference_words for row in errors["rows"]] == [
        len(reference) for reference, _ in pairs
    ]


def test_two_hundred_random_pairs_equal_torchmetrics():
    import torchmetrics  # a second, which each worker would take

    references, hypotheses = random_pairs(200, seed=11)
    errors = SpeechErrors(keep_in_memory=True).compute(
        references=references, predictions=hypotheses
    )
    for name, metric in {
        "wer": torchmetrics.text.WordErrorRate(),
        "cer": torchmetrics.text.CharErrorRate(),
    }.items():
        metric.update(hypotheses, references)
        # Its counts, divided in double precision: compute() divides them as float32.
        assert errors[name] == pytest.approx(
            100 * metric.errors.item() / metric.total.item(), abs=1e-12, rel=0
        )
        assert errors[name] == pytest.approx(100 * metric.compute().item(), rel=1e-6)


def test_translations_have_bleu_and_chrf_if_sacrebleu_is_there(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sacrebleu", reason="pip install -r requirements-test.txt")
    texts = ["The cat sleeps on the mat.", "It rains."]
    assert translation_scores(texts, texts) == (pytest.approx(100), pytest.approx(100))
    found = translation_scores(texts, ["The cat sleeps on a mat.", "It is raining."])
    assert found is not None and 0 < found[0] < found[1] < 100
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert translation_scores(texts, texts) is None


@pytest.mark.parametrize("num_rows", [1, 8, 300, 30_000])
def test_draws_at_once_are_those_of_one_after_another(num_rows: int):
    """Of the intervals that runs have published, none changes."""
    numbers = np.random.default_rng(3)
    errors = numbers.integers(0, 9, size=num_rows)
    units = numbers.integers(1, 20, size=num_rows)
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(150):
        drawn = generator.integers(num_rows, size=num_rows)
        rates.append(100 * (errors[drawn].sum() / units[drawn].sum()))
    assert bootstrap_rates(errors, units, 150).tolist() == rates


def test_a_paired_interval_is_narrower_than_two():
    """Rows differ much in difficulty, and the models hardly."""
    generator = np.random.default_rng(0)
    units = [20] * 300
    before = [int(errors) for errors in generator.integers(0, 20, 300)]
    after = [max(0, errors - int(generator.random() < 0.5)) for errors in before]
    change = paired_change(before, after, units)
    assert change is not None and change.verdict == "better"
    assert change.high - change.low < 1 and change.low < change.points < change.high < 0
    same = paired_change(before, before, units)
    assert same is not None and (same.low, same.points, same.high) == (0, 0, 0)
    assert same.verdict == "no clear change" and paired_change([], [], []) is None
