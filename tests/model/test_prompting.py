"""A prompt for a saved model: as in its training, before every window, and told where it may hurt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from talker import make_long_clip, make_talker

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration, transcribe
from speech_finetuning.data.long_audio import read_recording
from speech_finetuning.data.prompts import encode_prompt
from speech_finetuning.model.prompting import (
    UNTRAINED,
    notes_on,
    prepare_prompt,
    rules_of_run,
)
from speech_finetuning.model.recogniser import Recogniser, load_recogniser
from speech_finetuning.model.transcription import (
    extract_features,
    transcribe_batch,
    transcribe_timed,
)

WINDOW = 4 * 16_000  # the tiny models hear 4 s at once
IN_SPANISH = {"language": "es", "task": "transcribe"}


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture
def recogniser(full_model: Path) -> Recogniser:
    return load_recogniser("MODEL", str(full_model), "cpu")


def write_record(folder: Path, *phases: dict[str, Any]) -> Path:
    """A run_info.json with these settings of a run, one after the other."""
    record = {"identity": {}, "phases": [{"settings": settings} for settings in phases]}
    (folder / "run_info.json").write_text(json.dumps(record))
    return folder


def of_one_source(column: str | None, share: float = 0.5, **others: Any) -> dict[str, Any]:
    settings = {"prompt_column_name": column, "prompt_probability": share, **others}
    return {"--seed": 42} | {f"--{name}": value for name, value in settings.items()}


@pytest.mark.parametrize(
    ("phases", "was_trained"),
    [
        ([of_one_source("keywords")], True),
        ([of_one_source("keywords"), of_one_source(None)], True),
        ([of_one_source("keywords", share=0.0)], False),
        ([of_one_source(None)], False),
        ([{"--seed": 42, "--do_lower_case": False}], False),  # older than the flag
        ([{"--prompt_probability": 0.5}], None),  # of the Hub, where names of columns may be hidden
        (
            [
                {
                    "--seed": 42,
                    "--data_mix, old: prompt_column_name": None,
                    "--data_mix, old: prompt_probability": 0.5,
                    "--data_mix, new: prompt_column_name": "hint",
                    "--data_mix, new: prompt_probability": 0.5,
                }
            ],
            True,
        ),
    ],
)
def test_the_record_of_a_run_tells_whether_it_had_prompts(
    phases: list[dict[str, Any]], was_trained: bool | None, tmp_path: Path
):
    assert rules_of_run(write_record(tmp_path, *phases)).was_trained is was_trained


@pytest.mark.parametrize("text", ["[", "{}", '{"phases": []}', '{"phases": [1]}', "[1]"])
def test_without_a_record_nobody_knows(text: str, tmp_path: Path):
    assert rules_of_run(tmp_path).was_trained is None
    (tmp_path / "run_info.json").write_text(text)
    assert rules_of_run(tmp_path).was_trained is None


def test_a_prompt_is_written_as_in_training(recogniser: Recogniser, tmp_path: Path):
    tokenizer: Any = recogniser.processor.tokenizer
    plain = prepare_prompt(recogniser, " Ana,  ÑANDÚ! ")
    assert plain.ids == encode_prompt("Ana, ÑANDÚ!", tokenizer, 64)
    recogniser.name = str(
        write_record(
            tmp_path, of_one_source("hint", do_lower_case=True, do_remove_punctuation=True)
        )
    )
    lower = prepare_prompt(recogniser, "Ana, ÑANDÚ!")
    assert lower.ids == encode_prompt("ana ñandú", tokenizer, 64)
    assert notes_on(recogniser, lower) == []


def test_a_long_prompt_is_cut_as_whisper_does_and_told(recogniser: Recogniser):
    prompt = prepare_prompt(recogniser, "x" * 100)
    assert len(prompt.ids) == 32 and prompt.num_tokens == 101
    assert notes_on(recogniser, prompt) == [
        "of the prompt's 101 tokens only the last 31 are read: no Whisper reads more"
    ]


def test_a_model_that_was_trained_without_is_told(recogniser: Recogniser, tmp_path: Path):
    prompt = prepare_prompt(recogniser, "Ana")
    assert notes_on(recogniser, prompt) == []  # as of OpenAI's
    recogniser.name = str(write_record(tmp_path, of_one_source(None)))
    assert notes_on(recogniser, prompt) == [UNTRAINED]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <|es|>", "--prompt: <|es|> is a control token: remove it."),
        ("a\ufffd", "--prompt: has lost characters: U+FFFD or half a pair."),
    ],
)
def test_what_is_no_text_is_refused(recogniser: Recogniser, text: str, message: str):
    with pytest.raises(UserError) as error:
        prepare_prompt(recogniser, text)
    assert str(error.value) == message


def test_a_model_without_the_token_is_refused(recogniser: Recogniser, monkeypatch: Any):
    monkeypatch.setattr(recogniser.processor.tokenizer, "get_vocab", dict)
    with pytest.raises(UserError, match="has no token <|startofprev|>, so that it reads no"):
        prepare_prompt(recogniser, "Ana")


def test_windows_read_the_prompt_as_the_library_does(recogniser: Recogniser):
    """With a prompt for the whole batch, which is the one case that the library has."""
    model: Any = recogniser.model
    tokenizer: Any = recogniser.processor.tokenizer
    generator = np.random.default_rng(0)
    clips = [demonstration.speak(words, generator) for words in (["uno", "dos"], ["tres"])]
    ids = prepare_prompt(recogniser, "Ana, Eva").ids
    texts = transcribe_batch(recogniser, clips, [IN_SPANISH] * 2, ids)
    assert texts != transcribe_batch(recogniser, clips, [IN_SPANISH] * 2)
    expected = model.generate(
        input_features=extract_features(recogniser, clips),
        prompt_ids=torch.tensor(ids),
        suppress_tokens=list(
            range(model.generation_config.no_timestamps_token_id + 1, model.config.vocab_size)
        ),
        **IN_SPANISH,
    )
    assert texts == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in expected]


@pytest.mark.parametrize("max_new_tokens", [None, 60])
def test_every_window_reads_it_also_with_the_models_times(
    talker: Path, tmp_path: Path, monkeypatch: Any, max_new_tokens: int | None
):
    """Also of a model whose limit leaves no room for a prompt, where the library fails."""
    recogniser = load_recogniser("MODEL", str(talker), "cpu")
    recogniser.model.generation_config.max_new_tokens = max_new_tokens
    waveform = read_recording(make_long_clip(tmp_path))
    ids = prepare_prompt(recogniser, "x" * 100).ids
    read: list[list[int]] = []
    forward = recogniser.model.forward

    def note(**inputs: Any) -> Any:
        given = inputs.get("decoder_input_ids")
        if given is not None and given.shape[1] > 1:
            read.append(given[0].tolist())
        return forward(**inputs)

    monkeypatch.setattr(recogniser.model, "forward", note)
    timed = transcribe_timed(recogniser, [waveform], [IN_SPANISH], 1, ids)
    segments = timed[0]
    assert segments and all(set(text) <= set("abcdefgh") for _, _, text in segments)
    windows = [given for given in read if given[: len(ids)] == ids]
    assert len(windows) >= 3 and all(len(given) == len(ids) + 3 for given in windows)


def test_the_command_reads_a_prompt(talker: Path, tmp_path: Path, capsys: Any):
    clip = make_long_clip(tmp_path)
    words = [str(talker), str(clip), "--language", "es"]
    assert transcribe.main(words) == 0
    plain = capsys.readouterr().out
    assert transcribe.main([*words, "--prompt", "Ana, Eva"]) == 0
    prompted = capsys.readouterr()
    assert prompted.out != plain and prompted.err == ""
    assert transcribe.main([*words, "--prompt", "y" * 100]) == 0
    assert capsys.readouterr().err.startswith("note: of the prompt's 101 tokens only the last 31")
    assert transcribe.main([*words, "--prompt", "a<|es|>"]) == 2
    assert capsys.readouterr().err == "error: --prompt: <|es|> is a control token: remove it.\n"
