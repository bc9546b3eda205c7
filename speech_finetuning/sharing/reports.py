"""What a finished run leaves behind as files, and what it says of its scores."""

import logging
import time
from pathlib import Path
from typing import Any

from speech_finetuning.base.files import write_json
from speech_finetuning.scoring.score_table import describe_regressions, score_table
from speech_finetuning.scoring.scores import ROLES

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
        names = [source["record"] for source in info["data"].get("eval", []) if source["record"]]
        logger.info("scores\n%s", score_table(metrics, names))
        for sentence in describe_regressions(metrics, names):
            logger.warning("%s", sentence)
