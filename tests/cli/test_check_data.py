"""bash run.sh check: what is odd about a data set, measured without a model."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import make_clip

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.cli import demonstration
from speech_finetuning.data.data_check import SplitCheck, find_suspects, rate_outliers
from speech_finetuning.data.row_check import CheckedRow, mixed_words, oddities_of

RATE = demonstration.SAMPLE_RATE_IN_HZ


def tone(seconds: float, loudness: float = 0.3, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    times = np.arange(round(RATE * seconds)) / RATE
    noise = generator.normal(0, 0.002, len(times))
    return (loudness * np.sin(2 * np.pi * (300 + 10 * seed) * times) + noise).astype(np.float32)


def write(folder: Path, name: str, waveform: np.ndarray, audio_format: str = "FLAC") -> None:
    samples = np.rint(32_767 * waveform).astype(np.int16)  # the same ones in each format
    (folder / name).write_bytes(demonstration.encode(samples, audio_format))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a check of thirty plain rows and one of each kind of odd ones."""
    folder = tmp_path_factory.mktemp("check")
    data = folder / "speech"
    data.mkdir()
    train = [(f"plain{n}.flac", "uno dos tres cuatro", tone(1.0, seed=n)) for n in range(30)]
    train += [
        ("silent.flac", "uno dos tres cuatro", np.zeros(RATE, np.float32)),
        ("clipped.flac", "uno dos tres cuatro", np.clip(20 * tone(1.0, seed=40), -1, 1)),
        (
            "gap.flac",
            "uno dos tres cuatro",
            np.concatenate([tone(0.5, seed=41), 1e-6 * tone(5.0), tone(0.4)]),
        ),
        ("fast.flac", "uno dos tres cuatro " * 6, tone(1.0, seed=42)),
        ("slow.flac", "a", tone(1.0, seed=43)),
        ("digits.flac", "uno dos 3 cuatro cinco", tone(1.0, seed=44)),
        ("mixed.flac", "uno dоs tres cuatro", tone(1.0, seed=45)),  # a Cyrillic o
        ("again.wav", "uno dos tres cuatro", tone(1.0, seed=0)),
        ("other.flac", "cinco seis siete ocho", tone(1.0, seed=1)),
        ("scored.flac", "uno dos tres cuatro", tone(1.0, seed=46)),
        ("empty.flac", "", tone(1.0, seed=47)),
        ("long.flac", "uno", tone(31.0, seed=48)),
    ]
    lines = ["path,sentence,speaker"]
    for name, text, waveform in train:
        write(data, name, waveform, "WAV" if name.endswith("wav") else "FLAC")
        lines.append(f"{name},{text},{'Ana' if len(lines) % 2 else 'Ben'}")
    lines.append("gone.flac,uno,Ana")
    (data / "train.csv").write_text("\n".join(lines) + "\n")
    write(data, "eval.flac", tone(1.0, seed=46))
    (data / "validation.csv").write_text("path,sentence\neval.flac,uno dos tres cuatro\n")
    words = f"--check_data --dataset_name {data} --output_dir {folder / 'out'}"
    metrics = script.main(words.split())
    assert metrics == {"rows": 41, "rejected": 3, "suspects": 11}
    return folder / "out"


def reasons_by_file(folder: Path) -> dict[str, set[str]]:
    lines = (folder / "suspects.jsonl").read_text(encoding="utf-8").splitlines()
    return {Path(row["row"]).name: set(row["reasons"]) for row in map(json.loads, lines)}


def test_every_odd_row_is_a_suspect_and_no_other(checked: Path):
    assert reasons_by_file(checked) == {
        "silent.flac": {"silent"},
        "clipped.flac": {"clipped"},
        "gap.flac": {"mostly_silent"},
        "fast.flac": {"too_much_text"},
        "slow.flac": {"too_little_text"},
        "digits.flac": {"stray_digits"},
        "mixed.flac": {"mixed_scripts"},
        "again.wav": {"repeated_audio"},
        "other.flac": {"same_audio_other_text"},
        "plain1.flac": {"same_audio_other_text"},
        "scored.flac": {"audio_in_evaluation"},
    }


def test_rejected_rows_have_their_reasons(checked: Path):
    rows = [json.loads(line) for line in (checked / "rejected.jsonl").read_text().splitlines()]
    assert {(Path(row["row"]).name, row["reason"]) for row in rows} == {
        ("empty.flac", "text_empty"),
        ("long.flac", "audio_too_long"),
        ("gone.flac", "audio_missing"),
    }


