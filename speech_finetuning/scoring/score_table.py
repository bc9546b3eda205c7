"""The score table: the scores of several sets side by side, and what has got worse."""

from collections.abc import Callable, Sequence

from speech_finetuning.base.files import counted
from speech_finetuning.scoring.scores import (
    BEFORE,
    EVAL,
    PREDICT,
    PROMPTED,
    ROLES,
    TEST,
    UNTOUCHED_PROMPTED,
    UNTOUCHED_TEST,
    ZERO_SHOT,
    ErrorRates,
    Interval,
    NonspeechScores,
    PromptWords,
    Scores,
    read_scores,
)

GUARD_TITLE = "what must not get worse"
LONGEST_CHANGES = 56  # characters of two that stand on one line


def score_table(
    metrics: dict[str, float], set_names: list[str], guard_names: Sequence[str] = ()
) -> str:
    """Before, after and test side by side, in total and for each named set, with the WER's 95 %
    interval; below a line the change against the untouched model. Guard sets have a block of their
    own. 80 columns wide if names are short."""
    rows = [
        row
        for role in ROLES
        for set_name in ["", *set_names]
        for row in describe_lines(metrics, role, set_name, describe_changes)
    ]
    guard_rows = [
        row
        for name in guard_names
        for role in (ZERO_SHOT, EVAL)
        for row in describe_lines(metrics, role, name, describe_losses)
    ]
    width = max([len("before training"), *(len(title) for title, _ in rows + guard_rows)])
    header = "    WER    CER subst delet insert   rows loops %   95 % interval"
    lines = [f"{'':{width}}{header}", *(f"{title:{width}}{row}" for title, row in rows)]
    if guard_rows:
        lines += ["", GUARD_TITLE, *(f"{title:{width}}{row}" for title, row in guard_rows)]
    return "\n".join(lines)


def title_of(role: str, set_name: str, *, is_trained: bool) -> str:
    """'after training NAME'."""
    titles = {
        ZERO_SHOT: "before training",
        EVAL: "after training" if is_trained else "as it is",
        UNTOUCHED_PROMPTED: "prompts before",
        PROMPTED: "with prompts",
        UNTOUCHED_TEST: "test before",
        TEST: "test split",
        PREDICT: "predicted",
    }
    return f"{titles[role]} {set_name}".rstrip()


def describe_lines(
    metrics: dict[str, float],
    role: str,
    set_name: str,
    compare: Callable[[Scores, ErrorRates], list[tuple[str, str]]],
) -> list[tuple[str, str]]:
    """(title, figures) of the lines of one set; none if it was not scored. compare: describes the
    change against the untouched model."""
    scores = read_scores(metrics, role=role, set_name=set_name)
    if scores is None:
        return []
    rows: list[tuple[str, str]] = []
    title = title_of(role, set_name, is_trained="train_rows" in metrics)
    if scores.leading is not None:
        rows.append((title, describe_scores(scores)))
    if scores.nonspeech is not None:
        is_first = scores.leading is None
        rows.append((title if is_first else "", describe_nonspeech(scores.nonspeech)))
    if scores.leading is None:
        return rows
    if scores.translation is not None:
        found = scores.translation
        rows.append(("", f"  BLEU {found.bleu:.1f}   chrF {found.chrf:.1f}"))
    if scores.prompt_words is not None:
        rows.append(("", describe_prompt_words(scores.prompt_words)))
    before = read_scores(metrics, role=BEFORE.get(role, "none"), set_name=set_name)
    if before is not None and before.leading is not None:
        rows += compare(scores, before.leading)
    return rows


def describe_scores(scores: Scores) -> str:
    """The figures of one line of the table, of a set with error rates."""
    now = scores.leading
    assert now is not None
    text = f" {now.wer:6.2f} {now.cer:6.2f}"
    if scores.counts is not None:
        text += f" {scores.counts.substitutions:5d}"
        text += f" {scores.counts.deletions:5d}"
        text += f" {scores.counts.insertions:6d}"
    text += f" {scores.num_rows:6d} {scores.repetition_loops:7.1f}"
    if scores.interval is not None:
        text += f"   {scores.interval.low:.1f} to {scores.interval.high:.1f}"
    return text


