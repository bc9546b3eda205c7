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
    "Save it as CSV in UTF-8: x.csv, each sheet as one of its own.",
    "--dataset_name x.wav": "error: --dataset_name x.wav: one clip is not a data set. "
    "Pass its folder, ., or a list of clips.",
    "--language Spansh": "error: --language Spansh: no such language. Did you mean Spanish (es)?",
    "--language Guarani": GUARANI,
    "--train_split_name nope --do_eval --eval_split_name nowhere": "error: split 'nope': "
    f"{NO_SPLIT}\nerror: split 'nowhere': {NO_SPLIT}",
    "--model_name_or_path empty": "error: --model_name_or_path empty: no model, as there is no "
    "config.json. Found: nothing. Pass the folder of a Whisper in transformers' format, or its id on "
    "the Hub, such as openai/whisper-small.",
    "--output_dir speech": "error: --output_dir speech lies in the folder of the data, where the next "
    "start would take the run's files for data. Choose a folder beside it.",
    "--load_best_model_at_end": "error: --load_best_model_at_end needs --do_train and --do_eval.",
    "--dataset_name latin": "error: latin/train.csv, line 2: is not UTF-8. In Excel, save it as "
    '"CSV UTF-8". Or convert it from the encoding that it was saved in, and put the new file in its place: '
    "iconv -f CP1252 -t UTF-8 latin/train.csv > new-train.csv",
    "--model_name_or_path model.en": "error: --language es: model.en knows English only. Leave out "
    "--language and --task, or choose a multilingual model (without .en in its name).",
    # The tests have no network, as HF_HUB_OFFLINE says.
    "--dataset_name mozilla-foundation/common_voice_11_0": "error: --dataset_name "
    "mozilla-foundation/common_voice_11_0: Common Voice has left the Hub. Download your language from "
    "https://mozilladatacollective.com, unpack it, and pass the folder: --dataset_name FOLDER "
    "--dataset_config_name es (its code), with --eval_split_name dev. See docs/data.md.",
    "--model_name_or_path openai/whisper-none": "error: --model_name_or_path openai/whisper-none: We couldn't "
    "connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files. Check "
    "your internet connection or see how to run the library in offline mode at "
    "'https://huggingface.co/docs/transformers/installation#offline-mode'. HF_HUB_OFFLINE is set, so that "
    "nothing is fetched: unset it, or pass a folder.",
    "--dataset_name alice/speech": "error: opening the data: Couldn't reach 'alice/speech' on the Hub "
    "(OfflineModeIsEnabled). HF_HUB_OFFLINE is set, so that nothing is fetched: unset it, or pass a folder.",
    # Before the Hub is asked, for an account or for anything else.
    "--push_to_hub --dataset_name ./speach --language Spansh": "error: --push_to_hub with "
    "HF_HUB_OFFLINE=1. Unset it, or leave out --push_to_hub.\nerror: --dataset_name ./speach: does not "
    "exist. In this folder: clips, empty, latin, model, model.en, mydata, one, semicolons, speech, x.wav "
    "and 1 more. Did you mean speech?\nerror: --language Spansh: no such language. Did you mean Spanish (es)?",
    "--push_to_hub --dataset_name mozilla-foundation/common_voice_11_0": "error: --push_to_hub with "
    "HF_HUB_OFFLINE=1. Unset it, or leave out --push_to_hub.\nerror: --dataset_name "
    "mozilla-foundation/common_voice_11_0: Common Voice has left the Hub. Download your language from "
    "https://mozilladatacollective.com, unpack it, and pass the folder: --dataset_name FOLDER "
    "--dataset_config_name es (its code), with --eval_split_name dev. See docs/data.md.",
    "--lr 1 --train_file x": "error: unknown flag --lr. Did you mean --learning_rate?\n"
    "error: unknown flag --train_file. Did you mean --dataset_name?",
}

