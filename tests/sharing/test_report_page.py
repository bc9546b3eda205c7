"""report.html: what it tells, what it hides, and how it looks in a real browser."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import BROWSER_ARGUMENTS, find_browser

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration
from speech_finetuning.scoring.alignment import (
    AlignedRow,
    align_in_units,
    change_between,
    count_common_errors,
    split_units,
)
from speech_finetuning.sharing import report_page
from speech_finetuning.sharing.report_charts import nice_ticks, readable_hours
from speech_finetuning.sharing.report_clips import Clip, choose_rows
from speech_finetuning.sharing.report_findings import Findings, public_findings, render
from speech_finetuning.sharing.report_rows import ScoredSet, changes_of, describe_part
from speech_finetuning.sharing.report_sounds import encode_sound

HOSTILE = (
    "</script><script>window.hurt=1</script><img src=x onerror=window.hurt=1> & <!-- ' \" `${1}`"
)
ARABIC = "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645"
HINDI = "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e"
THAI = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01"


def make_rows(
    pairs: list[tuple[str, str]], unit: str = "word", group: str | None = None, first: int = 0
) -> list[AlignedRow]:
    operations = align_in_units(pairs, [unit] * len(pairs))
    return [
        AlignedRow(
            index=first + number,
            id=f"validation/0/0/clip-{first + number}.flac",
            set_name="",
            group=group,
            duration_in_seconds=1.5 + number % 20,
            reference=reference,
            prediction=prediction,
            read_reference=reference,
            read_prediction=prediction,
            unit=unit,
            operations=runs,
        )
        for number, ((reference, prediction), runs) in enumerate(
            zip(pairs, operations, strict=True)
        )
    ]


def make_findings(sets: dict[str, ScoredSet], **changes: Any) -> Findings:
    history = []
    for step in range(100, 500, 100):
        history.append({"step": step, "loss": 300 / step, "learning_rate": 1e-5 / step})
        history.append(
            {"step": step, "data_wait_fraction": 0.02, "audio_hours_per_hour": 90.0 + step}
        )
        scores = {"eval_loss": 200 / step, "eval_wer": 3000 / step, "eval_cer": 1000 / step}
        history.append({"step": step, **scores})
    metrics: dict[str, float] = {"zero_shot_loss": 4.0}
    for role, wer in (("zero_shot", 60.0), ("eval", 7.5)):
        metrics |= {f"{role}_wer": wer, f"{role}_cer": wer / 2, f"{role}_num_rows": 4}
        metrics |= {f"{role}_wer_low": wer - 1, f"{role}_wer_high": wer + 1}
        metrics |= {f"{role}_{kind}": 3 for kind in ("substitutions", "deletions", "insertions")}
    info = {
        "command": f"python train.py --dataset_name /home/alice/speech --x '{HOSTILE}'",
        "started": "2026-01-01T00:00:00Z",
        "identity": {"model_name_or_path": "openai/whisper-small", "language": "es"},
        "arguments": {"output_dir": "/home/alice/out", "dataset_name": "/home/alice/speech"},
        "versions": {"torch": "2.13.0"},
        "git": None,
        "data": {
            "eval": [
                {
                    "record": "",
                    "name": "/home/alice/speech",
                    "config_name": None,
                    "split": "validation",
                    "kind": "parquet",
                    "revision": None,
                    "num_rows": 4,
                }
            ]
        },
        "machine": {"platform": "Linux", "cores": 2, "gpus": [], "cuda": None},
        "hub_names": ["openai/whisper-small"],
    }
    rejection = {
        "split": "train",
        "row": "train/0/0//home/alice/speech/bad.wav",
        "reason": "audio_damaged",
        "detail": "/home/alice/speech/bad.wav ends early",
    }
    source = {
        "name": "/home/alice/speech",
        "num_rows": 40,
        "hours": 0.02,
        "durations": [1.0, 2.0, 2.5],
        "tokens": [5, 8, 13],
    }
    settings: dict[str, Any] = {
        "name": "whisper-small-es",
        "group_name": "speaker",
        "sets": sets,
        "metrics": metrics,
        "changes": changes_of(sets),
        "history": history,
        "run_info": info,
        "totals": {
            "train_rows": 640,
            "train_rejected": 1,
            "train_audio_hours": 0.5,
            "train_hours": 0.1,
        },
        "rejections": [rejection],
        "training_data": [source],
        "step": 400,
        "max_steps": 1000,
    }
    return Findings(**{**settings, **changes})


def make_sets() -> dict[str, ScoredSet]:
    """Four kinds of writing, with errors of every kind, before and after training."""
    said = ["uno dos tres", HOSTILE, ARABIC, HINDI, "el gato duerme bien hoy"]
    heard = [
        "uno dos seis",
        f"{HOSTILE} extra",
        ARABIC.split()[0],
        HINDI,
        "el gato duerme bien hoy",
    ]
    before = ["nada", "", "x", HINDI, "un perro"]
    earlier = make_rows(list(zip(said, before, strict=True)))
    after = make_rows(list(zip(said, heard, strict=True)))
    after = [replace(row, group=f"speaker {row.index % 2}") for row in after]
    waveform = demonstration.speak(["uno", "dos"], np.random.default_rng(0))
    clips = {0: Clip(audio=encode_sound(waveform)), 1: Clip()}
    return {
        "zero_shot": ScoredSet(role="zero_shot", rows=earlier),
        "eval": ScoredSet(role="eval", rows=after, before=earlier, clips=clips),
    }


def tables_of(page: str) -> list[dict[str, Any]]:
    (text,) = re.findall(r'<script type="application/json" id="tables">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_every_error_is_found_in_the_alignment():
    (row,) = make_rows([("a b c d", "a x c d e e")])
    assert row.operations == [("=", 1), ("s", 1), ("=", 2), ("i", 2)]
    assert row.counts is not None and row.counts.wer == 75
    common = count_common_errors([row, *make_rows([("a b", "a"), ("b", "")])])
    assert common.substitutions == {("b", "x"): 1}
    assert common.deletions == {"b": 2} and common.insertions == {"e": 2}
    assert make_rows([("", "words")])[0].counts is None


def test_languages_without_spaces_are_aligned_by_character():
    assert split_units("\u0e01\u0e33 \u0e01\u0e34\u0e19", "character") == [
        "\u0e01",
        "\u0e33",
        "\u0e01\u0e34",
        "\u0e19",
    ]
    (row,) = make_rows([(THAI, THAI[:-1])], unit="character")
    assert row.counts is not None and row.counts.deletions == 1 and row.counts.substitutions == 0


def test_a_change_is_one_only_if_its_interval_excludes_zero():
    generator = np.random.default_rng(0)
    said = [" ".join("abcdefghij")] * 200
    wrong = [" ".join(generator.permutation(list("abcdefghij"))) for _ in said]
    clear = change_between(
        make_rows(list(zip(said, wrong, strict=True))),
        make_rows(list(zip(said, said, strict=True))),
    )
    assert clear is not None and clear.verdict == "better" and clear.high < 0
    again = [" ".join(generator.permutation(list("abcdefghij"))) for _ in said]
    unclear = change_between(
        make_rows(list(zip(said, wrong, strict=True))),
        make_rows(list(zip(said, again, strict=True))),
    )
    assert unclear is not None and unclear.verdict == "no clear change"
    assert unclear.low < unclear.points < unclear.high
    assert change_between(make_rows([("a", "b")]), make_rows([("a c", "b")])) is None


def test_the_worst_rows_and_a_sample_that_stays_are_to_be_heard():
    rows = make_rows([("a b c", "a b c")] * 80 + [("a b c", "x y")] * 10)
    chosen = choose_rows(rows, 12)
    assert len({row.index for row in chosen}) == 12
    assert all(row.index >= 80 for row in chosen[:6])
    assert [
        row.index for row in choose_rows(rows[:80] + make_rows([("a", "a")] * 10, first=80), 12)
    ][-6:] == [row.index for row in choose_rows(make_rows([("a", "a")] * 90), 12)][6:]
    assert len(choose_rows(rows[:3], 60)) == 3


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1e-5), (0, 137.2), (3.1, 3.2), (0, 1e6)])
def test_ticks_are_few_and_cover_the_values(low: float, high: float):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low and ticks[-1] >= high


def test_the_page_is_one_file_without_an_address():
    page = render(make_findings(make_sets()))
    outside = r"https?:|url\(|@import|<(?:link|iframe|object|embed|base)\b"
    assert re.findall(outside, page) == []
    assert "no clear change" in page or "better" in page
    assert HOSTILE not in page and "&lt;/script&gt;&lt;script&gt;window.hurt" in page
    tables = tables_of(page)
    texts = {row[5] for row in tables[0]["rows"]}
    assert HOSTILE in texts and ARABIC in texts
    assert tables[0]["title"] == "step 400" and len(tables[0]["rows"]) == 5
    assert tables[0]["rows"][0][3] >= tables[0]["rows"][-1][3]


def test_what_may_be_uploaded_names_no_local_folder():
    findings = make_findings(make_sets())
    assert "/home/alice" in render(findings)
    page = render(public_findings(findings))
    assert "alice" not in page
    assert "local data" in page and "bad.wav" in page and ARABIC in page


def with_guard(sets: dict[str, ScoredSet]) -> dict[str, ScoredSet]:
    """Beside the rows of `make_sets` two of a guard, which are counted by character."""
    said = make_rows([(THAI, THAI[:-1]), ("/home/alice/speech", "x")], unit="character", first=90)
    before = make_rows([(THAI, THAI), ("/home/alice/speech", "y")], unit="character", first=90)
    sets["eval"].guards = [replace(row, set_name="thai") for row in said]
    sets["eval"].guards_before = [replace(row, set_name="thai") for row in before]
    return sets


def test_rows_of_a_guard_are_there_and_count_in_nothing_else():
    plain = make_findings(make_sets())
    guarded = make_findings(with_guard(make_sets()))
    (table,) = tables_of(render(guarded))
    assert [each["name"] for each in table["sets"]] == ["", "thai"]
    assert [each["unit"] for each in table["sets"]] == ["word", "character"]
    kept = [row for row in table["rows"] if row[12] == 0]
    assert kept == tables_of(render(plain))[0]["rows"]
    others = [row for row in table["rows"] if row[12] == 1]
    assert sorted(row[11] for row in others) == [0, 18], "the untouched model's errors"
    assert guarded.changes == plain.changes
    shown, earlier = (render(each).partition('id="tables"')[0] for each in (guarded, plain))
    assert shown == earlier
    assert "alice" not in render(public_findings(guarded))


def test_ten_thousand_long_rows_stay_below_15_megabytes():
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), 6)) for _ in range(3_000)]
    pairs = []
    for places in generator.integers(len(words), size=(10_000, 40)):
        said = [words[place] for place in places]
        heard = list(said)
        heard[7] = "wrong"
        pairs.append((" ".join(said), " ".join(heard)))
    rows = make_rows(pairs)
    clip = Clip(audio="A" * 150_000, picture="B" * 20_000)
    scored = ScoredSet(
        role="eval", rows=rows, before=rows, clips={row.index: clip for row in rows[:60]}
    )
    began = time.monotonic()
    page = render(make_findings({"eval": scored}))
    print(f"{len(page.encode()) / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
    assert len(page.encode()) < 15_000_000
    (table,) = tables_of(page)
    assert table["leftOut"] + len(table["rows"]) == 10_000
    assert table["clipsLeftOut"] + len(table["clips"]) == 60 and table["clipsLeftOut"] > 0


def test_the_clips_of_all_sets_share_the_room_in_the_page():
    rows = make_rows([("uno dos", "uno")] * 60)
    clip = Clip(audio="A" * 150_000, picture="B" * 20_000)
    clips = {row.index: clip for row in rows}
    sets = {
        "zero_shot": ScoredSet(role="zero_shot", rows=rows),
        "eval": ScoredSet(role="eval", rows=rows, clips=clips),
        "test": ScoredSet(role="test", rows=rows, clips=clips),
    }
    page = render(make_findings(sets))
    assert len(page.encode()) < 15_000_000
    counts = [len(table["clips"]) for table in tables_of(page) if table["clips"]]
    assert len(counts) == 2 and counts[0] == counts[1] > 10


def test_every_rate_comes_with_its_interval_and_number_of_rows():
    words = " ".join(re.sub("<[^>]+>", " ", render(make_findings(make_sets()))).split())
    assert "WER, step 400: 7.50 % (95 % interval 6.50 to 8.50, 4 rows)" in words
    part = describe_part("1 to 2 s", make_rows([("uno dos", "uno"), ("tres", "tres")]))
    assert part["rows"] == 2 and part["low"] == 0 < part["rate"] < part["high"] == 50


def test_it_says_what_was_invented_where_nobody_speaks_and_written_of_prompts():
    findings = make_findings(make_sets())
    assert "noise or silence" not in render(findings)
    findings.totals["train_nonspeech_rows"] = 1_032
    findings.metrics |= {"eval_nonspeech_minutes": 2.0, "eval_invented_words": 3}
    findings.metrics |= {"eval_prompt_words": 8, "eval_prompt_words_written": 6}
    words = " ".join(re.sub("<[^>]+>", " ", render(findings)).split())
    assert "(30 min of speech; 1,032 of the rows made into noise or silence)" in words
    assert "step 400: no speech, 2.0 min: 3 words invented, 1.5 a minute." in words
    assert "step 400: 6 of 8 spoken words of the prompts written, 75.0 %." in words


@pytest.mark.parametrize(
    ("hours", "told"), [(0.01, "36 s"), (0.5, "30 min"), (1.6, "1.6 h"), (1250.04, "1,250.0 h")]
)
def test_hours_are_told_in_a_unit_that_fits(hours: float, told: str):
    assert readable_hours(hours) == told


@pytest.mark.slow
def test_a_run_writes_the_page_after_each_evaluation(
    train: Callable[..., dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[tuple[int, list[str]]] = []

    def note(findings: Findings) -> str:
        page = render(findings)
        written.append((findings.step, sorted(findings.sets)))
        return page

    monkeypatch.setattr(report_page, "render", note)
    flags = "--do_train --do_eval --eval_before_training --test_split_name test --max_steps 4"
    train(f"{flags} --eval_steps 2 --save_steps 2 --report_clips 4")
    roles = ["eval", "test", "zero_shot"]
    # The best step of equal ones is the first: what is saved is scored once more.
    assert [step for step, _ in written] == [0, 0, 2, 4, 4, 4]
    assert written[0][1] == ["zero_shot"] and set(written[-1][1]) == {*roles, "untouched_test"}
    page = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    first, second = tables_of(page)
    assert first["title"] == "after training"
    assert second["title"] in ("test split", "test split, by the best model (step 2)")
    assert len(first["rows"]) == len(second["rows"]) == 8
    clips = [*first["clips"].values(), *second["clips"].values()]
    assert len(clips) == 8 and all(clip["audio"] and clip["picture"] for clip in clips)
    assert first["rows"][0][11] is not None, "the untouched model's errors"
    assert "<svg" in page and "untouched model" in page and "uno" in page
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert "curve.png" in names and not [name for name in names if name.endswith(".tmp")]
    assert "_report" not in names, "what pictures are drawn from"
    assert "![WER over the steps of the training](curve.png)" in (
        tmp_path / "output" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_ends_no_run(
    train: Callable[..., dict[str, float]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "output" / "report.html").mkdir(parents=True)
    assert "eval_wer" in train("--do_eval --max_eval_samples 2")
    assert "report.html could not be written" in caplog.text


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_rows_are_grouped_by_a_column(
    kind: str, train: Callable[..., dict[str, float]], tmp_path: Path
):
    rows = demonstration.make_rows(6, seed=3)
    folder = tmp_path / "grouped"
    folder.mkdir()
    if kind == "parquet":
        columns = {
            "audio": [{"bytes": data, "path": f"{i}.flac"} for i, (data, _) in enumerate(rows)],
            "text": [text for _, text in rows],
            "speaker_id": [7, 8, 7, 8, 7, None],
        }
        pq.write_table(pa.table(columns), folder / "validation.parquet")
    else:
        lines = ["path,sentence,speaker_id"]
        for i, (data, text) in enumerate(rows):
            (folder / f"{i}.flac").write_bytes(data)
            lines.append(f"{i}.flac,{text},{'' if i == 5 else 7 + i % 2}")
        (folder / "validation.csv").write_text("\n".join(lines))
    train(f"--do_eval --dataset_name {folder} --group_column_name speaker_id")
    page = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    (table,) = tables_of(page)
    assert sorted(row[1] for row in table["rows"]) == ["", "7", "7", "7", "8", "8"]
    assert "By speaker_id" in page
    with pytest.raises(UserError, match="--group_column_name town: no such column"):
        train(f"--do_eval --dataset_name {folder} --group_column_name town")


# ---------------------------------------------------------------------------- in a real browser ---
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = find_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=BROWSER_ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_the_page_in_a_browser(browser: Any, tmp_path: Path):
    """Search, filters, sorting, sound, keyboard; at a telephone's width; hostile texts do nothing."""
    path = tmp_path / "report.html"
    path.write_text(render(make_findings(make_sets())), encoding="utf-8")
    page = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme="dark")
    problems: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    rows = page.locator("details.row")
    assert rows.count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    assert page.evaluate("window.hurt === undefined")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    shown = page.locator("#list").text_content()
    assert "</script><script>window.hurt=1</script>" in shown
    arabic = page.locator("p.words", has_text=ARABIC.split()[0]).first
    assert arabic.evaluate("made => getComputedStyle(made).direction") == "rtl"

    assert page.locator("#group-label").is_visible()
    page.fill("#query", "gato")
    page.wait_for_function("document.querySelectorAll('details.row').length === 1")
    page.fill("#query", "")
    page.wait_for_function("document.querySelectorAll('details.row').length === 5")
    page.select_option("#filter", "i")
    assert rows.count() == 1 and "extra" in rows.first.locator("ins").last.text_content()
    page.select_option("#filter", "clip")
    assert rows.count() == 1
    rows.first.locator("summary").click()
    page.locator("audio").wait_for(state="attached")
    page.wait_for_function("document.querySelector('audio').readyState >= 1")
    assert page.evaluate("document.querySelector('audio').duration") > 0.5
    assert "written before training" in rows.first.text_content()
    page.select_option("#filter", "all")
    page.select_option("#sort", "short")
    assert rows.first.locator("del").first.text_content() == "tres"
    page.select_option("#group", "speaker 1")
    assert rows.count() == 2
    page.select_option("#group", "")

    press_keys(page)
    page.locator("button.find", has_text="seis").click()
    page.wait_for_function("document.querySelectorAll('details.row').length === 1")
    assert page.input_value("#query") == "tres"
    assert problems == [] and {url.split(":")[0] for url in requests} <= {"file", "data"}
    page.close()