def test_the_figures_are_those_of_the_data(checked: Path):
    found = json.loads((checked / "check.json").read_text(encoding="utf-8"))
    train = found["splits"]["train"]
    assert (train["num_rows"], train["num_usable_rows"], train["num_speakers"]) == (43, 40, 2)
    assert train["hours"] == pytest.approx((39 * 1.0 + 5.9) / 3600, rel=1e-3)
    assert found["one_pass"]["rows"] == 40 and found["one_pass"]["steps_of_16_rows"] == 3
    assert found["text_in_training_and_evaluation"]["num_rows"] == 1
    assert found["characters"]["counts"]["о"] == 1
    assert found["characters"]["first_rows"]["о"].endswith("mixed.flac")


class LinkFinder(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_and_shows_what_the_files_have(checked: Path):
    page = (checked / "check.html").read_text(encoding="utf-8")
    finder = LinkFinder()
    finder.feed(page)
    assert finder.links == [] and "url(" not in page and "<script" not in page
    for name in [*reasons_by_file(checked), "empty.flac", "long.flac", "gone.flac"]:
        assert name in page
    assert re.search(r"40 rows or\s+0.01 h of speech: 3 steps", page)


def test_suspects_are_left_out_by_exclude_rows(checked: Path, tmp_path: Path):
    data = checked.parent / "speech"
    words = f"--check_data --dataset_name {data} --output_dir {tmp_path}"
    metrics = script.main([*words.split(), "--exclude_rows", str(checked / "suspects.jsonl")])
    assert metrics == {"rows": 30, "rejected": 3, "suspects": 0}


def test_texts_of_strangers_are_text_on_the_page(tmp_path: Path):
    data = tmp_path / "speech"
    data.mkdir()
    write(data, "a.flac", tone(1.0))
    (data / "train.csv").write_text("path,sentence\na.flac,<script>alert(1)</script> \x1b[31m\n")
    script.main(f"--check_data --dataset_name {data} --output_dir {tmp_path / 'out'}".split())
    page = (tmp_path / "out" / "check.html").read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page


def test_of_data_without_a_split_to_score_nothing_is_counted(tmp_path: Path, checked: Path):
    data = tmp_path / "speech"
    data.mkdir()
    write(data, "a.flac", tone(1.0))
    (data / "train.csv").write_text("path,sentence\na.flac,uno dos\n")
    script.main(f"--check_data --dataset_name {data} --output_dir {tmp_path / 'out'}".split())
    none = "There is no split to score"
    assert none in (tmp_path / "out" / "check.html").read_text(encoding="utf-8")
    page = (checked / "check.html").read_text(encoding="utf-8")
    assert none not in page and "A text that is trained on too: 1 scored row" in page


def test_a_data_set_without_a_usable_row_is_an_error(tmp_path: Path):
    data = tmp_path / "speech"
    data.mkdir()
    (data / "train.csv").write_text("path,sentence\ngone.flac,uno\n")
    words = f"--check_data --dataset_name {data} --output_dir {tmp_path / 'out'}"
    with pytest.raises(UserError, match=r"no usable row in .*rejected\.jsonl"):
        script.main(words.split())
    assert "audio_missing" in (tmp_path / "out" / "check.html").read_text()


def test_a_data_set_all_of_whose_rows_are_left_out_is_an_error(tmp_path: Path):
    data = tmp_path / "speech"
    data.mkdir()
    write(data, "a.flac", np.zeros(RATE, np.float32))
    (data / "train.csv").write_text("path,sentence\na.flac,uno\n")
    out = tmp_path / "out"
    words = f"--check_data --dataset_name {data} --output_dir {out}"
    assert script.main(words.split())["suspects"] == 1
    rows = (out / "suspects.jsonl").rename(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"--exclude_rows .*rows\.jsonl leaves out all 1\."):
        script.main([*words.split(), "--exclude_rows", str(rows)])
    found = json.loads((out / "check.json").read_text())
    assert found["splits"]["train"]["num_excluded_rows"] == 1
    assert found["one_pass"]["minutes_of_decoding"] == 0


def test_one_row_is_not_told_as_several(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = tmp_path / "speech"
    data.mkdir()
    write(data, "a.flac", tone(1.0))
    (data / "train.csv").write_text("path,sentence\na.flac,uno dos tres cuatro\n")
    (data / "test.csv").write_text("path,sentence\na.flac,uno dos tres cuatro\n")
    words = f"--check_data --dataset_name {data} --output_dir {tmp_path / 'out'}"
    words += " --eval_split_name test --num_decoding_threads 1"
    with caplog.at_level("INFO"):
        script.main(words.split())
    page = (tmp_path / "out" / "check.html").read_text(encoding="utf-8")
    told = re.sub("<[^>]+>", " ", page.partition("<body>")[2]) + " ".join(page.split("<title>")[2:])
    for text in (told, caplog.text):
        assert re.search(r"\b1 (usable |scored )?row\b", text)
        assert not re.search(r"(?<![\d.,])1 (usable |scored )?(rows|files|steps|threads)\b", text)


def test_the_check_of_other_data_is_not_replaced(tmp_path: Path):
    for name in ("a", "b"):
        data = tmp_path / name / "speech"
        data.mkdir(parents=True)
        write(data, "a.flac", tone(1.0))
        (data / "train.csv").write_text("path,sentence\na.flac,uno\n")
    words = ["--check_data", "--output_dir", str(tmp_path / "check-speech"), "--dataset_name"]
    for _ in range(2):
        script.main([*words, str(tmp_path / "a" / "speech")])
    with pytest.raises(UserError, match=r"check-speech has the check of .*a/speech\. Pass anot"):
        script.main([*words, str(tmp_path / "b" / "speech")])


def test_speakers_of_parquet_files_are_counted_by_their_column(tmp_path: Path):
    """It is not read with the rows; a file may lack it."""
    folder = tmp_path / "speech"
    folder.mkdir()
    for shard, names in enumerate([["Ann", "Ann", None], ["Bob", "Ann", ""], None]):
        rows = [{"audio": make_clip(0.5 + n / 10 + shard), "text": f"uno {n}"} for n in range(3)]
        table = pa.Table.from_pylist(rows)
        if names is not None:
            table = table.append_column("speaker", pa.array(names, pa.string()))
        pq.write_table(table, folder / f"train-{shard:05}-of-00003.parquet")
    words = f"--check_data --dataset_name {folder} --output_dir {tmp_path / 'out'}"
    script.main(words.split())
    train = json.loads((tmp_path / "out" / "check.json").read_text())["splits"]["train"]
    assert train["num_usable_rows"] == 9 and train["num_speakers"] == 2
    assert train["rows_of_speakers"] == {"Ann": 3, "Bob": 1}
    assert "Ann (3), Bob (1)" in (tmp_path / "out" / "check.html").read_text(encoding="utf-8")


def test_rows_of_a_damaged_file_are_all_counted():
    """One rejection stands for the rest of the file."""
    split = SplitCheck(name="train", is_trained=True, num_excluded=2)
    split.add(make_row(1))
    split.add(Rejection("file_damaged", row="a.parquet", num_rows=40))
    summary = split.summary()
    assert (summary["num_rows"], summary["num_usable_rows"]) == (43, 1)
    assert summary["rejected"] == {"file_damaged": 40}


# ---- single rules ----
def make_row(number: int, **changes: object) -> CheckedRow:
    values = {
        "id": f"train/0/0/{number}",
        "written": "uno dos",
        "text": "uno dos",
        "speaker": None,
        "seconds": 1.0,
        "sampling_rate": 16_000,
        "audio_hash": f"{number}",
        "peak": 0.5,
        "clipped_share": 0.0,
        "silent_share": 0.0,
    }
    return CheckedRow(**{**values, **changes})


def test_rates_are_odd_by_the_spread_of_all_rows():
    generator = np.random.default_rng(0)
    rows = [make_row(n, seconds=float(np.exp(generator.normal(0, 0.2)))) for n in range(500)]
    assert len(rate_outliers(rows)) < 3
    rows.append(make_row(500, seconds=4.0))
    assert "too_little_text" in rate_outliers(rows)["train/0/0/500"]
    assert rate_outliers([]) == {}


def test_a_file_that_is_listed_twice_is_no_suspect():
    split = SplitCheck(name="train", is_trained=True, rows=[make_row(1), make_row(1)])
    assert find_suspects([split]) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("мама мылa раму", ["мылa"]),
        ("Smith говорит", []),
        ("日本のアニメ", []),
        ("naïve café", []),
        ("ελληνικά 5G", []),
    ],
)
def test_words_of_two_alphabets(text: str, found: list[str]):
    assert mixed_words(text) == found


def test_oddities_of_a_text():
    row = make_row(1, written="l\u2019e\u0301te\u0301 2", text="l\u2019été 2")
    assert oddities_of(row) == {"digits", "decomposed", "apostrophe \u2019 (U+2019)"}
