"""Guard sets: what must not get worse, and by how much it may."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.text import UNSPACED_LANGUAGES
from speech_finetuning.scoring.normalization import ScoringTarget
from speech_finetuning.scoring.scores import EVAL, ZERO_SHOT, metric_prefix

DECIMALS = 6  # of points: 16.1 - 14.1 is more than 2 in floating point


@dataclass(kw_only=True)
class GuardBound:
    """How far the error rates of guard sets may rise above the untouched model's."""

    rates: dict[str, str]  # by the set's name: "wer", or "cer" where words are not separated
    max_loss_in_points: float | None  # None: as far as they do
    untouched: dict[str, float] = field(default_factory=dict)  # rates in percent, by name

    @classmethod
    def of(
        cls, targets: Mapping[str, ScoringTarget], max_loss_in_points: float | None
    ) -> "GuardBound":
        """For the guards among these sets."""
        rates = {
            name: "cer" if target.text_language in UNSPACED_LANGUAGES else "wer"
            for name, target in targets.items()
            if target.is_guard
        }
        return cls(rates=rates, max_loss_in_points=max_loss_in_points)

    def note_untouched(self, metrics: Mapping[str, float]) -> None:
        """Takes the rates of the untouched model. metrics: as they are logged of `zero_shot`.
        Raises: UserError for a guard without an error rate, which cannot be bounded."""
        self.untouched = self.rates_in(metrics, ZERO_SHOT)
        unknown = [name for name in self.rates if name not in self.untouched]
        if unknown and self.max_loss_in_points is not None:
            raise UserError(
                f"--max_guard_loss_in_points: no row of {' and '.join(unknown)} has a text, so that "
                "there is no WER to bound. Leave out the flag, or guard: true of that entry."
            )

    def rates_in(self, metrics: Mapping[str, float], role: str) -> dict[str, float]:
        """The rate of each guard, in percent, by its name."""
        names = {name: f"{metric_prefix(role, name)}{rate}" for name, rate in self.rates.items()}
        return {name: metrics[metric] for name, metric in names.items() if metric in metrics}

    def losses(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By how many points each guard is above the untouched model, as far as both are known.
        metrics: as they are logged of `eval`."""
        return {
            name: round(rate - self.untouched[name], DECIMALS)
            for name, rate in self.rates_in(metrics, EVAL).items()
            if name in self.untouched
        }

    def broken_by(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The losses that are larger than they may be; empty if all is within the bound."""
        limit = self.max_loss_in_points
        if limit is None:
            return {}
        return {name: loss for name, loss in self.losses(metrics).items() if loss > limit}

    def describe(self, losses: Mapping[str, float]) -> str:
        """'WER of en +2.50 points' of each."""
        return ", ".join(
            f"{self.rates[name].upper()} of {name} {loss:+.2f} points"
            for name, loss in losses.items()
        )
