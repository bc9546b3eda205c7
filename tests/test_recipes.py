"""recipes/*.yaml: each says what to expect and from where that is known, and runs on data of its
form."""

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration

PROJECT = Path(script.__file__).parent
RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))
NUM_ROWS = 8  # of each split of the data made here
# What stands at the head of a Common Voice table (release 22).
COMMON_VOICE_COLUMNS = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents "
    "variant locale segment"
).split()


def name_of(recipe: Path) -> str:
    return recipe.stem


def comment_of(recipe: Path) -> str:
    """The comment at the head of a recipe, as one line."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_there_is_a_recipe_for_each_kind_of_project():
    assert {name_of(recipe) for recipe in RECIPES} >= {
        "hindi-common-voice",
        "spanish-common-voice",
        "swedish-fleurs",
        "english-librispeech",
        "one-hour-lora",
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_says_what_to_expect_and_how_that_is_known(recipe: Path):
    comment = comment_of(recipe)
    published = re.search(r"Published.*?(?= Time: )", comment)
    time = re.search(r"Time: .*?(?= Memory: )", comment)
    memory = re.search(r"Memory: .*?\)", comment)
    assert published is not None and re.search(r"\d %.*https://", published.group())
    assert time is not None and re.search(r"calculated|cited", time.group())
    assert memory is not None and "calculated by benchmarks/memory.py" in memory.group()
    assert f"--config recipes/{recipe.name}" in comment


@pytest.mark.slow  # the forward passes of Whisper small, by shapes alone, take seconds
@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_the_memory_of_a_recipe_is_what_the_benchmark_calculates(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [str(PROJECT / "benchmarks"), *sys.path])
    import memory

    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    size = settings["model_name_or_path"].removeprefix("openai/whisper-").removesuffix(".en")
    stated = re.search(r"([\d.]+) GB for texts of 64 tokens, ([\d.]+) GB", comment_of(recipe))
    # Of small the shorter texts only: the longer ones are the same sum, and take as long again.
    lengths = (64, 448) if size == "tiny" else (64,)
    for num_tokens, peak in zip(lengths, stated.groups(), strict=False):
        calculated = memory.peak_in_gb(
            size,
            settings["per_device_train_batch_size"],
            num_tokens,
            with_checkpointing=settings.get("gradient_checkpointing", False),
            optimiser="lora" if settings.get("lora_rank") else "adamw",
            is_accumulated=settings.get("gradient_accumulation_steps", 1) > 1,
        )
        assert float(peak) == round(calculated, 1)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_is_accepted(recipe: Path):
    _, data_args, training_args = script.parse_arguments(
        ["--config", str(recipe), "--fp16", "False"]
    )
    script.check_arguments(data_args, training_args)
    assert training_args.do_train and training_args.do_eval and data_args.eval_before_training


# ---- data of the same form


def write_common_voice(folder: Path, code: str, splits: list[str]) -> None:
    """As a download unpacks: CODE/SPLIT.tsv with all columns, CODE/clips/*.mp3."""
    clips = folder / code / "clips"
    clips.mkdir(parents=True)
    for seed, split in enumerate(splits):
        with open(folder / code / f"{split}.tsv", "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, COMMON_VOICE_COLUMNS, delimiter="\t", restval="")
            table.writeheader()
            for number, (data, text) in enumerate(make_speech(seed, "MP3")):
                name = f"common_voice_{code}_{seed}{number:03}.mp3"
                (clips / name).write_bytes(data)
                table.writerow({"path": name, "sentence": text, "locale": code})


def make_speech(seed: int, audio_format: str) -> list[tuple[bytes, str]]:
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(NUM_ROWS):
        words = [str(word) for word in generator.choice(demonstration.WORDS, size=2)]
        waveform = demonstration.speak(words, generator)
        rows.append((demonstration.encode(waveform, audio_format), " ".join(words)))
    return rows


def write_parquet_config(folder: Path, config: str, splits: list[str], text: str) -> None:
    """As a data set on the Hub: parquet files, and a card that names configuration and splits."""
    entries = []
    for seed, split in enumerate(splits):
        rows = make_speech(seed, "FLAC")
        audio = [{"bytes": data, "path": f"{number}.flac"} for number, (data, _) in enumerate(rows)]
        table = pa.table({"id": range(NUM_ROWS), "audio": audio, text: [t for _, t in rows]})
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        entries.append({"split": split, "path": f"{config}/{path.name}"})
    card = {"configs": [{"config_name": config, "data_files": entries}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def write_clips_and_tables(folder: Path) -> None:
    folder.mkdir()
    for seed, split in enumerate(("train", "validation")):
        lines = ["path,sentence"]
        for number, (data, text) in enumerate(make_speech(seed, "WAV")):
            (folder / f"{split}{number}.wav").write_bytes(data)
            lines.append(f"{split}{number}.wav,{text}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "hindi-common-voice": lambda folder: write_common_voice(folder, "hi", ["train", "dev", "test"]),
    "spanish-common-voice": lambda folder: write_common_voice(
        folder, "es", ["train", "dev", "test"]
    ),
    "swedish-fleurs": lambda folder: write_parquet_config(
        folder, "sv_se", ["train", "validation", "test"], "transcription"
    ),
    "english-librispeech": lambda folder: write_parquet_config(
        folder, "clean", ["train.100", "validation", "test"], "text"
    ),
    "one-hour-lora": write_clips_and_tables,
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_runs_on_data_of_its_form(
    recipe: Path,
    tiny_model: Path,
    english_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    """The whole job in miniature by --dry_run, with a tiny model, in float32."""
    if name_of(recipe) == "one-hour-lora":
        pytest.importorskip("peft", reason="pip install -r requirements-lora.txt")
    WRITERS[name_of(recipe)](tmp_path / "data")
    is_english = "small.en" in recipe.read_text(encoding="utf-8")
    overrides = {
        "model_name_or_path": english_model if is_english else tiny_model,
        "dataset_name": tmp_path / "data",
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "output",
        "fp16": False,
        "per_device_train_batch_size": 2,
    }
    words = [str(word) for name, value in overrides.items() for word in (f"--{name}", value)]
    metrics = script.main(["--config", str(recipe), *words, "--dry_run"])
    assert metrics["eval_num_rows"] == NUM_ROWS
    checks = [record.getMessage().split()[:2] for record in caplog.records]
    assert ["ok", "data"] in checks and ["ok", "disk"] in checks
    assert not (tmp_path / "output").exists()
