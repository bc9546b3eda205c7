"""The score table: the scores of several sets side by side, and what has got worse."""

from speech_finetuning.scoring.scores import (
    BEFORE,
    EVAL,
    PREDICT,
    ROLES,
    TEST,
    UNTOUCHED_TEST,
    ZERO_SHOT,
    Interval,
    Scores,
    read_scores,
)


def score_table(metrics: dict[str, float], set_names: list[str]) -> str:
    """Before, after and test side by side, in total and for each named set.

    At the end of a line stand the WER's 95 % interval and the change against the untouched model.
    """
    titles = {
        ZERO_SHOT: "before training",
        EVAL: "after training" if "train_rows" in metrics else "as it is",
        UNTOUCHED_TEST: "test before",
        TEST: "test split",
        PREDICT: "predicted",
    }
    lines = [f"{'':24s}     WER      CER   subst   delet  insert    rows   loops %   95 % interval"]
    for role in ROLES:
        for set_name in ["", *set_names]:
            scores = read_scores(metrics, role=role, set_name=set_name)
            if scores is None or scores.leading is None:
                continue
            before = None
            if role in BEFORE:
                before = read_scores(metrics, role=BEFORE[role], set_name=set_name)
            title = f"{titles[role]} {set_name}"
            lines.append(f"{title:24s}{describe_scores(scores, before)}")
    return "\n".join(lines)


def describe_scores(scores: Scores, before: Scores | None) -> str:
    """The figures of one line of the table, of a set with error rates."""
    now = scores.leading
    assert now is not None
    text = f"{now.wer:8.2f} {now.cer:8.2f}"
    if scores.counts is not None:
        text += f"{scores.counts.substitutions:8d}"
        text += f"{scores.counts.deletions:8d}"
        text += f"{scores.counts.insertions:8d}"
    text += f"{scores.num_rows:8d}{scores.repetition_loops:10.1f}"
    if scores.interval is not None:
        text += f"   {scores.interval.low:.2f} to {scores.interval.high:.2f}"
    if scores.translation is not None:
        text += f"  BLEU {scores.translation.bleu:.1f}  chrF {scores.translation.chrf:.1f}"
    if before is not None and before.leading is not None:
        earlier = before.leading
        text += f"  {describe_change('WER', now.wer, earlier.wer, scores.wer_change)}"
        text += f"  {describe_change('CER', now.cer, earlier.cer, scores.cer_change)}"
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
        for name, (earlier, later, interval) in figures.items():
            if is_clearly_higher(later, earlier, interval):
                sentences.append(
                    f"{set_name or 'the model'} is worse than before training: "
                    f"{name} {later:.2f} %, was {earlier:.2f} %."
                )
    return sentences
