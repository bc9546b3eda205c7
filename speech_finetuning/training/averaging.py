"""Better weights from the same run: averages of checkpoints, shares of the untouched model.

The last checkpoints of a training differ by the noise of its last steps, and their mean is often
better than any of them (Polyak and Juditsky, 1992; usual in speech recognition since icefall and
ESPnet). A mean with the model before training keeps what fine-tuning would forget (WiSE-FT:
Wortsman et al., CVPR 2022). Both cost evaluations, not training: each candidate is scored, and the
best one is saved.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import safe_open

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import write_json
from speech_finetuning.base.network import retry_on_network_error
from speech_finetuning.model.adapters import adapted_layers
from speech_finetuning.scoring.scores import EVAL
from speech_finetuning.training.checkpoints import is_complete, step_of
from speech_finetuning.training.reload_check import check_reload
from speech_finetuning.training.stages import (
    adopt_scores,
    drop_scores,
    save_final_model,
    score_aside,
)
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------- weights


class Weights(Protocol):
    """The weights of a plain model by name, of which one tensor at a time is in memory."""

    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class SavedWeights:
    """Those of a folder's model.safetensors, in which adapters may be apart: then they are added.

    adapter_scale: by which the product of an adapter's two matrices is multiplied.
    """

    def __init__(self, folder: Path, adapter_scale: float = 1.0) -> None:
        self.file: Any = safe_open(folder / "model.safetensors", framework="pt")
        self.keys = set(self.file.keys())
        self.adapter_scale = adapter_scale

    def names(self) -> Iterable[str]:
        return (plain_name(key) for key in sorted(self.keys) if ".lora_" not in key)

    def tensor(self, name: str) -> torch.Tensor:
        if name in self.keys:
            return self.file.get_tensor(name)
        layer, _, kind = name.rpartition(".")
        tensor = self.file.get_tensor(f"{layer}.base_layer.{kind}")
        if kind != "weight":
            return tensor
        narrowing = self.file.get_tensor(f"{layer}.lora_A.default.weight")
        widening = self.file.get_tensor(f"{layer}.lora_B.default.weight")
        return tensor + (widening @ narrowing) * self.adapter_scale


@dataclass(frozen=True, kw_only=True)
class MeanWeights:
    """The mean of several models, in float32."""

    models: Sequence[Weights]

    def names(self) -> Iterable[str]:
        return self.models[0].names()

    def tensor(self, name: str) -> torch.Tensor:
        total = self.models[0].tensor(name).float()
        for model in self.models[1:]:
            total = total + model.tensor(name).float()
        return total / len(self.models)


@dataclass(frozen=True, kw_only=True)
class BlendedWeights:
    """(1 - base_share) of a model and base_share of another one, in float32."""

    model: Weights
    base: Mapping[str, torch.Tensor]
    base_share: float

    def names(self) -> Iterable[str]:
        return self.model.names()

    def tensor(self, name: str) -> torch.Tensor:
        # lerp is exact at both ends: a share of 0 is the model, one of 1 the base.
        base = self.base[name].float()
        return torch.lerp(self.model.tensor(name).float(), base, self.base_share)


def plain_name(key: str) -> str:
    """The name of a weight in a model without adapters."""
    return key.replace(".base_layer.", ".")


@torch.no_grad()
def place_weights(weights: Weights, model: torch.nn.Module) -> None:
    """Gives a model these weights in place; its adapters, if any, become part of them."""
    targets = {
        plain_name(key): tensor for key, tensor in model.state_dict().items() if ".lora_" not in key
    }
    for name in weights.names():
        targets[name].copy_(weights.tensor(name))
    for layer in adapted_layers(model).values():
        layer.lora_B["default"].weight.zero_()


# ----------------------------------------------------------------------------------------- choice


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """What is tried beside the trained weights."""

    num_checkpoints: int  # that are averaged; 1: none
    base_shares: tuple[float, ...]
    load_base: Callable[[], transformers.WhisperForConditionalGeneration]  # the untouched model

    @classmethod
    def of(
        cls,
        model_args: Any,
        data_args: Any,
        training_args: transformers.Seq2SeqTrainingArguments,
    ) -> "WeightOptions":
        """What the flags say; model_args, data_args: the script's. Raises: UserError where no
        process has the whole model."""
        is_split = training_args.fsdp or training_args.deepspeed
        if is_split and (model_args.average_checkpoints > 1 or model_args.base_weight_shares):
            raise UserError(
                "--average_checkpoints and --base_weight_shares need whole models. Leave out --fsdp "
                "and --deepspeed, or average afterwards: start the finished run again without them."
            )
        name = model_args.model_name_or_path
        load = functools.partial(
            transformers.WhisperForConditionalGeneration.from_pretrained,
            name,
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            dtype=torch.float32,
        )
        return cls(
            num_checkpoints=model_args.average_checkpoints,
            base_shares=tuple(model_args.base_weight_shares),
            load_base=functools.partial(
                retry_on_network_error,
                load,
                task=f"loading {name}",
                limit_in_seconds=data_args.max_network_wait_in_seconds,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights that have been scored."""

    title: str
    weights: Weights
    metrics: dict[str, float]  # as of an evaluation
    label: str  # of its files: predictions_<label>.jsonl


