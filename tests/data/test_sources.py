"""Every kind of source and the mix: real files, what a bad one gets, the order and the position of
several at once."""

import io
import itertools
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import without_folders
from speech_finetuning.cli import demonstration
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.passes import RankShare
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.reading import read_audio
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

Train = Callable[[str], dict[str, float]]
ROWS = demonstration.make_rows(6, seed=11)
TEXTS = [text for _, text in ROWS]


def write_clips(folder: Path, ending: str = "flac") -> list[str]:
    """The clips as files; their names."""
    folder.mkdir(parents=True)
    for i, (data, _) in enumerate(ROWS):
        if ending == "mp3":
            waveform = demonstration.speak(
                ROWS[i][1].split(), demonstration.np.random.default_rng(i)
            )
            data = demonstration.encode(waveform, "MP3")
        (folder / f"{i}.{ending}").write_bytes(data)
    return [f"{i}.{ending}" for i in range(len(ROWS))]


def csv_manifest(folder: Path) -> Path:
    """Plain path,sentence with quoted commas, paths relative to the manifest."""
    names = write_clips(folder / "wavs")
    lines = [f'wavs/{name},"{text}, dos"' for name, text in zip(names, TEXTS, strict=True)]
    (folder / "train.csv").write_text("\n".join(["path,sentence", *lines]), encoding="utf-8-sig")
    return folder


def nemo_manifest(folder: Path) -> Path:
    """NeMo's JSON lines, one absolute path, one broken line, a number for a text."""
    names = write_clips(folder / "audio")
    rows = [
        {"audio_filepath": f"audio/{name}", "text": text, "duration": 1.0}
        for name, text in zip(names, TEXTS, strict=True)
    ]
    rows[0]["audio_filepath"] = str(folder / "audio" / names[0])
    rows[1]["text"] = 12
    lines = [json.dumps(row) for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join([*lines, '{"audio_filepath": "au', "[]"]))
    return folder / "manifest.jsonl"


def common_voice(folder: Path) -> Path:
    """A Common Voice download as it unpacks: es/train.tsv ..., es/clips/*.mp3; quotes mean nothing
    in it."""
    names = write_clips(folder / "es" / "clips", "mp3")
    header = "client_id\tpath\tsentence\tup_votes\tlocale"
    lines = [
        f'c{i}\t{name}\t"{text}\t2\tes'
        for i, (name, text) in enumerate(zip(names, TEXTS, strict=True))
    ]
    for split, part in {"train": lines[:4], "validated": lines, "other": lines[4:]}.items():
        (folder / "es" / f"{split}.tsv").write_text("\n".join([header, *part]))
    return folder


