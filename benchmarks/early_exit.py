"""How long --help, --version and a mistake on the command line take to be answered.

    python benchmarks/early_exit.py [SCRIPT ...]

Each command runs three times, in a process of its own, and the fastest counts. Other scripts than the
present one, say that of an earlier commit, can be given to compare with. Results: early_exit.md.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

PRESENT = Path(__file__).parents[1] / "run_speech_recognition_seq2seq_streaming.py"
RUNS = 3
REQUIRED = "--model_name_or_path m --dataset_name d --language es --output_dir o"
COMMANDS = {
    "help": "--help",
    "all flags": "--help_all",
    "version": "--version",
    "a misspelt flag": f"{REQUIRED} --do_train --max_stesp 10",
    "a value that is no number": f"{REQUIRED} --do_train --max_steps ten",
    "flags that contradict": f"{REQUIRED} --do_train --max_steps 10 --load_best_model_at_end",
}


def fastest(script: Path, words: str) -> tuple[float, float]:
    """(wall, processor) seconds of the fastest of some runs."""
    times = []
    for _ in range(RUNS):
        began = time.monotonic()
        before = os.times()
        subprocess.run([sys.executable, script, *words.split()], capture_output=True)
        after = os.times()
        busy = after.children_user + after.children_system
        busy -= before.children_user + before.children_system
        times.append((time.monotonic() - began, busy))
    return min(times)


def main() -> None:
    scripts = [Path(word) for word in sys.argv[1:]] or [PRESENT]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for script in scripts:
        print(script)
        for name, words in COMMANDS.items():
            wall, busy = fastest(script, words)
            print(f"  {name:<28}{wall:6.2f} s, processor {busy:5.2f} s")


if __name__ == "__main__":
    main()