class WeightChoice:
    """Scores candidates one after the other; `kept` is the best so far. The model always has the
    weights of the last one that was scored."""

    def __init__(self, trainer: SpeechTrainer, metrics: dict[str, float]) -> None:
        self.trainer = trainer
        metric = trainer.args.metric_for_best_model or "wer"
        self.metric = f"eval_{metric.removeprefix('eval_')}"
        trained = SavedWeights(trainer.output_dir())
        self.kept = Candidate(title="trained", weights=trained, metrics=metrics, label="eval")
        self.candidates = [self.kept]

    def try_weights(self, title: str, weights: Weights, label: str) -> None:
        """Scores weights, and keeps them if they are better; if equal, the earlier ones stay."""
        place_weights(weights, self.trainer.model)
        metrics = score_aside(self.trainer, label)
        candidate = Candidate(title=title, weights=weights, metrics=metrics, label=label)
        self.candidates.append(candidate)
        if self.is_better(candidate, self.kept):
            self.kept = candidate

    def is_better(self, candidate: Candidate, other: Candidate) -> bool:
        """By the metric, among weights that have not lost more on a guard than they may: any of
        these is better than all others."""
        bound = self.trainer.guard_bound
        if bound.broken_by(candidate.metrics):
            return False
        if bound.broken_by(other.metrics):
            return True
        value = candidate.metrics[self.metric]
        best = other.metrics[self.metric]
        return value > best if self.trainer.args.greater_is_better else value < best

    def save(self) -> None:
        """Has the best weights in the model and in output_dir, and their transcripts under the
        names of an evaluation's."""
        place_weights(self.kept.weights, self.trainer.model)
        if self.kept is not self.candidates[0]:
            save_final_model(self.trainer)
            if self.trainer.args.world_size == 1:
                check_reload(self.trainer, self.trainer.output_dir())
        for candidate in self.candidates[1:]:
            if candidate is self.kept:
                adopt_scores(self.trainer, candidate.label)
            else:
                drop_scores(self.trainer, candidate.label)
        if self.trainer.is_world_process_zero():
            write_json(self.trainer.output_dir() / "weights.json", self.record())

    def record(self) -> list[dict[str, Any]]:
        """All candidates and their scores, for weights.json."""
        return [
            {
                "weights": candidate.title,
                "is_kept": candidate is self.kept,
                "scores": candidate.metrics,
            }
            for candidate in self.candidates
        ]

    def table(self) -> str:
        """A line for each candidate; guards have a column each, of the rate that is bounded."""
        bound = self.trainer.guard_bound
        names = "".join(f" {name[:12]:>12}" for name in bound.rates)
        lines = [f"{'':36s}     WER      CER     loss{names}"]
        for candidate in self.candidates:
            scores = candidate.metrics
            line = f"{candidate.title:36s}{scores['eval_wer']:8.2f} {scores['eval_cer']:8.2f}"
            line += f" {scores['eval_loss']:8.4f}"
            of_guards = bound.rates_in(scores, EVAL)
            for name in bound.rates:
                line += f" {of_guards[name]:12.2f}" if name in of_guards else f" {'':12}"
            if bound.broken_by(scores):
                line += "   lost too much"
            lines.append(f"{line}   saved" if candidate is self.kept else line)
        return "\n".join(lines)


