"""Which window clips are padded to where the command line does not say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rows import make_clip

from speech_finetuning.cli import demonstration

MODEL = {"d_model": 16, "num_layers": 1}
RUN = "--do_train --data_report_samples 0 --max_steps"


@pytest.fixture(scope="module")
def model_of_30_seconds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demonstration.make_model(tmp_path_factory.mktemp("m"), **MODEL, window_in_seconds=30)


@pytest.fixture
def run(
    train: Callable, flags: list[str], model_of_30_seconds: Path, caplog: pytest.LogCaptureFixture
) -> Callable[[str], tuple[str, str]]:
    """run("2 --fp16 False") trains two steps; gives the window of its checkpoint, and the log."""
    output_dir = Path(flags[flags.index("--output_dir") + 1])

    def train_once(more: str) -> tuple[str, str]:
        caplog.clear()
        train(f"--model_name_or_path {model_of_30_seconds} {RUN} {more}")
        newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        state = json.loads((newest / "stream_state.json").read_text())
        return state["settings"]["--train_window"], caplog.text

    return train_once


def test_short_clips_are_padded_to_the_longest_of_a_batch(run: Callable):
    window, log = run("2")
    assert window == "longest"
    assert log.count("window: a batch's longest clip, as half are below 1.4 s") == 1
    window, log = run("4")
    assert window == "longest" and "window:" not in log


def test_the_command_line_decides(run: Callable):
    window, log = run("2 --train_window full")
    assert window == "full" and "window:" not in log


def test_a_run_that_began_with_full_windows_goes_on_with_them(run: Callable):
    run("2 --train_window full")
    assert run("4")[0] == "full"


def test_packs_fill_their_windows(run: Callable):
    assert run("2 --pack_utterances")[0] == "full"


def test_long_clips_fill_their_windows(run: Callable, tmp_path: Path):
    rows = [(make_clip(seconds), "uno") for seconds in (11.0, 12.0, 14.0, 2.0)]
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    window, log = run(f"2 --dataset_name {tmp_path / 'data'}")
    assert window == "full" and "window:" not in log


def test_a_short_window_is_never_padding_for_long(train: Callable, flags: list[str]):
    """4 s, as of the toys: nothing is read for it."""
    train(f"{RUN} 1")
    output_dir = Path(flags[flags.index("--output_dir") + 1])
    state = json.loads((output_dir / "checkpoint-1" / "stream_state.json").read_text())
    assert state["settings"]["--train_window"] == "full"
