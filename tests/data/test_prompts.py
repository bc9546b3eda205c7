"""What the model reads before a clip: masked in training, in whatever form the data come, and scored
with and without."""

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import transformers
from preprocessors import make_preprocessor
from rows import read_rows, write_clips

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.batches import pad_labels, pad_windows
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.prompts import (
    encode_prompt,
    fit_prompt,
    left_padded,
    scored_inputs,
    start_of_prompt,
)
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.data.text import IGNORED_LABEL
from speech_finetuning.model.generation import generate_after_prompts, generate_ids

Train = Callable[..., dict[str, float]]

# ------------------------------------------------------------------------------------ the tokens


@pytest.mark.parametrize("text", ["Saoirse", "  a, b  ", "ñandú", "x" * 500])
def test_a_prompt_is_encoded_as_the_library_does(preprocessor: Preprocessor, text: str):
    tokenizer = preprocessor.tokenizer
    start, *whole = tokenizer.get_prompt_ids(text.strip()).tolist()
    assert encode_prompt(text, tokenizer, 64) == [start, *whole[-31:]]


def test_what_is_no_text_is_no_prompt(preprocessor: Preprocessor):
    tokenizer = preprocessor.tokenizer
    assert encode_prompt(" ", tokenizer, 64) == []
    with pytest.raises(Rejection, match="text_has_special_tokens"):
        encode_prompt("a<|endoftext|>", tokenizer, 64)
    with pytest.raises(Rejection, match="row_unreadable"):
        encode_prompt("a\ufffd", tokenizer, 64)


def test_a_prompt_leaves_room_for_the_labels():
    prompt = [9, 1, 2, 3]
    assert fit_prompt(prompt, num_labels=5, max_label_length=8) == [9, 1, 2, 3]
    assert fit_prompt(prompt, num_labels=6, max_label_length=8) == [9, 2, 3]
    assert fit_prompt(prompt, num_labels=7, max_label_length=8) == [9, 3]
    assert fit_prompt(prompt, num_labels=8, max_label_length=8) == []


def test_a_prompt_is_read_and_not_to_be_said():
    padded = pad_labels([[5, 6, 7], [5, 6, 7, 8]], 0, prompts=[[9, 1], []])
    assert padded["decoder_input_ids"].tolist() == [[9, 1, 5, 6], [5, 6, 7, 0]]
    ignored = IGNORED_LABEL
    assert padded["labels"].tolist() == [[ignored, ignored, 6, 7], [6, 7, 8, ignored]]
    windows = [{"labels": [5, 6, 7], "prompt_ids": [9, 1]}, {"labels": [5, 6, 7, 8]}]
    for name, tensor in pad_windows(windows, 0).items():
        assert torch.equal(tensor, padded[name])


def test_a_prompt_is_written_as_transcripts_are(preprocessor: Preprocessor, speech: Path):
    row = next(iter(read_rows(load_source(str(speech), split="train"))))
    plain = preprocessor(row)
    lower = replace(preprocessor, do_lower_case=True)
    prompted = lower(replace(row, prompt="Café\u0301,  AÑO"))
    assert not isinstance(plain, Rejection) and not isinstance(prompted, Rejection)
    assert prompted["prompt"] == "café\u0301, año"
    assert prompted["labels"] == plain["labels"] and "prompt" not in plain
    assert preprocessor.tokenizer.decode(prompted["prompt_ids"][1:]) == " café\u0301, año"
    without = lower(replace(row, prompt="Café"), has_prompt=False)
    assert "prompt_ids" not in without
    rejected = preprocessor(replace(row, prompt="<|es|>"))
    assert isinstance(rejected, Rejection) and rejected.row == row.id


def test_a_tokenizer_without_the_token_is_refused(preprocessor: Preprocessor, tmp_path: Path):
    vocabulary = {"a": 0, "<|endoftext|>": 1}
    bare = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    with pytest.raises(UserError, match=r"no token <\|startofprev\|>"):
        start_of_prompt(bare)
    source = load_source(str(write_list(tmp_path)), split="train", prompt_column="hint")
    with pytest.raises(UserError, match=r"no token <\|startofprev\|>"):
        SpeechDataset(source, replace(preprocessor, tokenizer=bare))


# -------------------------------------------------------------------------------------- the data


