"""How many transcripts of other clips `bash run.sh check` finds, without a model and with one.

    bash run.sh learn
    python benchmarks/suspects.py --model whisper-learn/output --seeds 1 2 3

Synthetic speech, as `bash run.sh learn` makes it, of which a tenth of the rows have got the
transcript of another such row. Precision: the share of suspects that are such rows; recall: the
share of such rows that are suspects.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from speech_finetuning.cli.demonstration import make_rows

SCRIPT = Path(__file__).parents[1] / "run_speech_recognition_seq2seq_streaming.py"
NUM_ROWS = 400
SHARE_SWAPPED = 0.1


def write_data(folder: Path, seed: int) -> set[str]:
    """Returns the names of the clips whose transcript is another one's; all of these differ."""
    rows = make_rows(NUM_ROWS, seed=[7, seed])  # type: ignore[arg-type]
    texts = [text for _, text in rows]
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(NUM_ROWS)[: round(SHARE_SWAPPED * NUM_ROWS)].tolist()
    turned = [*chosen[1:], chosen[0]]
    written = dict(zip(chosen, (texts[place] for place in turned), strict=True))
    folder.mkdir(parents=True)
    with open(folder / "train.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "sentence"])
        for number, (data, text) in enumerate(rows):
            (folder / f"{number}.flac").write_bytes(data)
            writer.writerow([f"{number}.flac", written.get(number, text)])
    return {f"{place}.flac" for place in chosen if written[place] != texts[place]}


def suspects_of(folder: Path, output_dir: Path, flags: list[str]) -> set[str]:
    """Names of clips."""
    words = [os.environ.get("PYTHON_EXEC", sys.executable), str(SCRIPT), "--check_data"]
    words += ["--dataset_name", str(folder), "--output_dir", str(output_dir), *flags]
    subprocess.run(words, check=True, capture_output=True)
    lines = (output_dir / "suspects.jsonl").read_text(encoding="utf-8").splitlines()
    return {Path(json.loads(line)["row"]).name for line in lines}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    print("| check | seed | swapped | suspects | precision | recall |")
    print("|---|---|---|---|---|---|")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as place:
            swapped = write_data(Path(place) / "speech", seed)
            kinds = {
                "without a model": [],
                "with a model": ["--model_name_or_path", options.model, "--language", "es"],
            }
            for kind, flags in kinds.items():
                found = suspects_of(Path(place) / "speech", Path(place) / kind, flags)
                right = len(found & swapped)
                precision = f"{100 * right / len(found):.0f} %" if found else "-"
                print(
                    f"| {kind} | {seed} | {len(swapped)} | {len(found)} | {precision} | "
                    f"{100 * right / len(swapped):.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