def webdataset(folder: Path) -> Path:
    """Two tars with flac and txt members."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:05}.tar", "w") as tar:
            for i, (data, text) in list(enumerate(ROWS))[shard::2]:
                for ending, content in (("flac", data), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"clip{i}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def audiofolder(folder: Path, metadata: str) -> Path:
    names = write_clips(folder / "train")
    rows = [
        {"file_name": name, "transcription": text} for name, text in zip(names, TEXTS, strict=True)
    ]
    path = folder / "train" / f"metadata.{metadata}"
    if metadata == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif metadata == "csv":
        path.write_text(
            "\n".join(["file_name,transcription", *(",".join(row.values()) for row in rows)])
        )
    else:
        demonstration.pq.write_table(demonstration.pa.Table.from_pylist(rows), path)
    return folder


SOURCES = {
    "csv": (csv_manifest, None, "manifest", 6, [f"{text}, dos" for text in TEXTS]),
    "nemo": (nemo_manifest, None, "manifest", 8, [TEXTS[0], "12", *TEXTS[2:]]),
    "common voice": (common_voice, "es", "manifest", 4, [f'"{text}' for text in TEXTS[:4]]),
    "webdataset": (webdataset, None, "webdataset", None, TEXTS),
    "audiofolder csv": (lambda folder: audiofolder(folder, "csv"), None, "audiofolder", 6, TEXTS),
    "audiofolder jsonl": (
        lambda folder: audiofolder(folder, "jsonl"),
        None,
        "audiofolder",
        6,
        TEXTS,
    ),
    "audiofolder parquet": (
        lambda folder: audiofolder(folder, "parquet"),
        None,
        "audiofolder",
        6,
        TEXTS,
    ),
}


def make_stream(*items: SpeechDataset, **changes: object) -> SpeechStream:
    settings = {"seed": 1, "block_size": 4, "micro_batch_size": 2, "num_threads": 2}
    return SpeechStream(sets=items, **{**settings, **changes})


def id_of(item: StreamItem) -> str:
    return item.rejection.row if item.rejection else item.example["id"]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source(kind: str, tmp_path: Path, preprocessor):
    make, config_name, name, num_rows, texts = SOURCES[kind]
    where = make(tmp_path / "data")
    source = load_source(str(where), config_name=config_name, split="train")
    assert (source.kind, source.num_rows) == (name, num_rows)
    stream = make_stream(SpeechDataset(source, preprocessor))
    total = num_rows or 6
    items = list(itertools.islice(stream, 2 * total))
    found = [item.example["text"] for item in items[:total] if item.example]
    assert sorted(found) == sorted(texts)
    assert Counter(found) == Counter(item.example["text"] for item in items[total:] if item.example)
    ids = [id_of(item) for item in items]
    for seen in (1, 3, 4, 5, total, total + 1):  # and every kind continues at the next row
        rest = make_stream(*stream.sets, position=items[seen - 1].position)
        assert [id_of(item) for item in itertools.islice(rest, 3)] == ids[seen : seen + 3]


def test_unreadable_manifest_lines_are_rejected(tmp_path: Path, preprocessor):
    source = load_source(str(nemo_manifest(tmp_path / "data")), split="train")
    items = itertools.islice(make_stream(SpeechDataset(source, preprocessor)), 8)
    reasons = [item.rejection.reason for item in items if item.rejection]
    assert reasons == ["row_unreadable"] * 2


def test_a_first_clip_that_is_missing_does_not_hide_the_others(tmp_path: Path, preprocessor):
    where = common_voice(tmp_path / "cv")
    (where / "es" / "clips" / "0.mp3").unlink()
    source = load_source(str(where), config_name="es", split="train")
    items = itertools.islice(make_stream(SpeechDataset(source, preprocessor)), 4)
    reasons = [item.rejection.reason for item in items if item.rejection]
    assert reasons == ["audio_missing"]


def test_other_files_are_no_manifests(tmp_path: Path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="--dataset_name"):
        load_source(str(tmp_path / "train.parquet"), split="train")


def test_norwegian_is_a_language_in_yaml(tmp_path: Path):
    (tmp_path / "mix.yaml").write_text(
        "- {dataset_name: x, language: no, dataset_config_name: 2021}"
    )
    words = f"--model_name_or_path m --output_dir o --do_eval --data_mix {tmp_path / 'mix.yaml'}"
    (record,) = script.data_records(script.parse_arguments(words.split())[1])
    assert (record.language, record.name) == ("no", "x_2021")


def test_paths_and_tokens_leave_a_text_that_is_uploaded():
    text = 'run.py --dataset_name /data/private/speech "/home/me/out/checkpoint-4" https://hub.co/a/b hf_abcdefghij'
    expected = 'run.py --dataset_name speech "checkpoint-4" https://hub.co/a/b REDACTED'
    assert without_folders(text) == expected
    assert without_folders('{"id": "test/0/0//home/alice/x.ogg"}') == '{"id": "test/0/0/x.ogg"}'


def test_a_common_voice_download_trains_and_scores(train: Train, flags: list[str], tmp_path: Path):
    where = common_voice(tmp_path / "cv")
    metrics = train(
        f"--do_train --do_eval --max_steps 2 --dataset_name {where} --dataset_config_name es "
        "--train_split_name train+other --eval_split_name validated"
    )
    assert metrics["train_rows"] == 8 and metrics["eval_num_rows"] == 6


@pytest.mark.parametrize("ending", ["m4a", "webm"])
def test_formats_without_a_reader_say_how_to_convert(ending: str, tmp_path: Path, preprocessor):
    head = {"m4a": b"\0\0\0\x20ftypM4A ", "webm": b"\x1aE\xdf\xa3"}[ending]
    (tmp_path / f"a.{ending}").write_bytes(head + bytes(200))
    rejection = preprocessor(SourceRow(id="r", audio=str(tmp_path / f"a.{ending}"), text="uno"))
    assert rejection.reason == "audio_unreadable" and f"ffmpeg -i IN.{ending}" in rejection.detail


def test_columns_that_are_named_must_be_there(tmp_path: Path):
    where = str(csv_manifest(tmp_path / "data"))
    with pytest.raises(
        UserError, match="--text_column_name text: no such column .*Found: path, sentence"
    ):
        load_source(where, split="train", text_column="text")
    (tmp_path / "data" / "train.csv").write_text("clip,words\n")
    with pytest.raises(UserError, match="--audio_column_name is missing.*Found: "):
        load_source(where, split="train")


# ---------------------------------------------------------------------------------------- the mix


@pytest.fixture
def mix(tmp_path: Path, speech: Path) -> Path:
    """Two sources of unequal size, languages and weights; the second has no evaluation split."""
    path = tmp_path / "mix.yaml"
    csv_manifest(tmp_path / "small")
    path.write_text(
        f"""
- dataset_name: {speech}
  name: big
  language: es
  weight: 3
