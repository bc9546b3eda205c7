"""Guards in a run: what is saved stays as it was without them, and the bound chooses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.scoring.guards import GuardBound
from speech_finetuning.training.averaging import Candidate, WeightChoice, warn_of_lost_guards
from speech_finetuning.training.callbacks import early_stopping

Train = Callable[[str], dict[str, float]]
STEPS = "--do_train --do_eval --max_steps 4 --save_steps 2 --eval_steps 2 --learning_rate 0.02"
# The loss falls from step 2 to 4, so that step 2 is the best by this.
HIGHEST_LOSS = "--metric_for_best_model loss --greater_is_better True"
BOUND = GuardBound(rates={"old": "wer"}, max_loss_in_points=2.0, untouched={"old": 10.0})


@pytest.fixture
def guarded(train: Any, speech: Path, tmp_path: Path) -> Train:
    """As `train`, on the same data, with its test split as a guard in another language."""
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"- {{dataset_name: {speech}, name: old, guard: true, eval_split_name: test, language: en}}\n"
        f"- {{dataset_name: {speech}, name: new}}\n"
    )
    position = train.args[0].index("--dataset_name")
    flags = [*train.args[0][:position], *train.args[0][position + 2 :], "--data_mix", str(mix)]
    return lambda more: script.main([*flags, *more.split()])


@pytest.mark.slow
def test_a_guard_is_scored_before_and_after_and_changes_nothing_that_is_saved(
    train: Train, guarded: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    plain = train(f"{STEPS} --load_best_model_at_end --output_dir {tmp_path / 'plain'}")
    caplog.clear()
    metrics = guarded(f"{STEPS} --max_guard_loss_in_points 100000")
    for name in ("model.safetensors", "generation_config.json", "tokenizer_config.json"):
        files = [tmp_path / folder / name for folder in ("plain", "output")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for name in ("wer", "cer", "num_rows", "hits"):
        assert metrics[f"eval_{name}"] == plain[f"eval_{name}"], name
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert metrics["zero_shot_old_num_rows"] == metrics["eval_old_num_rows"] == 8
    assert "eval_old_wer_change_low" in metrics
    assert "what must not get worse\nbefore training old" in caplog.text
    info = json.loads((tmp_path / "output" / "run_info.json").read_text())
    assert [source["record"] for source in info["data"]["guard"]] == ["old"]
    assert "what must not get worse" in (tmp_path / "output" / "README.md").read_text()
    page = (tmp_path / "output" / "report.html").read_text()
    assert "What must not get worse" in page and "<td>old</td>" in page
    (tables,) = re.findall(r'<script type="application/json" id="tables">(.*?)</script>', page)
    (table,) = json.loads(tables)
    assert [(each["name"], each["isGuard"]) for each in table["sets"]] == [
        ("new", False),
        ("old", True),
    ]
    assert sorted(row[12] for row in table["rows"]) == [0] * 8 + [1] * 8
    assert all(row[11] is not None for row in table["rows"]), "the untouched model's errors"
    assert "·&nbsp;new" not in page, "a single set beside guards is the total"
    assert "<p>8 rows, " in page and "<p>16 rows, " not in page, "guards are not counted"
    assert "before training new" not in caplog.text  # which is the total
    assert len(lines_of_points(caplog)) == 3  # at steps 2 and 4, and of the best

    guarded(f"{STEPS} --max_guard_loss_in_points 100000 --base_weight_shares 1")  # goes on
    assert len(lines_of_points(caplog)) == 5  # of the best again, and of the share
    _, untouched = json.loads((tmp_path / "output" / "weights.json").read_text())
    scores = untouched["scores"]
    for name in ("old_wer", "old_cer", "wer", "cer"):
        assert scores[f"eval_{name}"] == metrics[f"zero_shot_{name}"], name
    change = (scores["eval_old_cer_change_low"], scores["eval_old_cer_change_high"])
    assert change == (0, 0) != (metrics["eval_old_cer_change_low"],) * 2


def lines_of_points(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the guard, below its rates, in the blocks of evaluations."""
    return [text for text in caplog.messages if re.match(" +WER [-+][0-9.]+ points", text)]


