"""The model's README.md."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.modelcard import make_markdown_table

from speech_finetuning.base.files import counted
from speech_finetuning.scoring.score_table import score_table
from speech_finetuning.scoring.scores import last_scores
from speech_finetuning.sharing.examples import WHY_PADDED, faster_whisper_example
from speech_finetuning.sharing.public import LOCAL_DATA, LOCAL_MODEL, public_run_info
from speech_finetuning.sharing.report_charts import readable_hours
from speech_finetuning.sharing.run_info import names_of_guards, names_of_sets
from speech_finetuning.training.phases import changed_settings

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TASK = "automatic-speech-recognition"  # as the Hub calls it
RESULTS = {"wer_norm": "WER, normalised", "wer_ortho": "WER, as written", "cer": "CER"}
CURVES = {"eval_loss": "evaluation loss", "eval_wer": "WER %", "eval_cer": "CER %"}
SETTINGS = (
    "lora_rank",
    "train_window",
    "pack_utterances",
    "timestamp_probability",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "fp16",
    "bf16",
    "seed",
)


def curve_table(history: list[dict[str, Any]]) -> str:
    """Markdown: step, training loss, evaluation loss, WER and CER in percent of every evaluation,
    by step; nothing before the first. history: the trainer's log."""
    rows: dict[int, dict[str, Any]] = {}
    training_loss = ""  # not logged yet, or by another start of the run
    # A finished run that is scored anew has the step of its best weights at the end.
    for entry in sorted(history, key=step_of_entry):
        if "loss" in entry:
            training_loss = f"{entry['loss']:.4g}"
        if "eval_wer" in entry:
            row = {"step": entry["step"], "training loss": training_loss}
            for name, title in CURVES.items():
                row[title] = f"{entry[name]:.4g}"
            rows[entry["step"]] = row
    return make_markdown_table(list(rows.values()))


def step_of_entry(entry: dict[str, Any]) -> int:
    return entry["step"]


def eval_results(
    data: dict[str, list[dict[str, Any]]], metrics: dict[str, float]
) -> list[huggingface_hub.EvalResult]:
    """One result for each scored set and kind of error rate. data: the sets of run_info.json."""
    results = []
    for role, sources in data.items():
        for source in sources if role != "train" else ():
            prefix = f"{role}_{source['record']}" if len(sources) > 1 else role
            if role == "guard":  # scored with the evaluation set, by name
                prefix = f"eval_{source['record']}"
            for kind, title in RESULTS.items():
                value = metrics.get(f"{prefix}_{kind}")
                if value is None:
                    continue
                result = huggingface_hub.EvalResult(
                    task_type=TASK,
                    dataset_type=source["name"],
                    dataset_name=source["name"],
                    dataset_config=source["config_name"] or "default",
                    dataset_split=source["split"],
                    dataset_revision=source["revision"],
                    metric_type=kind.split("_")[0],
                    metric_name=title,
                    metric_value=round(value, 2),
                )
                results.append(result)
    return results


def eval_result_files(card: str) -> dict[str, str]:
    """{name: text} of .eval_results/*.yaml, in which the Hub reads scores of a data set, as the
    card's model index has them: normalised WER on data sets of the Hub, one file for each.

    Source: huggingface.co/docs/hub/eval-results; `huggingface_hub.parse_eval_result_entries` reads
    them back.
    """
    entries: dict[str, list[huggingface_hub.EvalResultEntry]] = {}
    for result in getattr(huggingface_hub.ModelCard(card).data, "eval_results", None) or []:
        name = result.dataset_type
        if result.metric_name != RESULTS["wer_norm"] or name == LOCAL_DATA:
            continue
        with contextlib.suppress(HFValidationError):
            validate_repo_id(name)
            entry = huggingface_hub.EvalResultEntry(
                dataset_id=name,
                task_id=f"{result.dataset_config}_{result.dataset_split}",
                value=result.metric_value,
                dataset_revision=result.dataset_revision,
                notes="WER in percent of text normalised as Whisper's authors do",
            )
            entries.setdefault(name, []).append(entry)
    return {
        f".eval_results/{name.replace('/', '--')}.yaml": yaml.safe_dump(
            huggingface_hub.eval_result_entries_to_yaml(found), sort_keys=False, allow_unicode=True
        )
        for name, found in entries.items()
    }