def press_keys(page: Any) -> None:
    """To the search, from row to row, and open."""
    rows = page.locator("details.row")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    rows.first.locator("summary").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert rows.nth(1).evaluate("row => row.open")


@pytest.mark.slow
def test_rows_of_a_guard_are_shown_when_they_are_asked_for(browser: Any, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(render(make_findings(with_guard(make_sets()))), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    rows = page.locator("details.row")
    assert rows.count() == 5 and page.locator("#part-label").is_visible()
    page.select_option("#part", label="thai (guard)")
    assert rows.count() == 2
    deleted = rows.filter(has_text="1 error in").locator("del")
    assert deleted.text_content() == THAI[-1], "characters, beside sets in which words are counted"
    page.select_option("#part", "all")
    assert rows.count() == 7
    page.locator("button.find", has_text="seis").click()
    page.wait_for_function("document.querySelectorAll('details.row').length === 1")
    assert page.input_value("#part") == "trained"
    page.close()


@pytest.mark.slow
def test_ten_thousand_rows_open_and_are_searched(browser: Any, tmp_path: Path):
    pairs = [
        (f"palabra {number} de muchas", f"palabra {number} muchas") for number in range(10_000)
    ]
    path = tmp_path / "report.html"
    path.write_text(render(make_findings({"eval": ScoredSet(role="eval", rows=make_rows(pairs))})))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.locator("details.row").count() >= 50
    assert not page.locator("#group-label").is_visible(), "there are no groups"
    took_in_ms = page.evaluate(
        "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
    )
    print(f"{path.stat().st_size / 1e6:.1f} MB open in {took_in_ms:.0f} ms")
    page.fill("#query", "palabra 7777 ")
    page.wait_for_function("document.querySelectorAll('details.row').length === 1")
    page.fill("#query", "")
    page.wait_for_function("document.querySelectorAll('details.row').length >= 50")
    page.locator("#more").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('details.row').length >= 100")
    page.close()
