"""What a person sees: a real run in a real terminal of 80, 100 and 120 columns, stopped by Ctrl-C and
continued, and the same as a file. The captures in the documentation are compared with it."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import ForkServer
from terminal import BAR, Terminal

PROJECT = Path(__file__).parents[2]
WIDTHS = [80, 100, 120]
COMMANDS = ("  transcribe   bash ", "  try it       bash ")
FLAGS = """
    --model_name_or_path {root}/whisper-learn/model --dataset_name {root}/whisper-learn/speech
    --language es --output_dir {root}/whisper-learn/output --do_train --do_eval
    --eval_before_training --per_device_train_batch_size 4 --per_device_eval_batch_size 4
    --generation_max_length 12 --eval_steps 12 --save_steps 12 --logging_steps 4
    --num_decoding_threads 2 --report_clips 0"""

pytestmark = pytest.mark.slow  # seven processes, forked after their imports: 15 s


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A stopped run and the one that continued it, each in a terminal of its own."""

    folder: Path
    stopped: Terminal
    stopped_code: int
    resumed: Terminal
    resumed_code: int


def words(folder: Path, more: str) -> list[str]:
    return [*FLAGS.format(root=folder).split(), *more.split()]


def make_folder(root: Path, model: Path, speech: Path) -> Path:
    """As `bash run.sh learn` makes it, but smaller."""
    shutil.copytree(model, root / "whisper-learn" / "model")
    shutil.copytree(speech, root / "whisper-learn" / "speech")
    return root


@pytest.fixture(scope="module", params=WIDTHS)
def seen(
    request: pytest.FixtureRequest,
    forks: ForkServer,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    speech: Path,
) -> Seen:
    folder = make_folder(tmp_path_factory.mktemp("screens"), tiny_model, speech)
    stopped = Terminal(request.param)
    process = forks.start(
        words(folder, "--max_steps 1000"),
        log=stopped.path,
        cwd=folder,
        environment=stopped.environment,
    )
    stopped.wait_for("score at 12 ")
    stopped.type("\x03")
    stopped_code = stopped.watch(process)
    checkpoints = (folder / "whisper-learn" / "output").glob("checkpoint-*")
    step = max(int(path.name.removeprefix("checkpoint-")) for path in checkpoints)
    resumed = Terminal(request.param)
    process = forks.start(
        words(folder, f"--max_steps {step + 12}"),
        log=resumed.path,
        cwd=folder,
        environment=resumed.environment,
    )
    return Seen(
        folder=folder,
        stopped=stopped,
        stopped_code=stopped_code,
        resumed=resumed,
        resumed_code=resumed.watch(process),
    )


def test_no_line_is_wrapped_no_bar_torn_and_nothing_is_a_dict(seen: Seen):
    for terminal in (seen.stopped, seen.resumed):
        lines = terminal.lines()
        text = "\n".join(lines)
        # A command is left whole to be copied, and is as long as the path of this checkout.
        wrapped = [line for line in terminal.screen.wrapped if not line.startswith(COMMANDS)]
        assert wrapped == []
        assert max(map(len, lines)) <= min(100, terminal.screen.columns)
        assert terminal.most_bars == 1, "there was a bar, and never two"
        assert not any(BAR in line for line in lines), "the bar is gone"
        assert "{'" not in text and "it/s" not in text and "Traceback" not in text


def test_the_bar_says_what_is_done_and_what_is_left(seen: Seen):
    for terminal in (seen.stopped, seen.resumed):
        assert max(map(len, terminal.bars)) < terminal.screen.columns - 2, "room for ^C"
        training = r"training \S+ +\d+/\d+ steps(, \d\S* (s|min|h) left)? *"
        assert any(re.fullmatch(training, line) for line in terminal.bars)
        assert b"scoring" in terminal.raw and b"2/2 batches" in terminal.raw


def test_nothing_that_a_library_says_is_seen(seen: Seen):
    """What is warned of in these runs is all our own."""
    ours = r"after so many passes|\d+ % of|the model is worse than before"
    for terminal in (seen.stopped, seen.resumed):
        for line in terminal.lines():
            assert not re.search(r"Warning|deprecat|transformers|Loading|Writing", line), line
            assert not line.startswith("warning: ") or re.match(f"warning: ({ours})", line), line