def write_list(folder: Path, suffix: str = ".csv") -> Path:
    """Three clips with texts and hints, of which one is missing."""
    rows = [
        {"audio": name, "text": text, "hint": hint}
        for name, text, hint in zip(
            write_clips(folder, 3), ["uno", "dos", "tres"], ["Ana", None, "Eva, Pau"], strict=True
        )
    ]
    path = folder / f"train{suffix}"
    if suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        for row in rows:
            row["audio"] = {"bytes": (folder / row["audio"]).read_bytes(), "path": row["audio"]}
        pq.write_table(pa.Table.from_pylist(rows), path)
        for clip in (folder / "clips").iterdir():
            clip.unlink()
    return folder if suffix == ".parquet" else path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_prompts_come_from_a_column(tmp_path: Path, suffix: str):
    place = str(write_list(tmp_path, suffix))
    source = load_source(place, split="train", prompt_column="hint")
    assert [row.prompt for row in read_rows(source)] == ["Ana", None, "Eva, Pau"]
    assert {row.prompt for row in read_rows(load_source(place, split="train"))} == {None}
    with pytest.raises(UserError, match="--prompt_column_name hints: no such column"):
        load_source(place, split="train", prompt_column="hints")


def test_prompts_come_from_a_tar(tmp_path: Path):
    import tarfile

    names = write_clips(tmp_path, 2)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, name in enumerate(names):
            tar.add(tmp_path / name, f"{number}.wav")
            for ending, text in (("txt", "uno"), ("hint", f"Ana {number}")):
                (tmp_path / "text").write_text(text)
                tar.add(tmp_path / "text", f"{number}.{ending}")
    for clip in (tmp_path / "clips").iterdir():
        clip.unlink()
    (tmp_path / "text").unlink()
    source = load_source(str(tmp_path), split="train", prompt_column="hint")
    assert [(row.text, row.prompt) for row in read_rows(source)] == [
        ("uno", "Ana 0"),
        ("uno", "Ana 1"),
    ]


def write_segments(folder: Path, lines: list[str]) -> Path:
    """A list of segments of a.wav and b.wav, of a hundred seconds."""
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, np.zeros(800_000, np.int16), 8_000)
    path = folder / "train.csv"
    path.write_text("\n".join(["audio,text,start,end", *lines]), encoding="utf-8")
    return path


SEGMENTS = [
    "a.wav,uno,0,2",
    "a.wav,dos,2.5,4",
    "a.wav,tres,30,33",  # within a window's length
    "b.wav,cuatro,33,34",  # another recording
    "b.wav,cinco,90,91",  # long after
    "b.wav,seis,89,90",  # before it
    "b.wav,siete<|es|>,92,93",
    "b.wav,ocho,94,95",
]


def test_the_segment_before_is_the_prompt(tmp_path: Path):
    path = write_segments(tmp_path, SEGMENTS)
    source = load_source(str(path), split="train", prompt_column="previous_segment")
    prompts = {row.text: row.prompt for row in read_rows(source)}
    assert prompts == {
        "uno": None,
        "dos": "uno",
        "tres": "dos",
        "cuatro": None,
        "cinco": None,
        "seis": None,
        "siete<|es|>": "seis",
        "ocho": None,  # what is before cannot be read
    }


def test_the_window_before_is_the_prompt_of_neighbours(tmp_path: Path, preprocessor: Preprocessor):
    path = write_segments(tmp_path, SEGMENTS[:2] + ["a.wav,tres,4,6", "a.wav,ocho,6,8"])
    source = load_source(
        str(path),
        split="train",
        prompt_column="previous_segment",
        window_limits=preprocessor.window_limits(frozenset()),
    )
    first, *others = read_rows(source)
    assert first.prompt is None and first.text == "uno"  # the second does not fit into 4 s
    assert [(row.text, row.prompt) for row in others] == [("dos tres", "uno"), ("ocho", "dos tres")]


def test_the_segment_before_needs_segments(tmp_path: Path):
    match = "--prompt_column_name previous_segment"
    path = write_list(tmp_path)
    with pytest.raises(UserError, match=f"{match}: the rows of .* are whole files"):
        load_source(str(path), split="train", prompt_column="previous_segment")
    (tmp_path / "other").mkdir()
    folder = write_list(tmp_path / "other", ".parquet")
    with pytest.raises(UserError, match=f"{match}: not with parquet"):
        load_source(str(folder), split="train", prompt_column="previous_segment")