def describe_nonspeech(found: NonspeechScores) -> str:
    """The line of what was written where nobody speaks."""
    return (
        f"  no speech, {found.minutes:.1f} min: {counted(found.invented_words, 'word')} invented, "
        f"{found.words_per_minute:.1f} a minute"
    )


def describe_prompt_words(found: PromptWords) -> str:
    """The line of words that stand in the prompts, whether or not the model has read these."""
    return (
        f"  {found.written:,} of {found.spoken:,} spoken words of the prompts written, "
        f"{found.recall:.1f} %"
    )


def describe_changes(scores: Scores, before: ErrorRates) -> list[tuple[str, str]]:
    """[("  change", "  WER -12.3 %   CER -4.5 %")]; long ones on a line each."""
    now = scores.leading
    assert now is not None
    wer = describe_change("WER", now.wer, before.wer, scores.wer_change)
    cer = describe_change("CER", now.cer, before.cer, scores.cer_change)
    if len(wer) + len(cer) < LONGEST_CHANGES:
        return [("  change", f"  {wer}   {cer}")]
    return [("  change", f"  {wer}"), ("", f"  {cer}")]


def describe_losses(scores: Scores, before: ErrorRates) -> list[tuple[str, str]]:
    """Of a guard set, a line for each rate: [("  change", "  WER +2.50 points (+1.10 to +4.00)")],
    which is what may be bounded."""
    now = scores.leading
    assert now is not None
    wer = describe_loss("WER", now.wer - before.wer, scores.wer_change)
    cer = describe_loss("CER", now.cer - before.cer, scores.cer_change)
    return [("  change", f"  {wer}"), ("", f"  {cer}")]


def describe_loss(name: str, points: float, interval: Interval | None) -> str:
    """'WER +2.50 points (+1.10 to +4.00)'. interval: of the change, if it is known."""
    text = f"{name} {points:+.2f} points"
    if interval is not None:
        text += f" ({interval.low:+.2f} to {interval.high:+.2f})"
    return text


def describe_change(name: str, now: float, before: float, interval: Interval | None) -> str:
    """'WER -12.3 %', or points where there was no error before.

    interval: of the change, if it is known; one that contains zero may be chance.
    """
    if interval is not None and interval.low <= 0 <= interval.high:
        return f"{name} no clear change ({interval.low:+.2f} to {interval.high:+.2f})"
    if before == 0:
        return f"{name} {now - before:+.2f} points"
    return f"{name} {100 * (now / before - 1):+.1f} %"


def is_clearly_higher(now: float, before: float, interval: Interval | None) -> bool:
    """Whether a rate has risen, and by more than chance if that is known."""
    return now > before and (interval is None or interval.low > 0)


def describe_regressions(metrics: dict[str, float], set_names: list[str]) -> list[str]:
    """One sentence for each figure that is worse than before training."""
    sentences = []
    for set_name in ["", *set_names]:
        before = read_scores(metrics, role=ZERO_SHOT, set_name=set_name)
        after = read_scores(metrics, role=EVAL, set_name=set_name)
        if before is None or after is None:
            continue
        figures: dict[str, tuple[float, float, Interval | None]] = {
            "empty outputs": (before.empty_outputs, after.empty_outputs, None),
            "repetition loops": (before.repetition_loops, after.repetition_loops, None),
            "cut outputs": (before.cut_outputs, after.cut_outputs, None),
        }
        if before.leading is not None and after.leading is not None:
            figures["wer"] = (before.leading.wer, after.leading.wer, after.wer_change)
            figures["cer"] = (before.leading.cer, after.leading.cer, after.cer_change)
        if before.nonspeech is not None and after.nonspeech is not None:
            was = before.nonspeech.words_per_minute
            now = after.nonspeech.words_per_minute
            if now > was:
                sentences.append(
                    f"{set_name or 'the model'} is worse than before training: {now:.1f} words "
                    f"invented in a minute without speech, were {was:.1f}."
                )
        for name, (earlier, later, interval) in figures.items():
            if is_clearly_higher(later, earlier, interval):
                sentences.append(
                    f"{set_name or 'the model'} is worse than before training: "
                    f"{name} {later:.2f} %, was {earlier:.2f} %."
                )
    return sentences