HELD_OUT = [
    "split 'validation': one has no such split. Found: data. --eval_split_name names another; here rows "
    "are held out.",
    "split 'train': one has no such split. Found: data, which is taken. --train_split_name names another.",
    "hold-out: 3 of 30 rows of split 'data' of one, by hash: 3 of 30 recordings (no column "
    "names speakers: --speaker_column_name). They are scored, and never trained on.",
]
# What is understood, with what the log says of it.
UNDERSTOOD = {
    # One table, whatever it is called, in place of a split for each purpose.
    "--dataset_name one --do_train --do_eval": HELD_OUT,
    # As spreadsheets of many countries are saved, with columns of any names.
    "--dataset_name semicolons --do_train": [
        "semicolons/train.csv: the column recording is the audio, by its cells.",
        "semicolons/train.csv: the column what_was_said is the text, by its cells.",
        "train: semicolons train (manifest, 1 file, 30 rows; recording, what_was_said)",
    ],
    # The README's command on thirty clips.
    "--dataset_name one --do_train --max_steps 2000 --max_train_time_in_hours 1e-9": [
        "length: 2,000 steps are 1,000 passes over 30 rows",
        "warning: after so many passes a model recites its training set. --max_steps 20 makes 10 passes.",
    ],
    # English is what it knows anyway.
    "--dataset_name one --do_train --model_name_or_path model.en --language en": [
        "  <|startoftranscript|><|notimestamps|>seis ocho diez<|endoftext|>",
    ],
    # A folder of recordings, without transcripts.
    "--dataset_name clips --do_predict": [
        "split 'test': clips has no such split. Found: train, which is taken. --predict_split_name "
        "names another.",
        "predict: 30 rows to transcribe, rejected: none",
        "no references: 30 rows transcribed, not scored.",
        "  transcripts  out/predictions_predict.jsonl",
    ],
}


@pytest.fixture
def folder(
    english_model: Path,
    tiny_model: Path,
    speech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """What lies about in a newcomer's folder."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(speech, tmp_path / "speech")
    shutil.copytree(english_model, tmp_path / "model.en")
    for name in ("clips", "one", "semicolons", "latin", "mydata"):
        (tmp_path / name).mkdir()
    write_tables(tmp_path)
    (tmp_path / "mydata" / "data.csv").write_text("path,text\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    (tmp_path / "x.wav").write_bytes(demonstration.make_rows(1, seed=0)[0][0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_tables(folder: Path) -> None:
    """A folder of clips, and tables of them."""
    table = ["path,sentence"]
    with_semicolons = ["recording;what_was_said"]
    for i, (data, text) in enumerate(demonstration.make_rows(30, seed=1)):
        (folder / "clips" / f"{i}.flac").write_bytes(data)
        table.append(f"../clips/{i}.flac,{text}")
        with_semicolons.append(f"../clips/{i}.flac;{text}")
    (folder / "one" / "data.csv").write_text("\n".join(table))
    (folder / "semicolons" / "train.csv").write_text("\n".join(with_semicolons))
    (folder / "latin" / "train.csv").write_text("path,text\na.flac,camión\n", encoding="latin-1")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_whole(mistake: str, capsys: pytest.CaptureFixture):
    words = "--model_name_or_path model --dataset_name speech --language es --output_dir out"
    words += f" --do_train --max_steps 1 --report_to none {mistake}"
    assert exit_code_of(script.main, words.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error: " in line] == MISTAKES[mistake].split("\n")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", UNDERSTOOD)
def test_what_is_meant_is_understood_and_said(command: str, capsys: pytest.CaptureFixture):
    words = "--model_name_or_path model --language es --output_dir out --report_to none "
    words += "--report_clips 0 --dataloader_num_workers 0 --generation_max_length 12 "
    words += "--per_device_train_batch_size 15 "
    words += "" if "max_steps" in command or "predict" in command else "--max_steps 1 "
    code = exit_code_of(script.main, [*words.split(), *command.split()])
    assert code == (75 if "max_train_time" in command else 0)
    lines = [line[9:] for line in capsys.readouterr().err.splitlines()]  # without the clock
    told = [line for line in lines if line in UNDERSTOOD[command]]
    assert sorted(told) == sorted(UNDERSTOOD[command])
