"""The whole job from one table: what is held out is scored, and never trained on."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration


def write_table(folder: Path, num_rows: int, seed: int) -> Path:
    """A list of clips of ten speakers, one after the other."""
    folder.mkdir()
    lines = ["path,text,speaker"]
    for number, (data, text) in enumerate(demonstration.make_rows(num_rows, seed=seed)):
        (folder / f"{number:02}.flac").write_bytes(data)
        lines.append(f"{number:02}.flac,{text},{number * 10 // num_rows}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the clips that the runs of a test are trained on, as the library receives them."""
    names: list[str] = []
    get_batch_samples = transformers.Trainer.get_batch_samples

    def remember(trainer: Any, iterator: Iterator, num_batches: int, device: Any) -> Any:
        batches = list(itertools.islice(iterator, num_batches))
        for batch in batches:
            names.extend("/".join(row.split("/")[-2:]) for row in batch["step_info"].ids)
        return get_batch_samples(trainer, iter(batches), num_batches, device)

    monkeypatch.setattr(transformers.Trainer, "get_batch_samples", remember)
    return names


def scored_names(output_dir: Path, record: str = "eval") -> set[str]:
    lines = (output_dir / f"predictions_{record}.jsonl").read_text().splitlines()
    return {"/".join(json.loads(line)["id"].split("/")[-2:]) for line in lines}


def test_a_run_from_one_table_goes_on_with_the_same_hold_out(
    train: Callable[..., dict[str, float]],
    tmp_path: Path,
    trained: list[str],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level("INFO")
    table = write_table(tmp_path / "speech", 40, seed=1)
    flags = f"--dataset_name {table} --do_train --do_eval --save_steps 9 --eval_steps 9"
    metrics = train(f"{flags} --max_steps 9")
    held_out = scored_names(tmp_path / "output")
    assert metrics["eval_num_rows"] == len(held_out) == 4
    assert set(trained) == {f"speech/{n:02}.flac" for n in range(40)} - held_out
    (line,) = [text for text in caplog.messages if text.startswith("hold-out")]
    assert "4 of 40 rows" in line and "1 of 10 speakers (column speaker)" in line
    info = json.loads((tmp_path / "output" / "run_info.json").read_text())
    assert info["data"]["eval"][0]["split"] == "train (hold-out)"

    trained.clear()
    train(f"{flags} --max_steps 18 --eval_fraction 0.3")  # the checkpoint's stays
    assert len(trained) == 36 and not set(trained) & held_out
    assert scored_names(tmp_path / "output") == held_out


def test_each_entry_of_a_mix_has_a_hold_out_of_its_own(
    train: Callable[..., dict[str, float]], tmp_path: Path, trained: list[str], speech: Path
):
    for name, seed in (("a", 1), ("b", 2)):
        write_table(tmp_path / name, 20, seed)
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"- {{dataset_name: {tmp_path / 'a'}}}\n"
        f"- {{dataset_name: {tmp_path / 'b'}, eval_fraction: 0.2}}\n"
        f"- {{dataset_name: {speech}}}\n"
    )
    index = train.args[0].index("--dataset_name")
    flags = [*train.args[0][:index], *train.args[0][index + 2 :]]
    words = f"--data_mix {mix} --do_train --do_eval --max_steps 15 --save_strategy no".split()
    metrics = script.main([*flags, *words])
    scored = [metrics[f"eval_{name}_num_rows"] for name in ("a", "b", speech.name)]
    assert scored == [2, 4, 8]
    held_out = scored_names(tmp_path / "output", "eval_a")
    held_out |= scored_names(tmp_path / "output", "eval_b")
    assert len(held_out) == 6 and not set(trained) & held_out
    assert {name for name in trained if name.startswith(("a/", "b/"))} | held_out == {
        f"{name}/{number:02}.flac" for name in "ab" for number in range(20)
    }


def test_a_run_without_a_hold_out_gets_none_later(
    train: Callable[..., dict[str, float]], tmp_path: Path
):
    table = write_table(tmp_path / "speech", 20, seed=1)
    train(f"--dataset_name {table} --do_train --max_steps 1 --save_steps 1")
    with pytest.raises(UserError, match="the checkpoint was trained on all rows"):
        train(f"--dataset_name {table} --do_train --do_eval --max_steps 2")
