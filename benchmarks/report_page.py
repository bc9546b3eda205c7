"""How large report.html becomes, how long it takes to write, and how long to open and to search.

    python benchmarks/report_page.py [FOLDER]
    python benchmarks/report_page.py --blocked CHECKOUT [CHECKOUT ...]

Made-up rows of 12 words with an error in every third word of every second row, 60 of them with 6 s
of sound and a picture. Opened five times in headless Chromium, if that and playwright are
installed. FOLDER keeps the pages.

--blocked: how long a training waits for its report after each evaluation. A tiny model is trained
for two steps and scored after each, with 60 clips of up to 30 s in the page, five times by the code
of each checkout of this project in turn. Results: report_page.md.
"""

import argparse
import base64
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

from speech_finetuning.scoring.alignment import AlignedRow, align_in_units
from speech_finetuning.sharing.report_clips import Clip
from speech_finetuning.sharing.report_findings import Findings, render
from speech_finetuning.sharing.report_rows import ScoredSet, changes_of
from speech_finetuning.sharing.report_sounds import encode_sound

SIZES = (10, 1_000, 10_000)
NUM_CLIPS = 60
NUM_OPENINGS = 5
NUM_RUNS = 5
# What a checkout runs: seconds in the report's callback after each evaluation, those of them in
# which sounds are read, and those for the rest at the end.
TIMED_RUN = """
import json, sys, time
import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.sharing import report_clips, report_page
try:
    from speech_finetuning.sharing import report_sounds
except ImportError:
    report_sounds = report_clips

taken = {"evaluation": [], "sounds": [], "end": []}

def timed(name, function):
    def run(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            taken[name].append(time.perf_counter() - began)
    return run

page = report_page.ReportPage
page.on_evaluate = timed("evaluation", page.on_evaluate)
report_sounds.fetch_sounds = timed("sounds", report_sounds.fetch_sounds)
if hasattr(script, "final_card"):
    script.final_card = timed("end", script.final_card)
script.main(sys.argv[1:])
print(json.dumps(taken))
"""