def test_recordings_with_subtitles_have_prompts(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros(80_000, np.int16), 8_000)
    (tmp_path / "a.srt").write_text(
        "1\n00:00:00,000 --> 00:00:02,000\nuno\n\n2\n00:00:02,000 --> 00:00:04,000\ndos\n"
    )
    source = load_source(str(tmp_path), split="train", prompt_column="previous_segment")
    assert [row.prompt for row in read_rows(source)] == [None, "uno"]
    with pytest.raises(UserError, match="no columns in recordings"):
        load_source(str(tmp_path), split="train", prompt_column="hint")


# ------------------------------------------------------------------------------------ the stream


def make_stream(folder: Path, preprocessor: Preprocessor, probability: float) -> SpeechStream:
    source = load_source(str(write_list(folder)), split="train", prompt_column="hint")
    stage = replace(preprocessor, prompt_probability=probability)
    return SpeechStream(
        sets=(SpeechDataset(source, stage),),
        seed=1,
        block_size=10,
        micro_batch_size=2,
        num_threads=1,
    )


def test_prompts_are_drawn_by_row(tmp_path: Path, preprocessor: Preprocessor):
    stream = make_stream(tmp_path, preprocessor, 0.5)
    items = list(itertools.islice(stream, 300))
    drawn = [item.content().get("prompt_ids") for item in items]
    has_hint = [item.content()["text"] != "dos" for item in items]
    share = sum(ids is not None for ids in drawn) / sum(has_hint)
    assert 0.4 < share < 0.6
    assert all(ids is None for ids, hint in zip(drawn, has_hint, strict=True) if not hint)
    parallel = itertools.islice(replace(stream, num_threads=4), 300)
    assert [item.content().get("prompt_ids") for item in parallel] == drawn
    rest = itertools.islice(replace(stream, position=items[99].position), 200)
    assert [item.content().get("prompt_ids") for item in rest] == drawn[100:]


def test_without_probability_every_bit_is_as_it_was(tmp_path: Path, preprocessor: Preprocessor):
    never = list(itertools.islice(make_stream(tmp_path, preprocessor, 0.0), 20))
    always = list(itertools.islice(make_stream(tmp_path, preprocessor, 1.0), 20))
    assert not any("prompt_ids" in item.content() for item in never)
    for without, with_one in zip(never, always, strict=True):
        plain = without.content()
        prompted = with_one.content()
        assert ("prompt_ids" in prompted) == (plain["text"] != "dos")
        assert plain["labels"] == prompted["labels"]
        assert torch.equal(plain["features"], prompted["features"])


def test_a_pack_has_the_prompt_of_its_first_row(tmp_path: Path, preprocessor: Preprocessor):
    stream = make_stream(tmp_path, preprocessor, 1.0)
    words = (
        "--model_name_or_path m --dataset_name d --output_dir o --do_train --max_steps 1 "
        "--pack_utterances"
    ).split()
    packer = script.build_packer(
        stream.sets,
        packs_utterances=script.parse_arguments(words)[1].pack_utterances,
        timestamp_probability=0.0,
        written_languages=["es"],
        seed=0,
    )
    assert packer is not None
    items = list(itertools.islice(stream, 3))
    (window,) = packer(items)  # three seconds
    assert window["prompt_ids"] == items[0].content().get("prompt_ids", [])
    (second,) = packer(items[1:])
    prompts = [item.content().get("prompt_ids", []) for item in items]
    assert second["prompt_ids"] == prompts[1] and sum(map(bool, prompts)) == 2


# ----------------------------------------------------------------------------------- the scores


@pytest.fixture(scope="module")
def scored_rows(tiny_model: Path) -> dict:
    """Three rows with prompts of different lengths, and one without, as the trainer has them."""
    preprocessor = make_preprocessor(tiny_model)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tiny_model).eval()
    texts = ["uno", "dos tres", "x", "ocho"]
    hints = ["Ana", "Eva and Pau", "", "b"]
    labels = [preprocessor.prepare_text(text)[1] for text in texts]
    prompts = [encode_prompt(hint, preprocessor.tokenizer, 64) for hint in hints]
    features = torch.randn(4, 80, 400, generator=torch.Generator().manual_seed(0))
    return {
        "model": model,
        "features": features,
        "labels": labels,
        "prompts": prompts,
        "num_prefix_tokens": len(preprocessor.tokenizer.prefix_tokens),
    }


