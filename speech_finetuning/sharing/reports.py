"""What a finished run leaves behind as files, and what it says of its scores."""

import logging
import time
from pathlib import Path
from typing import Any

from speech_finetuning.base.files import write_json
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.scoring.score_table import describe_regressions, score_table
from speech_finetuning.scoring.scores import ROLES
from speech_finetuning.sharing.claim import Run
from speech_finetuning.sharing.hub import base_licence
from speech_finetuning.sharing.model_card import CardWriter
from speech_finetuning.sharing.run_info import (
    collect_run_info,
    names_of_guards,
    names_of_sets,
)

logger = logging.getLogger(__name__)


def write_reports(
    output_dir: Path, info: dict[str, Any], metrics: dict[str, float], card: str
) -> None:
    """all_results.json, scorecard.json, run_info.json with the end time, the card, and the score
    table in the log."""
    scores = {
        name: value
        for name, value in metrics.items()
        if name.startswith(ROLES) and "preparation_time" not in name
    }
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(output_dir / "all_results.json", metrics)
    write_json(output_dir / "scorecard.json", scores)
    write_json(output_dir / "run_info.json", info | {"ended": ended})
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    if any(name.endswith("_wer") for name in metrics):
        names = names_of_sets(info)
        guard_names = names_of_guards(info)
        logger.info("scores\n%s", score_table(metrics, names, guard_names))
        for sentence in describe_regressions(metrics, [*names, *guard_names]):
            logger.warning("%s", sentence)


def make_card_writer(
    argv: list[str],
    arguments: dict[str, Any],
    speech: dict[str, list[SpeechDataset]],
    languages: list[str | None],
    run: Run,
    phases: list[dict[str, Any]],
) -> CardWriter:
    """What writes the card of this run. arguments: all flags; speech: the sets by role; languages:
    of each source, None for a model that knows English only; phases: see training.phases."""
    name = arguments["model_index_name"]
    if name is None:
        name = run.uploads.repo_id if run.uploads else run.output_dir.resolve().name
    info = collect_run_info(
        argv=argv,
        arguments=arguments,
        speech=speech,
        identity=run.identity,
        base_licence=base_licence(arguments["model_name_or_path"]) if run.uploads else None,
        phases=phases,
    )
    return CardWriter(
        run_info=info,
        languages=[language or "en" for language in dict.fromkeys(languages)],
        model_name=name,
        has_training_code=run.uploads is not None,
    )
