"""What a run says of itself while it goes on: its lines, at most 80 columns wide."""

import math
from dataclasses import dataclass

from speech_finetuning.base.files import counted
from speech_finetuning.scoring.score_table import describe_loss
from speech_finetuning.scoring.scores import (
    EVAL,
    PREDICT,
    PROMPTED,
    TEST,
    UNTOUCHED_PROMPTED,
    UNTOUCHED_TEST,
    ZERO_SHOT,
    Scores,
)

TITLES = {
    ZERO_SHOT: "score before training",
    UNTOUCHED_PROMPTED: "score with prompts before training",
    PROMPTED: "score with prompts",
    UNTOUCHED_TEST: "score of the test split before training",
    TEST: "score of the test split",
    PREDICT: "transcribed",
}
STEP_HEADER = "    step     loss      rate    pass  clips/s  waiting       left"
INDENT = "    "
WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What a score is compared with, of the same error rate."""

    last: float  # of the evaluation before
    best: float
    step_of_best: int  # 0: before training


def describe_time(seconds: float) -> str:
    """'0.4 s', '45 s', '4:05 min', '1:40 h'; an estimate that is none yet is '-'."""
    if not math.isfinite(seconds):
        return "-"
    if 0.05 <= seconds < 9.95:
        return f"{seconds:.1f} s"
    # Rounded once, to what is shown: 119.7 s are 2:00 min, 3599.7 s are 1:00 h.
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"


def describe_rate(rate: float) -> str:
    """'1.0e-5'; at the end of the schedule '0'."""
    if not rate or not math.isfinite(rate):
        return f"{rate:.0f}"
    mantissa, _, exponent = f"{rate:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def describe_step(step: int, figures: dict[str, float], seconds_left: float) -> str:
    """The line of a logging step, under STEP_HEADER. figures: as they are logged."""
    passes = [value for name, value in figures.items() if name.split("_")[0] == "pass"]
    rate = describe_rate(figures["learning_rate"])
    loss = f"{figures['loss']:.4f}"
    waiting = f"{100 * figures['data_wait_fraction']:.0f} %"
    return (
        f"{step:>8}{loss:>9}{rate:>10}{max(passes):>8.2f}{figures['samples_per_second']:>9.1f}"
        f"{waiting:>9}{describe_time(seconds_left):>11}"
    )


def describe_scores_at(
    role: str,
    step: int,
    scores: Scores,
    *,
    lead: str,
    earlier: Earlier | None,
    seconds: float,
) -> list[str]:
    """The block of an evaluation, without its pair. lead: "wer", or "cer" where words are not
    separated by spaces. earlier: None for the first score."""
    title = describe_role(role, step)
    done = f"{counted(scores.num_rows, 'row')} in {describe_time(seconds)}"
    rates = scores.leading
    if rates is None:
        found = "   ".join(describe_faults(scores)) or "without references"
        return [f"{title}   {done}, {found}"]
    now = rates.cer if lead == "cer" else rates.wer
    compared = "" if earlier is None or role != EVAL else f" ({describe_change(now, earlier)})"
    wer = f"WER {rates.wer:.1f} %"
    cer = f"CER {rates.cer:.1f} %"
    first, second = (cer, wer) if lead == "cer" else (wer, cer)
    lines = [f"{title}   {first}{compared}   {second}"]
    figures = [done]
    if scores.interval is not None:
        interval = f"{scores.interval.low:.1f} to {scores.interval.high:.1f}"
        figures.insert(0, f"95 % interval {interval}")
    faults = describe_faults(scores)
    if len(INDENT + "   ".join(figures + faults)) <= WIDTH:
        return [*lines, INDENT + "   ".join(figures + faults)]
    return [*lines, INDENT + "   ".join(figures), INDENT + "   ".join(faults)]


def describe_role(role: str, step: int) -> str:
    """What is scored; 'eval_share_0.3' and the like are weights that are tried after training."""
    if role == EVAL and step:
        return f"score at {step}"
    if role.startswith(f"{EVAL}_"):
        return f"score of {role.removeprefix(f'{EVAL}_').replace('_', ' ')}"
    return TITLES.get(role, "score")


def describe_change(now: float, earlier: Earlier) -> str:
    """'was 57.0, best so far', or 'was 42.0, best 41.2 at 400'."""
    if now < earlier.best:
        return f"was {earlier.last:.1f}, best so far"
    at = f"at {earlier.step_of_best}" if earlier.step_of_best else "before training"
    return f"was {earlier.last:.1f}, best {earlier.best:.1f} {at}"


def describe_faults(scores: Scores) -> list[str]:
    """Shares of transcripts that no error rate shows, where there are any."""
    shares = {
        "empty": scores.empty_outputs,
        "loops": scores.repetition_loops,
        "cut": scores.cut_outputs,
    }
    faults = [f"{name} {share:.1f} %" for name, share in shares.items() if share > 0]
    if scores.nonspeech is not None:
        faults.append(f"invented {scores.nonspeech.words_per_minute:.1f} words/min")
    if scores.prompt_words is not None:
        found = scores.prompt_words
        faults.append(f"{found.recall:.0f} % of {found.spoken:,} words of prompts")
    return faults


def describe_guard(scores: Scores, *, rate_name: str, before: float | None) -> str:
    """The line of a set that must not get worse. rate_name: "wer", or "cer" where words are not
    separated by spaces; before: the untouched model's."""
    line = f"{describe_set(scores)}, a guard"
    if before is None or scores.leading is None:
        return line
    is_cer = rate_name == "cer"
    points = (scores.leading.cer if is_cer else scores.leading.wer) - before
    interval = scores.cer_change if is_cer else scores.wer_change
    return f"{line}\n{INDENT}{'':<16}   {describe_loss(rate_name.upper(), points, interval)}"


def describe_set(scores: Scores) -> str:
    """The line of one set of several."""
    rates = scores.leading
    text = f"{INDENT}{scores.set_name:<16}"
    if rates is not None:
        text += f"   WER {rates.wer:.1f} %   CER {rates.cer:.1f} %"
    if scores.nonspeech is not None:
        text += f"   invented {scores.nonspeech.words_per_minute:.1f} words/min"
    return f"{text}   {counted(scores.num_rows, 'row')}"