def choose_weights(
    trainer: SpeechTrainer, options: WeightOptions, metrics: dict[str, float]
) -> dict[str, float]:
    """Tries averages, then shares of the untouched model, and saves what scores best by
    --metric_for_best_model (WER unless that is given), within --max_guard_loss_in_points.

    metrics: those of the trained weights, which are saved. Returns the scores of what is saved now.
    """
    if options.num_checkpoints == 1 and not any(options.base_shares):
        warn_of_lost_guards(trainer, metrics, options.base_shares)
        return metrics
    trainer.accelerator.wait_for_everyone()  # the main process may still be writing the weights
    choice = WeightChoice(trainer, metrics)
    if options.num_checkpoints > 1:
        try_average(choice, options.num_checkpoints)
    if any(options.base_shares):
        trained = choice.kept
        base = options.load_base().state_dict()
        for share in sorted(set(options.base_shares) - {0.0}):
            title = f"{100 * share:g} % of the untouched model"
            weights = BlendedWeights(model=trained.weights, base=base, base_share=share)
            choice.try_weights(title, weights, f"eval_share_{share:g}")
    choice.save()
    trainer.card_writer.weights_table = choice.table()
    logger.info("weights\n%s", choice.table())
    warn_of_lost_guards(trainer, choice.kept.metrics, options.base_shares)
    return choice.kept.metrics


def warn_of_lost_guards(
    trainer: SpeechTrainer, metrics: dict[str, float], tried_shares: Sequence[float]
) -> None:
    """Warns if what is saved has lost more on a guard than it may: there was nothing within the
    bound. metrics: of the weights that are saved; tried_shares: of the untouched model."""
    bound = trainer.guard_bound
    broken = bound.broken_by(metrics)
    if broken:
        # The whole untouched model is within the bound: the next try lies between.
        next_share = f"{(1 + max(tried_shares)) / 2:g}" if any(tried_shares) else "0.3 0.6 0.9"
        logger.warning(
            "the saved weights are beyond --max_guard_loss_in_points %g: %s. None that were scored "
            "are within it. Start the same command again with --base_weight_shares %s, which trains "
            "nothing.",
            bound.max_loss_in_points,
            bound.describe(broken),
            next_share,
        )


def try_average(choice: WeightChoice, num_checkpoints: int) -> None:
    """The mean of the last complete checkpoints."""
    trainer = choice.trainer
    folders = last_checkpoints(trainer.output_dir(), num_checkpoints)
    if len(folders) < num_checkpoints:
        logger.warning(
            "--average_checkpoints %d: there are only %d complete ones in %s.",
            num_checkpoints,
            len(folders),
            trainer.output_dir(),
        )
    if len(folders) < 2:
        return
    layers = adapted_layers(trainer.model).values()
    scale = next((layer.scaling["default"] for layer in layers), 1.0)
    models = [SavedWeights(folder, scale) for folder in folders]
    steps = ", ".join(str(step_of(folder)) for folder in folders)
    choice.try_weights(f"average of steps {steps}", MeanWeights(models=models), "eval_average")


def last_checkpoints(output_dir: Path, count: int) -> list[Path]:
    """The newest complete ones, the oldest of them first."""
    folders = sorted(output_dir.glob("checkpoint-*"), key=step_of)
    return [folder for folder in folders if is_complete(folder)][-count:]
