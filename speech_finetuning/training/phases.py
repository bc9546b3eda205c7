"""With which flags a run was trained, from which step on: it may go on with others.

A phase is {"from_step", "started", "command", "settings"}. Every checkpoint contains those up to
it, so that a run which goes on from an older one, or on another machine, has its own history.
"""

import json
import time
from pathlib import Path
from typing import Any

from speech_finetuning.training.settings import saved_settings


def training_phases(
    checkpoint: Path | None, settings: dict[str, Any], command: str
) -> list[dict[str, Any]]:
    """The phases up to now: the present start is a new one if its settings, which shape the
    weights, are not those of the last."""
    now = {
        "from_step": 0 if checkpoint is None else step_of_state(checkpoint),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "settings": settings,
    }
    if checkpoint is None:
        return [now]
    earlier = saved_phases(checkpoint)
    if not earlier:
        return [now]
    if have_changed(earlier[-1]["settings"], settings):
        return [*earlier, now]
    # Of a checkpoint of an older version neither the time nor the command is known.
    kept = {name: value for name, value in earlier[-1].items() if value is not None}
    return [*earlier[:-1], now | kept | {"settings": settings}]


def step_of_state(checkpoint: Path) -> int:
    text = (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
    return json.loads(text)["global_step"]


def saved_phases(checkpoint: Path) -> list[dict[str, Any]]:
    state = json.loads((checkpoint / "stream_state.json").read_text(encoding="utf-8"))
    if state.get("phases"):
        return state["phases"]
    settings = saved_settings(checkpoint)
    if not settings:
        return []
    return [{"from_step": 0, "started": None, "command": None, "settings": settings}]


def have_changed(earlier: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a setting that both have differs: what is uploaded lacks some, see sharing.public."""
    return any(name in earlier and earlier[name] != value for name, value in settings.items())


def changes_of_start(checkpoint: Path, phases: list[dict[str, Any]]) -> list[str]:
    """'--max_steps 60 (was 600)' of each setting that the present start, which goes on from the
    checkpoint, has changed."""
    if len(phases) < 2 or phases[-1]["from_step"] != step_of_state(checkpoint):
        return []
    earlier = phases[-2]["settings"]
    return [
        f"{name} {value} (was {earlier[name]})"
        for name, value in phases[-1]["settings"].items()
        if name in earlier and earlier[name] != value
    ]


def changed_settings(phases: list[dict[str, Any]]) -> list[str]:
    """The names of the settings in which the phases differ."""
    names = dict.fromkeys(name for phase in phases for name in phase["settings"])
    return [
        name
        for name in names
        if any(
            name in phase["settings"]
            and phase["settings"][name] != phases[-1]["settings"].get(name)
            for phase in phases
        )
    ]