def make_clip(generator: np.random.Generator) -> Clip:
    """Six seconds of noise, which compresses worse than speech, and its picture."""
    import librosa.display
    from matplotlib.figure import Figure

    waveform = generator.normal(0, 0.1, 6 * 16_000).astype(np.float32)
    figure = Figure(figsize=(6.4, 2.2), dpi=75, layout="constrained")
    mel = generator.random((80, 600))
    librosa.display.specshow(mel, x_axis="time", y_axis="mel", sr=16_000, ax=figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", pil_kwargs={"quality": 60})
    return Clip(audio=encode_sound(waveform), picture=base64.b64encode(buffer.getvalue()).decode())


def make_rows(num_rows: int, generator: np.random.Generator, share: float) -> list[AlignedRow]:
    """share: of the words that are wrong in every second row."""
    words = ["".join(generator.choice(list("abcdefghijklm"), 6)) for _ in range(3_000)]
    pairs = []
    for number in range(num_rows):
        said = [str(word) for word in generator.choice(words, 12)]
        wrong = generator.random(12) < share * (number % 2)
        heard = ["wrong" if is_wrong else word for word, is_wrong in zip(said, wrong, strict=True)]
        pairs.append((" ".join(said), " ".join(heard)))
    operations = align_in_units(pairs, ["word"] * len(pairs))
    return [
        AlignedRow(
            index=number,
            id=f"validation/0/0/clip-{number}.flac",
            set_name="",
            group=f"speaker {number % 40}",
            duration_in_seconds=1 + number % 25,
            reference=reference.capitalize() + ".",
            prediction=prediction.capitalize() + ".",
            read_reference=reference,
            read_prediction=prediction,
            unit="word",
            operations=runs,
        )
        for number, ((reference, prediction), runs) in enumerate(
            zip(pairs, operations, strict=True)
        )
    ]


def make_findings(num_rows: int) -> Findings:
    before = make_rows(num_rows, np.random.default_rng(0), share=0.8)
    after = make_rows(num_rows, np.random.default_rng(0), share=0.3)
    clip = make_clip(np.random.default_rng(1))
    scored = ScoredSet(
        role="eval",
        rows=after,
        before=before,
        clips={row.index: clip for row in after[:NUM_CLIPS]},
    )
    history = [
        {"step": step, "loss": 100 / step, "eval_loss": 90 / step, "eval_wer": 900 / step}
        for step in range(100, 2100, 100)
    ]
    return Findings(
        name="benchmark",
        group_name="speaker",
        sets={"eval": scored},
        metrics={},
        changes=changes_of({"eval": scored}),
        history=history,
        run_info={
            "command": "python benchmarks/report_page.py",
            "started": "",
            "identity": {"model_name_or_path": "made up"},
            "arguments": {},
            "versions": {},
            "git": None,
            "data": {},
            "machine": {"platform": "", "cores": os.cpu_count(), "gpus": []},
        },
        totals={"train_rows": 1, "train_rejected": 0, "train_audio_hours": 0, "train_hours": 0},
        rejections=[],
        training_data=[],
        step=2000,
        max_steps=2000,
    )


def open_page(path: Path) -> tuple[float, float] | None:
    """(seconds until the rows are shown, seconds of a search); None without a browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if browser is None:
        return None
    openings = []
    searches = []
    with sync_playwright() as driver:
        for _ in range(NUM_OPENINGS):
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page()
            began = time.monotonic()
            page.goto(path.as_uri())
            page.locator("details.row").first.wait_for()
            openings.append(time.monotonic() - began)
            began = time.monotonic()
            page.fill("#query", "clip-7.flac")
            page.wait_for_function("document.querySelectorAll('details.row').length < 10")
            searches.append(time.monotonic() - began)
            chromium.close()
    return statistics.median(openings), statistics.median(searches)


def make_job(folder: Path) -> list[str]:
    """Flags of a training with 60 clips in its report, and what they name."""
    from speech_finetuning.cli import demonstration

    demonstration.make_model(
        folder / "model", d_model=16, num_layers=1, window_in_seconds=30, max_target_positions=448
    )
    for split, num_rows in (("train", 16), ("validation", 80)):
        rows = demonstration.make_rows(num_rows, seed=len(split), max_words=60)
        demonstration.write_parquet(folder / "speech" / f"{split}.parquet", rows)
    flags = (
        f"--model_name_or_path {folder / 'model'} --dataset_name {folder / 'speech'} --language es"
    )
    flags += " --do_train --do_eval --max_steps 2 --eval_steps 1 --save_steps 2 --report_to none"
    flags += (
        f" --per_device_train_batch_size 4 --generation_max_length 12 --report_clips {NUM_CLIPS}"
    )
    return flags.split()


def run_timed(checkout: Path, flags: list[str]) -> dict[str, list[float]]:
    """The seconds of one run of a checkout's code."""
    with tempfile.TemporaryDirectory() as output:
        result = subprocess.run(
            [sys.executable, "-c", TIMED_RUN, *flags, "--output_dir", output],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        raise SystemExit(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def measure_blocked(checkouts: list[Path]) -> None:
    """Prints the median and the range of each figure of each checkout, in seconds."""
    figures: dict[tuple[Path, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = make_job(Path(folder))
        for _ in range(NUM_RUNS):
            for checkout in checkouts:
                taken = run_timed(checkout.resolve(), flags)
                for name, seconds in taken.items():
                    for number, value in enumerate(seconds, 1):
                        figures.setdefault((checkout, f"{name} {number}"), []).append(value)
    for (checkout, name), values in figures.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{checkout} {name:<14} {statistics.median(values):6.2f} s ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--blocked", metavar="CHECKOUT", nargs="+", type=Path)
    args = parser.parse_args()
    if args.blocked:
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        measure_blocked(args.blocked)
        return
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for num_rows in SIZES:
        findings = make_findings(num_rows)
        began = time.monotonic()
        page = render(findings)
        written_in_seconds = time.monotonic() - began
        path = folder / f"report-{num_rows}.html"
        path.write_text(page, encoding="utf-8")
        line = f"{num_rows:>6} rows: {path.stat().st_size / 1e6:5.2f} MB, written in "
        line += f"{written_in_seconds:.2f} s"
        times = open_page(path)
        if times is not None:
            line += f", open after {times[0]:.2f} s, searched in {times[1]:.2f} s"
        print(line)


if __name__ == "__main__":
    main()
