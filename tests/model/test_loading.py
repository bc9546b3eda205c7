"""Checkpoints as people have them: what works is completed, what cannot is one line before data is
opened."""

import json
import logging
import os
import pickle
import pty
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperTokenizer

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.model.generation import complete_generation_config
from speech_finetuning.model.languages import check_language
from speech_finetuning.model.loading import load_processor

Train = Callable[[str], dict[str, float]]
OF_2023 = ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file; None removes one."""
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        settings.pop(name, None)
        if value is not None:
            settings[name] = value
    path.write_text(json.dumps(settings))


def without_entries(model: Path, names: tuple[str, ...]) -> None:
    edit(model / "generation_config.json", **dict.fromkeys(names))


# ------------------------------------------------------------------------- old generation configs


def as_of_2022(model: Path) -> None:
    """As the event's fine-tuned models have it: made from the model's config, and marked so."""
    without_entries(model, (*OF_2023, "prev_sot_token_id", "max_length"))
    edit(model / "generation_config.json", _from_model_config=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: without_entries(model, OF_2023),
        lambda model: without_entries(model, ("lang_to_id", "task_to_id")),
        lambda model: without_entries(model, ("no_timestamps_token_id",)),
        as_of_2022,
        lambda model: (model / "generation_config.json").unlink(),
    ],
    ids=["none of 2023's entries", "no ids", "no timestamps token", "as of 2022", "no file"],
)
def test_an_old_generation_config_is_completed_from_the_tokenizer(
    model: Path, tiny_model: Path, spoil: Callable[[Path], None]
):
    expected = GenerationConfig.from_pretrained(tiny_model)
    spoil(model)
    _, found, _ = load_processor(str(model), "main", None)
    for name in (*OF_2023, "decoder_start_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.max_length == expected.max_length == 64
    assert check_language("spanish", found, "model") == "es"


def test_a_model_with_an_old_generation_config_scores_and_is_saved_like_a_new_one(
    train: Train, model: Path, tiny_model: Path, tmp_path: Path
):
    flags = "--do_train --do_eval --max_steps 2 --model_name_or_path"
    expected = train(f"{flags} {tiny_model} --output_dir {tmp_path / 'new'}")
    as_of_2022(model)
    found = train(f"{flags} {model} --output_dir {tmp_path / 'old'}")
    assert found["eval_wer"] == expected["eval_wer"]
    assert found["eval_loss"] == expected["eval_loss"]
    saved = GenerationConfig.from_pretrained(tmp_path / "old")
    assert (
        saved.lang_to_id["<|es|>"]
        == GenerationConfig.from_pretrained(tiny_model).lang_to_id["<|es|>"]
    )
    assert saved.language == "es" and saved.task == "transcribe"


def test_a_generation_config_that_lacks_nothing_is_not_touched(tiny_model: Path, caplog: Any):
    processor, found, config = load_processor(str(tiny_model), "main", None)
    assert complete_generation_config(found, processor.tokenizer, config) is found
    assert found.to_dict() == GenerationConfig.from_pretrained(tiny_model).to_dict()
    assert "completed" not in caplog.text


def test_an_english_vocabulary_is_known_by_its_end_although_it_has_tokens_for_all_languages(
    english_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Path(shutil.copytree(english_model, tmp_path / "model.en"))
    without_entries(model, OF_2023)
    tokenizer = WhisperTokenizer.from_pretrained(model)
    end = tokenizer.get_vocab()["<|endoftext|>"]
    assert "<|es|>" in tokenizer.get_vocab()
    monkeypatch.setattr("speech_finetuning.model.generation.END_OF_ENGLISH_VOCABULARY", end)
    _, found, _ = load_processor(str(model), "main", None)
    assert found.is_multilingual is False and not hasattr(found, "lang_to_id")
    assert check_language(None, found, "model.en") is None


def test_a_tokenizer_without_whispers_tokens_cannot_complete_it(model: Path):
    without_entries(model, OF_2023)
    text = (model / "tokenizer.json").read_text().replace("<|notimestamps|>", "<|other|>")
    (model / "tokenizer.json").write_text(text)
    edit(model / "tokenizer_config.json", additional_special_tokens=None, extra_special_tokens=None)
    with pytest.raises(UserError, match="lacks no_timestamps_token_id, and its tokenizer has no"):
        load_processor(str(model), "main", None)


def test_max_new_tokens_beyond_the_decoder_is_lowered_and_the_flag_counts(
    train: Train, model: Path, caplog: pytest.LogCaptureFixture
):
    edit(model / "generation_config.json", max_new_tokens=64)
    metrics = train(f"--do_eval --model_name_or_path {model}")
    assert "max_new_tokens 64 is more than the model can: 60 now" in caplog.text
    assert metrics["eval_num_rows"] == 8
    rows = (Path(model).parent / "output" / "predictions_eval.jsonl").read_text().splitlines()
    # An untrained model goes on to the limit: --generation_max_length 12 of byte tokens.
    longest = max(len(json.loads(row)["prediction"].encode()) for row in rows)
    assert longest <= 12 * 4 and metrics["eval_cut_outputs"] == 100


# --------------------------------------------------------------------------------------- language


@pytest.mark.parametrize("language", ["en", "English", "EN", None])
def test_an_english_only_model_takes_english(english_model: Path, language: str | None):
    _, generation_config, _ = load_processor(str(english_model), "main", None)
    assert check_language(language, generation_config, "model.en") is None


def test_an_english_only_model_trains_with_its_language_named(train: Train, english_model: Path):
    metrics = train(f"--do_eval --language en --model_name_or_path {english_model}")
    assert metrics["eval_num_rows"] == 8


# ------------------------------------------------------------------------- what cannot be trained


class Intruder:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def intruded(model: Path) -> Path:
    return model.parent / "intruded"


def only_adapter(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "openai/whisper-small"}
    (model / "adapter_config.json").write_text(json.dumps(settings))


def only_ctranslate2(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "config.json").write_text('{"lang_ids": [1], "alignment_heads": []}')
    (model / "model.bin").write_bytes(b"0")


def no_model(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()
    (model / "notes.txt").write_text("mine")


def pickle_with_code(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({**tensors, "more": Intruder(intruded(model))}, model / "pytorch_model.bin")


def old_pickle_with_code(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"more": Intruder(intruded(model))}))


def cut_pickle(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    os.truncate(model / "pytorch_model.bin", 5000)


def larger_tokenizer(model: Path) -> None:
    tokenizer = WhisperTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["uno", "dos", "tres"])
    tokenizer.save_pretrained(model)


def another_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def weights_left_out(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "encoder.layers" not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def foreign_type(model: Path) -> None:
    settings = {"model_type": "newthing", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(settings))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 150\n"
CANNOT_BE_TRAINED = {
    "adapter": (only_adapter, "a PEFT adapter.* openai/whisper-small.*merge_and_unload"),
    "ctranslate2": (only_ctranslate2, "a CTranslate2 model"),
    "no model": (no_model, "no config.json. Found: notes.txt"),
    "pickle with code": (pickle_with_code, "maybe code, which is never run"),
    "old pickle with code": (old_pickle_with_code, "maybe code, which is never run"),
    "cut pickle": (cut_pickle, "pytorch_model.bin is damaged"),
    "larger tokenizer": (larger_tokenizer, "567 tokens, its model only 564.*resize_token"),
    "no tokenizer": (another_tokenizer, "do not belong together. Copy tokenizer.json"),
    "foreign type": (foreign_type, "newthing model; only Whisper can be used here"),
    "weights left out": (weights_left_out, "of its weights are missing, such as model.encoder"),
    "other shapes": (
        lambda model: edit(model / "config.json", d_model=32),
        "error: --model_name_or_path",
    ),
    "cut weights": (
        lambda model: os.truncate(model / "model.safetensors", 5000),
        "model.safetensors: .*header",
    ),
    "empty weights": (
        lambda model: (model / "model.safetensors").write_bytes(b""),
        "model.safetensors: ",
    ),
    "pointer": (
        lambda model: (model / "model.safetensors").write_bytes(LFS_POINTER),
        "model.safetensors: .*header",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no file named model"),
    "no JSON": (
        lambda model: (model / "config.json").write_text("{"),
        "not a valid JSON file. Copy that file",
    ),
    "a list": (lambda model: (model / "config.json").write_text("[1]"), "names no model_type"),
    "odd value": (lambda model: edit(model / "config.json", d_model="x"), "error: --model_name"),
    "no model_type": (
        lambda model: edit(model / "config.json", model_type=None),
        "names no model_type",
    ),
    "torn tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{"),
        "error: --model_name_or_path",
    ),
    "no feature extractor": (
        lambda model: [path.unlink() for path in model.glob("*processor_config.json")],
        "feature extractor",
    ),
    "torn generation config": (
        lambda model: (model / "generation_config.json").write_text("{"),
        "generation_config.json' is not a valid JSON",
    ),
}


@pytest.mark.parametrize("kind", CANNOT_BE_TRAINED)
def test_what_cannot_be_trained_is_one_line_and_runs_no_code(
    flags: list[str], model: Path, kind: str, capsys: pytest.CaptureFixture
):
    spoil, message = CANNOT_BE_TRAINED[kind]
    spoil(model)
    words = [*flags, "--model_name_or_path", str(model), "--do_train", "--max_steps", "1"]
    assert exit_code_of(script.main, words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert not intruded(model).exists()


BEFORE_DATA = [
    kind
    for kind in CANNOT_BE_TRAINED
    if kind not in ("weights left out", "other shapes", "no weights")
]


@pytest.mark.parametrize("kind", BEFORE_DATA)
def test_it_is_said_before_data_is_opened(
    flags: list[str], model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    CANNOT_BE_TRAINED[kind][0](model)
    monkeypatch.setattr(script, "load_speech", lambda *args: pytest.fail("data was opened"))
    words = [*flags, "--model_name_or_path", str(model), "--do_train", "--max_steps", "1"]
    assert exit_code_of(script.main, words) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "there is no such folder"),
        ("./missing", "there is no such folder"),
        ("models/whisper/small", "there is no such folder"),
        ("whisper-small", "On the Hub a model has an owner, as openai/whisper-small"),
        (__file__, "a file. Pass the folder"),
        ("mod\udcffel", "bytes that are not UTF-8"),
    ],
)
def test_a_path_that_is_no_folder_never_goes_to_the_hub(name: str, message: str):
    with pytest.raises(UserError, match=message):
        load_processor(name, "main", None)


def test_a_good_pickle_is_loaded(train: Train, model: Path):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    assert train(f"--do_eval --model_name_or_path {model}")["eval_num_rows"] == 8


@pytest.mark.slow
def test_no_question_is_asked_on_a_terminal(flags: list[str], model: Path):
    """A tokenizer and a type with code of their own, on a real terminal where a question would wait
    for its answer."""
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    foreign_type(model)
    words = [*flags, "--model_name_or_path", str(model), "--do_train", "--max_steps", "1"]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, script.__file__, *words])
    text = b""
    while True:
        try:
            text += os.read(terminal, 4096)
        except OSError:  # the other side has closed
            break
    _, ended = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended) == 2, text[-2000:]
    assert b"[y/N]" not in text and b"newthing" in text


def test_a_whisper_with_code_beside_it_is_trained_without(train: Train, model: Path):
    edit(model / "config.json", auto_map={"AutoModel": "evil.Model"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(intruded(model))!r})\n")
    assert train(f"--do_eval --model_name_or_path {model}")["eval_num_rows"] == 8
    assert not intruded(model).exists()
    assert WhisperForConditionalGeneration.from_pretrained(model).config.model_type == "whisper"


def test_a_warning_names_what_was_completed(model: Path, caplog: pytest.LogCaptureFixture):
    without_entries(model, ("task_to_id",))
    with caplog.at_level(logging.WARNING):
        load_processor(str(model), "main", None)
    assert "the generation config lacks task_to_id" in caplog.text
