"""A newcomer's mistakes, and the whole answer to each."""

import shutil
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.exit_status import exit_code_of

GUARANI = """\
error: --language Guarani: the model has no token for Guarani (gn). Choose a neighbour, whose token then stands for it:
error:   --language es: Spanish (es), which its readers usually read too
error:   --language en: English (en), the same script
error:   --language de: German (de), the same script"""
NO_SPLIT = "speech has no such split. Found: train, validation, test."
MISTAKES = {
    "--dataset_name mydata/tran.csv": "error: --dataset_name mydata/tran.csv: does not exist. "
    "In mydata: data.csv. Did you mean mydata/data.csv?",
    "--dataset_name x.xlsx": "error: --dataset_name x.xlsx: a spreadsheet is not read. "
    "Save it as CSV in UTF-8: x.csv",
    "--dataset_name x.wav": "error: --dataset_name x.wav: one clip is not a data set. "
    "Pass its folder, ., or a list of clips.",
    "--language Spansh": "error: --language Spansh: no such language. Did you mean Spanish (es)?",
    "--language Guarani": GUARANI,
    "--train_split_name nope --do_eval --eval_split_name nowhere": "error: split 'nope': "
    f"{NO_SPLIT}\nerror: split 'nowhere': {NO_SPLIT}",
    "--model_name_or_path empty": "error: --model_name_or_path empty: no model, as there is no "
    "config.json. Found: nothing.",
    "--output_dir speech": "error: --output_dir speech lies in the folder of the data, where the next "
    "start would take the run's files for data. Choose a folder beside it.",
    "--load_best_model_at_end": "error: --load_best_model_at_end needs --do_train and --do_eval.",
    "--lr 1 --train_file x": "error: unknown flag --lr. Did you mean --learning_rate?\n"
    "error: unknown flag --train_file. Did you mean --dataset_name?",
}


@pytest.fixture
def folder(tiny_model: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lies about in a newcomer's folder."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(speech, tmp_path / "speech")
    (tmp_path / "mydata").mkdir()
    (tmp_path / "mydata" / "data.csv").write_text("path,text\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    (tmp_path / "x.wav").write_bytes(demonstration.make_rows(1, seed=0)[0][0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_whole(mistake: str, capsys: pytest.CaptureFixture):
    words = "--model_name_or_path model --dataset_name speech --language es --output_dir out"
    words += f" --do_train --max_steps 1 --report_to none {mistake}"
    assert exit_code_of(script.main, words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error: " in line] == MISTAKES[mistake].split("\n")