- dataset_name: {tmp_path / "small"}
  name: small
  language: french
  weight: 1e0
  eval_split_name: null
  test_split_name: train
  do_remove_punctuation: true
"""
    )
    return path


def mix_flags(flags: list[str], mix: Path) -> list[str]:
    position = flags.index("--dataset_name")
    return [*flags[:position], *flags[position + 2 :], "--data_mix", str(mix)]


def mixed_stream(mix: Path, preprocessor, **changes: object) -> SpeechStream:
    arguments = script.parse_arguments(
        f"--model_name_or_path m --output_dir o --do_eval --data_mix {mix}".split()
    )[1]
    sets = []
    for record in script.data_records(arguments):
        source = load_source(record.dataset_name, split="train", record=record.name)
        sets.append(SpeechDataset(source, preprocessor, weight=record.weight))
    return make_stream(*sets, **changes)


def ids_of(stream: SpeechStream, count: int) -> list[str]:
    return [item.example["id"] for item in itertools.islice(stream, count)]


def test_a_mix_draws_by_weight_and_every_source_makes_its_own_passes(mix: Path, preprocessor):
    ids = ids_of(mixed_stream(mix, preprocessor), 400)
    big, small = ([row for row in ids if row.startswith(name)] for name in ("big/", "small/"))
    assert 0.70 < len(big) / len(ids) < 0.80
    for rows, size in ((big, 40), (small, 6)):
        passes = [rows[i : i + size] for i in range(0, len(rows) - size, size)]
        assert all(len(set(one)) == size for one in passes) and passes[0] != passes[1]


@pytest.mark.parametrize("seen", [1, 7, 150, 399])
def test_the_order_of_a_mix_is_pure_and_continues_anywhere(mix: Path, preprocessor, seen: int):
    items = list(itertools.islice(mixed_stream(mix, preprocessor, num_threads=1), 430))
    value = json.loads(json.dumps(items[seen - 1].position.to_json()))
    position = StreamPosition.from_json(value)
    rest = ids_of(mixed_stream(mix, preprocessor, num_threads=4, position=position), 30)
    assert rest == [id_of(item) for item in items[seen : seen + 30]]


def test_ranks_share_the_one_order_of_a_mix(mix: Path, preprocessor):
    whole = ids_of(mixed_stream(mix, preprocessor), 40)
    shares = [RankShare(rank=rank, world_size=2) for rank in (0, 1)]
    ranks = [ids_of(mixed_stream(mix, preprocessor, share=share), 20) for share in shares]
    dealt = [ranks[turn % 2][turn // 2 * 2 : turn // 2 * 2 + 2] for turn in range(20)]
    assert list(itertools.chain(*dealt)) == whole


@pytest.mark.slow
def test_training_on_a_mix(flags: list[str], mix: Path, tmp_path: Path):
    more = "--do_train --do_eval --eval_before_training --max_steps 30 --save_steps 10 --save_total_limit 9".split()
    words = [*mix_flags(flags, mix), *more]
    metrics = script.main([*words, "--output_dir", str(tmp_path / "whole")])
    assert metrics["eval_num_rows"] == 8 and metrics["test_num_rows"] == 6
    state = json.loads((tmp_path / "whole" / "checkpoint-30" / "trainer_state.json").read_text())
    last = [entry for entry in state["log_history"] if "loss" in entry][-1]
    assert 0.6 < last["share_big"] < 0.9 and last["share_big"] + last[
        "share_small"
    ] == pytest.approx(1, abs=1e-3)
    assert last["pass_small"] > last["pass_big"] > 0
    # Each record has its own language token and text options.
    rows = [
        json.loads(line)
        for line in (tmp_path / "whole" / "predictions_test_small.jsonl").read_text().splitlines()
    ]
    assert sorted(row["reference"] for row in rows) == sorted(f"{text} dos" for text in TEXTS)
    info = json.loads((tmp_path / "whole" / "run_info.json").read_text())
    assert [source["record"] for source in info["data"]["train"]] == ["big", "small"]
    # And the run continues exactly.
    script.main([*words, "--output_dir", str(tmp_path / "parts")])
    for step in (20, 30):
        (tmp_path / "parts" / f"checkpoint-{step}").rename(tmp_path / f"away-{step}")
    script.main([*words, "--output_dir", str(tmp_path / "parts"), "--num_decoding_threads", "1"])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all((one[name] == other[name]).all() for name in one)


def test_several_evaluation_sets_have_their_own_rows_and_a_total(
    flags: list[str], mix: Path, caplog
):
    mix.write_text(mix.read_text().replace("eval_split_name: null", "eval_split_name: train"))
    metrics = script.main([*mix_flags(flags, mix), "--do_eval"])
    words = {
        name: metrics[f"eval_{name}substitutions"]
        + metrics[f"eval_{name}deletions"]
        + metrics[f"eval_{name}hits"]
        for name in ("", "big_", "small_")
    }
    assert (
        metrics["eval_num_rows"]
        == 14
        == metrics["eval_big_num_rows"] + metrics["eval_small_num_rows"]
    )
    assert words[""] == words["big_"] + words["small_"]
    errors = sum(metrics[f"eval_{name}_wer"] * words[f"{name}_"] for name in ("big", "small"))
    assert metrics["eval_wer"] == pytest.approx(errors / words[""])


def test_labels_carry_the_language_of_their_record(
    flags: list[str], mix: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    script.main([*mix_flags(flags, mix), "--do_train", "--max_steps", "1"])
    assert (
        "<|startoftranscript|><|es|>" in caplog.text
        and "<|startoftranscript|><|fr|>" in caplog.text
    )


def test_transcripts_of_different_style_are_warned_about(
    flags: list[str], mix: Path, caplog, tmp_path: Path
):
    listing = tmp_path / "small" / "train.csv"
    lines = listing.read_text().upper().splitlines()
    listing.write_text(
        "\n".join(
            [
                "path,sentence",
                *(line.replace("WAVS/", "wavs/").replace("FLAC", "flac") for line in lines[1:]),
            ]
        )
    )
    script.main([*mix_flags(flags, mix), "--do_train", "--max_steps", "1"])
    assert "big: lower case, no punctuation; small: upper case, no punctuation" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset_name: x", "expected lines like"),
        ("- x", "entry 1: expected dataset_name and any of"),
        (
            "- {dataset_name: x, wieght: 2}\n- {dataset_name: y, lang: es}",
            r"entry 1: unknown key wieght. Did you mean weight\?\n.*entry 2: unknown key lang:",
        ),
        ("- {dataset_name: x, shuffle_buffer_size: 2}", "expected dataset_name and any of"),
        ("- {dataset_name: x, max_train_samples: many}", "expected a whole number, found 'many'"),
        ("- {dataset_name: x, weight: 0}", "weight above 0"),
        ("- {dataset_name: a/x}\n- {dataset_name: b/x}", "'x' is taken"),
    ],
)
def test_a_bad_mix_says_which_entry(text: str, message: str, tmp_path: Path):
    (tmp_path / "mix.yaml").write_text(text)
    arguments = script.parse_arguments(
        f"--model_name_or_path m --output_dir o --do_eval --data_mix {tmp_path / 'mix.yaml'}".split()
    )
    with pytest.raises(UserError, match=message):
        script.data_records(arguments[1])


def test_epochs_of_a_mix_are_refused(flags: list[str], mix: Path):
    with pytest.raises(
        UserError, match="--num_train_epochs: the passes of a mix end at different times"
    ):
        script.main([*mix_flags(flags, mix), "--do_train", "--num_train_epochs", "1"])


def test_the_report_tells_what_the_filters_reject(
    train: Train, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    caplog.set_level("INFO")
    rows = [(b"junk", "uno")] * 3 + demonstration.make_rows(9, seed=2)
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    train(f"--do_train --max_steps 1 --dataset_name {tmp_path / 'data'} --data_report_samples 10")
    assert "first 10 rows of" in caplog.text and "rejected: 3 audio_unreadable" in caplog.text
    assert "  seconds  0 [" in caplog.text and "lower case, no punctuation" in caplog.text
    caplog.clear()
    train(f"--do_train --max_steps 2 --dataset_name {tmp_path / 'data'}")
    assert "data report" not in caplog.text  # a continued run knows its data


def test_the_advice_on_waiting_comes_once(train: Train, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(
        "speech_finetuning.data.reading.read_audio",
        lambda value: time.sleep(0.05) or read_audio(value),
    )
    words = "--do_train --logging_steps 1 --num_decoding_threads 1 --data_report_samples 0"
    train(f"{words} --max_steps 4")
    assert "of the time goes" not in caplog.text, "a run of a second is not worth advice"
    monkeypatch.setattr("speech_finetuning.training.trainer.SECONDS_WITHOUT_ADVICE", 0)
    train(f"{words} --max_steps 8")
    assert caplog.text.count("of the time goes into waiting for data (1 threads") == 1


def test_fork_after_the_report_does_not_hang(train: Train):
    train("--do_train --max_steps 2 --dataloader_num_workers 1 --num_decoding_threads 3")


@pytest.mark.slow
def test_nothing_imports_torchcodec(tmp_path: Path):
    """A process that opens every kind of source has not imported it, nor PyAV, which is for kinds
    of audio that are not there."""
    code = "import sys, pytest; "
    code += (
        "code = pytest.main(['-q', '-k', 'every_kind and (webdataset or parquet)', sys.argv[1]]); "
    )
    code += "sys.exit(code or not {'torchcodec', 'av'}.isdisjoint(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