def test_the_loss_with_prompts_is_that_of_training(scored_rows: dict):
    """Padded at the left for generation or at the right for training: each row's loss is the same."""
    model = scored_rows["model"]
    pad = model.config.pad_token_id
    batch = pad_labels(scored_rows["labels"], pad) | {"prompts": scored_rows["prompts"]}
    scored = scored_inputs(batch, model.config, device=torch.device("cpu"), has_prompts=True)
    trained = pad_labels(scored_rows["labels"], pad, scored_rows["prompts"])
    losses = []
    for inputs in (scored, trained):
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(input_features=scored_rows["features"], **inputs).logits
        flat = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
        )
        losses.append(flat.sum(1))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    plain = pad_labels(scored_rows["labels"], pad) | {"prompts": scored_rows["prompts"]}
    without = scored_inputs(plain, model.config, device=torch.device("cpu"), has_prompts=False)
    assert without.keys() == {"labels", "decoder_input_ids"}


def test_each_row_is_generated_after_its_own_prompt(scored_rows: dict):
    """A batch of unlike prompts gives what the library gives for each of them alone."""
    model = scored_rows["model"]
    batch = pad_labels(scored_rows["labels"], model.config.pad_token_id)
    batch["prompts"] = scored_rows["prompts"]
    scored = scored_inputs(batch, model.config, device=torch.device("cpu"), has_prompts=True)
    longest = max(map(len, scored_rows["prompts"]))
    num_given = longest + scored_rows["num_prefix_tokens"]
    with torch.no_grad():
        encoded = transformers.modeling_outputs.BaseModelOutput(
            model.get_encoder()(scored_rows["features"]).last_hidden_state
        )
    ids = generate_after_prompts(
        model,
        encoded,
        decoder_input_ids=scored["decoder_input_ids"][:, :num_given],
        decoder_attention_mask=scored["decoder_attention_mask"][:, :num_given],
        max_new_tokens=8,
        num_beams=1,
    )
    for number, prompt in enumerate(scored_rows["prompts"]):
        alone = generate_ids(
            model,
            transformers.modeling_outputs.BaseModelOutput(encoded[0][number : number + 1]),
            prompt_ids=torch.tensor(prompt) if prompt else None,
            language="es",
            task="transcribe",
            max_new_tokens=8,
        )
        text = [token for token in ids[number].tolist() if token != model.config.pad_token_id]
        assert alone[0].tolist()[-len(text) :] == text and len(text) == 8


def test_what_is_given_never_exceeds_the_decoder(scored_rows: dict):
    model = scored_rows["model"]
    prompts = [[7] * 32, [7], [], [7, 8]]
    padded = left_padded(prompts, 1)
    assert padded["prompt_mask"].sum(1).tolist() == [32, 1, 0, 2]
    batch = pad_labels([[5] * 33] * 4, 1) | {"prompts": prompts}
    scored = scored_inputs(batch, model.config, device=torch.device("cpu"), has_prompts=True)
    positions = scored["decoder_position_ids"]
    assert int(positions.max()) == 63 and positions[2].tolist()[32:34] == [0, 1]


def test_a_run_is_scored_with_prompts_and_without(train: Train, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_list(folder)
    table = (folder / "train.csv").read_text()
    (folder / "validation.csv").write_text(table.replace("uno,Ana", "uno,Uno"))
    flags = f"--dataset_name {folder} --prompt_column_name hint --do_train --do_eval"
    metrics = train(f"{flags} --eval_before_training --max_steps 2")
    assert metrics["prompted_num_rows"] == metrics["eval_num_rows"] == 3
    for role in ("zero_shot", "untouched_prompted", "eval", "prompted"):
        assert f"{role}_wer" in metrics and metrics[f"{role}_prompt_words"] == 1
    assert metrics["prompted_loss"] != metrics["eval_loss"]
    card = (tmp_path / "output" / "README.md").read_text()
    assert "with prompts " in card and "prompts before " in card
    assert (tmp_path / "output" / "predictions_prompted.jsonl").is_file()
    assert "with prompts" in (tmp_path / "output" / "report.html").read_text()
    again = train(f"{flags} --eval_before_training --max_steps 4")
    assert again["untouched_prompted_wer"] == metrics["untouched_prompted_wer"]


def test_a_share_without_a_column_is_refused():
    words = "--model_name_or_path m --dataset_name d --output_dir o --do_train".split()
    with pytest.raises(
        UserError, match="--prompt_probability: of no effect without --prompt_column_name"
    ):
        script.parse_arguments([*words, "--prompt_probability", "0.3"])
    with pytest.raises(UserError, match="--prompt_probability 1.5: must lie between 0 and 1"):
        script.parse_arguments(
            [*words, "--prompt_column_name", "hint", "--prompt_probability", "1.5"]
        )
