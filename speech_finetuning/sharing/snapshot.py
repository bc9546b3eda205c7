"""What is uploaded: a folder with copies of the files that may be, and of nothing else."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speech_finetuning.base.files import json_line
from speech_finetuning.sharing.model_card import eval_result_files
from speech_finetuning.sharing.public import (
    Scrubber,
    local_data_folders,
    public_config,
    public_event_file,
    public_metrics,
    public_row_id,
    public_run_info,
    public_stream_state,
    public_trainer_state,
    public_worst_rows,
)

PROJECT = Path(__file__).parents[2]

# By name, never by folder: output_dir may be "./", with .git, .env and .venv in it.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_*.safetensors")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "normalizer.json")
CONFIGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "adapter_config.json",
)
METRICS = ("all_results.json", "scorecard.json")
EVENTS = ("runs/[A-Z]*/events.out.tfevents.*", "runs/data/events.out.tfevents.*")
PICTURES = ("curve.png",)
# The data may be private: with --push_predictions only.
PREDICTIONS = "predictions_*.jsonl"
WORST_ROWS = "worst_*.txt"
REPORT = "_report/report.html"  # built for everybody's eyes, see sharing/report_page.py
# From the project's folder, to run where it is downloaded.
TRAINING_CODE = (
    "run_speech_recognition_seq2seq_streaming.py",
    "speech_finetuning/__init__.py",
    "speech_finetuning/*/*.py",
    "speech_finetuning/*/*_template.*",
    "requirements.txt",
    "LICENSE",
)


def find_files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Regular files in a folder that match one of the patterns."""
    for pattern in patterns:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which takes no room and which rotation cannot touch; else a copy.
    Raises: OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def copy(source: Path, target: Path) -> None:
    """For files that are written in place later, which a link would show. Raises: OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(kw_only=True)
class Snapshot:
    """A folder that is filled with what everybody may see."""

    folder: Path
    scrubber: Scrubber
    data_folders: list[str]
    hub_names: list[str]

    def write(self, name: str | Path, text: str) -> None:
        """Writes a text file. Raises: OSError."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def write_json(self, name: str | Path, value: Any) -> None:
        text = json.dumps(self.scrubber.json(value), indent=2, ensure_ascii=False)
        self.write(name, f"{text}\n")

    def add_json(self, source: Path, name: str | Path, shown: Callable[[Any], Any]) -> None:
        """A JSON file as everybody may see it; nothing if it is not readable as JSON."""
        try:
            value = shown(read_json(source))
        except ValueError:  # half written by another program
            return
        self.write_json(name, value)

    def add_model(self, folder: Path) -> None:
        """Weights, configuration, tokenizer and processor. Raises: OSError."""
        for path in find_files(folder, WEIGHTS):
            link_or_copy(path, self.folder / path.name)
        for path in find_files(folder, VOCABULARIES):
            copy(path, self.folder / path.name)
        for path in find_files(folder, CONFIGS):
            self.add_json(path, path.name, public_config)

    def add_reports(self, output_dir: Path) -> None:
        """Metrics, run_info.json, the curve's picture and TensorBoard curves. Raises: OSError."""
        for path in find_files(output_dir, METRICS):
            self.add_json(path, path.name, public_metrics)
        for path in find_files(output_dir, ("run_info.json",)):
            self.add_json(path, path.name, public_run_info)
        for path in find_files(output_dir, PICTURES):
            copy(path, self.folder / path.name)
        for path in find_files(output_dir, EVENTS):
            copy(path, self.folder / public_event_file(path))

    def add_transcripts(self, output_dir: Path) -> None:
        """Predictions, the worst ones and the report page, with ids that name no local folder. Raises: OSError."""
        for path in find_files(output_dir, (PREDICTIONS,)):
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            shown = [row | {"id": public_row_id(row["id"], self.data_folders)} for row in rows]
            self.write(path.name, "".join(map(json_line, self.scrubber.json(shown))))
        for path in find_files(output_dir, (WORST_ROWS,)):
            text = public_worst_rows(path.read_text(encoding="utf-8"), self.data_folders)
            self.write(path.name, self.scrubber.text(text))
        for path in find_files(output_dir, (REPORT,)):
            copy(path, self.folder / path.name)

    def add_checkpoint(self, checkpoint: Path, name: str) -> None:
        """A whole checkpoint, from which another machine continues. Raises: OSError."""
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            place = Path(name, path.relative_to(checkpoint))
            if path.name == "training_args.bin":  # a pickle with local paths, which nobody needs
                continue
            if path.name == "trainer_state.json":
                self.add_json(path, place, public_trainer_state)
            elif path.name == "stream_state.json":
                self.add_json(path, place, self.public_stream_state)
            elif path.suffix == ".json" and path.name not in VOCABULARIES:
                self.add_json(path, place, public_config)
            else:
                link_or_copy(path, self.folder / place)

    def public_stream_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return public_stream_state(state, self.hub_names, self.data_folders)

    def add_training_code(self) -> None:
        """The script and the package, to run where they are downloaded. Raises: OSError."""
        for path in find_files(PROJECT, TRAINING_CODE):
            copy(path, self.folder / "training_code" / path.relative_to(PROJECT))


def write_snapshot(
    folder: Path,
    *,
    model_folder: Path,
    output_dir: Path,
    card: str,
    checkpoint: Path | None,
    checkpoint_name: str | None,
    with_transcripts: bool,
) -> None:
    """Fills a folder with all that is uploaded of a run. card: the text of README.md.
    checkpoint_name: its folder on the Hub, None for its own name. Raises: OSError."""
    record = output_dir / "run_info.json"
    info = read_json(record) if record.is_file() else {}
    snapshot = Snapshot(
        folder=folder,
        scrubber=Scrubber.of(info),
        data_folders=local_data_folders(info),
        hub_names=info.get("hub_names", []),
    )
    snapshot.add_model(model_folder)
    snapshot.add_reports(output_dir)
    snapshot.add_training_code()
    shown_card = snapshot.scrubber.text(card)
    snapshot.write("README.md", shown_card)
    for name, text in eval_result_files(shown_card).items():
        snapshot.write(name, text)
    if with_transcripts:
        snapshot.add_transcripts(output_dir)
    if checkpoint is not None:
        snapshot.add_checkpoint(checkpoint, checkpoint_name or checkpoint.name)