def describe_training(metrics: dict[str, float]) -> str:
    """How much the model was trained on, and for how long."""
    num_rows = int(metrics.get("train_rows", 0))
    if num_rows == 0:
        return "none by this run"
    num_rejected = int(metrics.get("train_rejected", 0))
    num_nonspeech = int(metrics.get("train_nonspeech_rows", 0))
    nonspeech = f", {num_nonspeech:,} made into noise or silence" if num_nonspeech else ""
    audio = readable_hours(metrics.get("train_audio_hours", 0.0))
    time = readable_hours(metrics.get("train_hours", 0.0))
    return (
        f"{counted(num_rows, 'row')}, repeats counted ({num_rejected:,} of them rejected{nonspeech}), with "
        f"{audio} of speech, in {time}"
    )


def describe_settings(arguments: dict[str, Any]) -> str:
    """The flags that matter most, those left out that are not set."""
    return ", ".join(
        f"{name} {arguments[name]}"
        for name in SETTINGS
        if arguments[name] is not None and arguments[name] is not False
    )


def describe_phases(phases: list[dict[str, Any]]) -> list[str]:
    """'from step 600 on: --learning_rate 0.001, --max_steps 900' of each, with what differs between
    them; empty for a run that was trained with the same flags throughout."""
    if len(phases) < 2:
        return []
    names = changed_settings(phases)
    lines = []
    for phase in phases:
        flags = [f"{name} {phase['settings'].get(name, 'not known')}" for name in names]
        lines.append(f"from step {phase['from_step']} on: {', '.join(flags)}")
    return lines


def names_of_data(info: dict[str, Any]) -> set[str]:
    """The data sets that the model is for: guards are of what it could do before."""
    return {
        source["name"]
        for role, sources in info["data"].items()
        for source in sources
        if role != "guard"
    }


@dataclass(kw_only=True)
class CardWriter:
    """Writes the model card at every save, from what is known by then."""

    run_info: dict[str, Any]
    languages: list[str]  # codes, 'en' for a model that knows English only
    model_name: str
    has_training_code: bool  # it is uploaded beside the card
    curve_picture: str | None = None  # the file of the learning curve, once there is one
    early_metrics: dict[str, float] = field(default_factory=dict)  # known before training
    weights_table: str = ""  # what was tried beside the trained weights, see training.averaging

    def __post_init__(self) -> None:
        self.info = public_run_info(self.run_info)  # the card has no other source

    def during_training(self, history: list[dict[str, Any]], totals: dict[str, float]) -> str:
        """The card of a model that is still trained. totals: what it was trained on so far."""
        return self.write(self.early_metrics | last_scores(history) | totals, history)

    def write(self, metrics: dict[str, float], history: list[dict[str, Any]]) -> str:
        """The text of README.md. history: the trainer's log."""
        info = self.info
        base_model = info["identity"]["model_name_or_path"]
        is_local_model = base_model == LOCAL_MODEL
        names = names_of_data(info)
        language = self.languages[0] if len(self.languages) == 1 else None
        versions = info["versions"] | ({"git": info["git"]} if info["git"] else {})
        card = huggingface_hub.ModelCard.from_template(
            self.metadata(metrics),
            template_path=str(TEMPLATE),
            title=self.model_name,
            base="A local model" if is_local_model else Path(base_model).name,
            data=", ".join(sorted(Path(name).name for name in names)),
            scores=score_table(metrics, names_of_sets(info), names_of_guards(info)),
            has_guards=bool(names_of_guards(info)),
            curve=curve_table(history),
            curve_picture=self.curve_picture,
            faster_whisper=faster_whisper_example("whisper-ct2", language),
            why_padded=WHY_PADDED,
            weights=self.weights_table,
            training=describe_training(metrics),
            settings=describe_settings(info["arguments"]),
            hardware=", ".join(info["machine"]["gpus"]) or f"{info['machine']['cores']} CPU cores",
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            has_training_code=self.has_training_code,
            phases=describe_phases(info["phases"]),
            commands=[phase["command"] for phase in info["phases"][:-1] if phase["command"]],
            command=info["command"],
        )
        return str(card)

    def metadata(self, metrics: dict[str, float]) -> huggingface_hub.ModelCardData:
        """What the Hub reads: the card's YAML."""
        base_model = self.info["identity"]["model_name_or_path"]
        names = names_of_data(self.info)
        return huggingface_hub.ModelCardData(
            language=self.languages[0] if len(self.languages) == 1 else self.languages,
            license=self.info["base_licence"],
            library_name="transformers",
            pipeline_tag=TASK,
            base_model=None if base_model == LOCAL_MODEL else base_model,
            datasets=sorted(names - {LOCAL_DATA}) or None,
            metrics=["wer", "cer"],
            tags=["whisper", "speech", "generated_from_trainer", *self.languages],
            model_name=self.model_name,
            eval_results=eval_results(self.info["data"], metrics) or None,
        )