def test_ctrl_c_is_three_lines_and_no_error(seen: Seen):
    lines = seen.stopped.lines()
    assert seen.stopped_code == 130
    assert re.fullmatch(r"saved: whisper-learn/output/checkpoint-\d+", lines[-2])
    assert lines[-3:] == [
        "SIGINT received: saving and stopping. Ctrl-C once more ends it at once.",
        lines[-2],
        "stopped by Ctrl-C. To go on, start the same command again.",
    ]
    assert not any("^C" in line or "error" in line for line in lines)


def test_a_resumed_run_says_where_it_goes_on_and_ends_with_the_next_steps(seen: Seen):
    lines = seen.resumed.lines()
    assert seen.resumed_code == 0
    (saved,) = [line.split()[-1] for line in seen.stopped.lines() if line.startswith("saved: ")]
    assert f"start: continues from {saved}" in lines
    end = lines[next(n for n, line in enumerate(lines) if line.startswith("done: ")) :]
    assert re.fullmatch(r"done: the model is in whisper-learn/output \(\d+\.\d MB\)", end[0])
    names = [line[2:14].strip() for line in end[1:]]
    expected = "transcribe,try it,curves,report,worst clips,transcripts,push".split(",")
    assert [name for name in names if name in expected] == expected
    worst = next(line.split()[-1] for line in end if "worst clips" in line)
    assert (seen.folder / worst).is_file()


def test_every_logged_figure_is_in_trainer_log_jsonl_once(seen: Seen):
    """Of both starts together: what the terminal leaves out is here."""
    text = (seen.folder / "whisper-learn" / "output" / "trainer_log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)) and set(range(4, max(steps), 4)) <= set(steps)
    assert {"loss", "grad_norm", "padding_fraction", "rejected"} <= set(lines[-4] | lines[-3])
    assert "zero_shot_wer" in lines[0]


@pytest.fixture(scope="module")
def file_lines(
    forks: ForkServer, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, speech: Path
) -> list[str]:
    """The log of a whole run whose output goes to a file."""
    folder = make_folder(tmp_path_factory.mktemp("file"), tiny_model, speech)
    process = forks.start(words(folder, "--max_steps 24"), log=folder / "log", cwd=folder)
    assert process.wait(120) == 0
    return (folder / "log").read_text(encoding="utf-8").splitlines()


def test_a_file_has_plain_lines_with_the_time(file_lines: list[str]):
    for line in file_lines:
        assert re.match(r"\d\d:\d\d:\d\d ", line), line
        assert line.isprintable() and BAR not in line and "{'" not in line
    of_scores = [line for line in file_lines if re.search(r"%  |WER|CER|said|heard", line)]
    assert len(of_scores) > 10 and max(map(len, of_scores)) <= 89, "80 columns and the clock"


# ------------------------------------------------------------------------ the documentation

CAPTURES = {"README.md": "## What you will see", "docs/metrics.md": "## The first screen"}


def masked(line: str) -> str:
    """The line without what differs from run to run: numbers, texts, times."""
    line = re.sub(r"^\d\d:\d\d:\d\d ", "", line)
    line = re.sub(r"^(\s+(?:said|heard)) .*", r"\1 TEXT", line)
    line = re.sub(r"<\|notimestamps\|>.*<\|endoftext\|>", "<|notimestamps|>TEXT", line)
    line = re.sub(r"\[[ ▁▂▃▄▅▆▇█]+\]", "[BARS]", line)
    line = re.sub(r"\(was [^)]*\)", "(COMPARED)", line)
    line = re.sub(r"^  change .*", "  change", line)
    line = re.sub(r"bash \S*run.sh", "bash run.sh", line)
    line = re.sub(r"   (empty|loops|cut) \S+ %", "", line)
    line = re.sub(r"[+-]?\d[\d.,:e-]*( (s|min|h)\b)?", "N", line)
    line = re.sub(r"-(?= )", "N", line) if line.endswith("-") else line
    return " ".join(line.split())


def captured_lines(page: Path, heading: str) -> list[str]:
    section = page.read_text(encoding="utf-8").split(f"\n{heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```text\n(.*?)```", section, re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip() != "..."]


@pytest.mark.parametrize("name", CAPTURES)
def test_what_the_documentation_shows_is_what_is_seen(name: str, file_lines: list[str]):
    captured = captured_lines(PROJECT / name, CAPTURES[name])
    assert len(captured) >= 12 and max(map(len, captured)) <= 100
    known = {masked(line) for line in file_lines}
    for line in captured:
        assert masked(line) in known, line