@pytest.mark.parametrize("steps_beyond", [[], [2], [2, 4]])
def test_a_checkpoint_beyond_the_bound_is_not_the_best(
    guarded: Train,
    tmp_path: Path,
    steps_beyond: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """By the loss, the higher the better, step 2 would be the best one."""
    losses: list[float] = []

    def broken_by(bound: GuardBound, metrics: dict[str, float]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        if loss not in losses:
            losses.append(loss)
        return {"old": 3.0} if 2 * (losses.index(loss) + 1) in steps_beyond else {}

    monkeypatch.setattr(GuardBound, "broken_by", broken_by)
    guarded(f"{STEPS} {HIGHEST_LOSS} --max_guard_loss_in_points 2")
    state = json.loads((tmp_path / "output" / "checkpoint-4" / "trainer_state.json").read_text())
    best = {(): "checkpoint-2", (2,): "checkpoint-4", (2, 4): None}[tuple(steps_beyond)]
    found = state["best_model_checkpoint"]
    assert (found and Path(found).name) == best
    said = "not for the best model: WER of old +3.00 points (--max_guard_loss_in_points 2)"
    assert caplog.messages.count(said) == len(steps_beyond)
    warning = "the saved weights are beyond --max_guard_loss_in_points 2: WER of old +3.00 points"
    assert (warning in caplog.text) == (best is None)
    assert ("with --base_weight_shares 0.3 0.6 0.9, which" in caplog.text) == (best is None)


def test_a_run_ends_early_if_all_is_beyond_the_bound(
    guarded: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(GuardBound, "broken_by", lambda bound, metrics: {"old": 3.0})
    guarded(f"{STEPS} --max_guard_loss_in_points 2 --early_stopping_patience 1")
    assert [path.name for path in tmp_path.glob("output/checkpoint-*")] == ["checkpoint-2"]


def test_an_evaluation_beyond_the_bound_is_no_better_one():
    (callback,) = early_stopping(2)
    callback.guard_bound = BOUND
    args: Any = SimpleNamespace(metric_for_best_model="wer", greater_is_better=False)
    control = transformers.TrainerControl()
    state = transformers.TrainerState(best_metric=20.0)
    for of_guard, count in ((12.5, 1), (12.0, 0), (13.0, 1), (13.0, 2)):
        assert not control.should_training_stop
        metrics = {"eval_wer": 10.0, "eval_old_wer": of_guard}
        callback.on_evaluate(args, state, control, metrics=metrics)
        assert callback.early_stopping_patience_counter == count
    assert control.should_training_stop


def test_a_dry_run_compares_nothing(guarded: Train, caplog: pytest.LogCaptureFixture):
    guarded(f"{STEPS} --dry_run --max_guard_loss_in_points 0")
    assert "after training old" in caplog.text
    assert "before training" not in caplog.text and "points" not in caplog.text


def choice_among(*rates: tuple[float, float]) -> str:
    """The title of the weights that are kept. rates: WER of the evaluation and of the guard, of
    each in turn; the untouched model has 10 % on the guard."""
    choice = object.__new__(WeightChoice)
    choice.trainer = SimpleNamespace(
        guard_bound=BOUND, args=SimpleNamespace(greater_is_better=False)
    )
    choice.metric = "eval_wer"
    choice.candidates = []
    for number, (wer, of_guard) in enumerate(rates):
        scores = {"eval_wer": wer, "eval_cer": 1.0, "eval_loss": 1.0, "eval_old_wer": of_guard}
        candidate = Candidate(title=str(number), weights=None, metrics=scores, label="")
        choice.candidates.append(candidate)
        if number == 0 or choice.is_better(candidate, choice.kept):
            choice.kept = candidate
    lines = choice.table().splitlines()[1:]
    assert ["lost too much" in line for line in lines] == [rate > 12 for _, rate in rates]
    return choice.kept.title


def test_weights_are_chosen_within_the_bound():
    assert choice_among((20, 11), (15, 12.5)) == "0"  # better, and beyond
    assert choice_among((20, 13), (25, 12), (24, 11), (26, 10)) == "2"  # the best within
    assert choice_among((20, 13), (19, 13)) == "0"  # none is within: the trained ones
    assert choice_among((20, 11), (19, 12)) == "1"


def test_the_next_share_to_try_lies_between(caplog: pytest.LogCaptureFixture):
    trainer: Any = SimpleNamespace(guard_bound=BOUND)
    warn_of_lost_guards(trainer, {"eval_old_wer": 12.0}, (0.6, 0.3))
    assert caplog.text == ""
    warn_of_lost_guards(trainer, {"eval_old_wer": 12.5}, (0.6, 0.3))
    assert "with --base_weight_shares 0.8, which trains nothing" in caplog.text
