"""What may leave this machine: names that are known to be public.

Nothing here looks for private text in order to remove it, as no pattern knows every path: a folder
may be relative, or have spaces and commas in its name. What is uploaded is built from names that
come from the Hub, from numbers, and from arguments whose text says nothing of this machine;
everything else is replaced. `Scrubber`, a net below all that, does look for local paths.
"""

import os
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from speech_finetuning.base.files import redacted, without_folders
from speech_finetuning.training.settings import is_of_no_path

LOCAL_DATA = "local data"
LOCAL_MODEL = "local model"
PLACEHOLDERS = {"dataset_name": LOCAL_DATA, "model_name_or_path": LOCAL_MODEL}

# Arguments whose text is a choice, a column, a split or the like, unless it looks like a path.
PUBLIC_TEXTS = frozenset(
    """
    name dataset_config_name train_split_name eval_split_name test_split_name predict_split_name
    audio_column_name text_column_name group_column_name speaker_column_name prompt_column_name language task
    train_window model_index_name
    lr_scheduler_type optim report_to logging_strategy eval_strategy save_strategy hub_strategy
    metric_for_best_model log_level log_level_replica debug fsdp ddp_backend torch_compile_backend
    torch_compile_mode include_for_metrics include_num_input_tokens_seen label_names
    train_sampling_strategy length_column_name dataloader_multiprocessing_context
    """.split()
)
# Arguments that name something on the Hub, slash or not.
HUB_TEXTS = frozenset(["hub_model_id", "hub_revision", "model_revision"])
# What any argument may say.
PUBLIC_WORDS = frozenset(["", "true", "false", "none", "null", "no", "auto", "hub"])

# Keys of configuration files that hold a path of the machine that wrote them, or name code.
PRIVATE_CONFIG_KEYS = frozenset(
    """
    _name_or_path name_or_path base_model_name_or_path auto_map custom_pipelines cache_dir
    special_tokens_map_file tokenizer_file vocab_file merges_file
    """.split()
)
ROW_ID = re.compile(r"((?:[^/]+/)??[^/]+/\d+/\d+)/(.*)", re.DOTALL)  # record/split/part/shard/path
HUB_FILE = re.compile(r"hf://datasets/[^@]+@[^/]+/(.+)", re.DOTALL)


def is_hub_name(name: str) -> bool:
    """Whether a model or data set of this name, which could be opened, is one of the Hub's."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def has_separator(text: str) -> bool:
    return "/" in text or "\\" in text or text.startswith(("~", "."))


def is_plain(text: str) -> bool:
    """Whether a word of the command line is a number, True, auto or the like."""
    if text.lower() in PUBLIC_WORDS:
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def public_argument(name: str, value: Any, hub_names: Collection[str]) -> Any:
    """An argument's value as everybody may see it; else a placeholder: its name in capitals."""
    if isinstance(value, dict):
        return {key: public_setting(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_argument(name, item, hub_names) for item in value]
    if not isinstance(value, str) or value in hub_names or is_plain(value):
        return value
    if name in HUB_TEXTS or (name in PUBLIC_TEXTS and not has_separator(value)):
        return redacted(value)
    return PLACEHOLDERS.get(name, name.upper())


def public_setting(key: str, value: Any) -> Any:
    """A value within a nested setting, like DeepSpeed's and FSDP's: no text that may be a path."""
    if isinstance(value, dict):
        return {name: public_setting(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_setting(key, item) for item in value]
    if isinstance(value, str) and has_separator(value):
        return str(key).upper()
    return value


def public_command(command: str, hub_names: Collection[str]) -> str:
    """`python SCRIPT ...` with its local names replaced: `--output_dir OUTPUT_DIR`."""
    try:
        python, script, *words = shlex.split(command)
    except ValueError:  # a quotation mark that is not closed
        python, script, *words = command.split()[:2]
    shown = [python, Path(script).name]
    name = "argument"
    for word in words:
        if not word.startswith("--"):
            shown.append(str(public_argument(name, word, hub_names)))
            continue
        flag, sign, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        shown.append(f"--{name}{sign}{public_argument(name, value, hub_names)}")
    return shlex.join(shown)


def public_data_source(source: dict[str, Any], hub_names: Collection[str]) -> dict[str, Any]:
    """A data set of run_info.json; of a local one no more than the name of its entry in the mix."""
    is_public = source["name"] in hub_names
    return {
        **source,
        "name": source["name"] if is_public else LOCAL_DATA,
        "config_name": public_argument("dataset_config_name", source["config_name"], hub_names),
    }


def public_identity(identity: dict[str, Any], hub_names: Collection[str]) -> dict[str, Any]:
    """What makes two starts the same run, without local names."""
    shown = {}
    for name, value in identity.items():
        if name == "data_mix":
            shown[name] = [public_identity(source, hub_names) for source in value]
        else:
            shown[name] = public_argument(name, value, hub_names)
    return shown


def public_phases(phases: list[dict[str, Any]], hub_names: Collection[str]) -> list[dict[str, Any]]:
    """With which flags the run was trained, see training.phases: those that name nothing local."""
    return [
        phase
        | {
            "command": phase["command"] and public_command(phase["command"], hub_names),
            "settings": public_settings(phase["settings"], hub_names),
        }
        for phase in phases
    ]


def public_settings(settings: dict[str, Any], hub_names: Collection[str]) -> dict[str, Any]:
    return {
        name: value for name, value in settings.items() if is_public_setting(name, value, hub_names)
    }


def public_run_info(info: dict[str, Any]) -> dict[str, Any]:
    """run_info.json as it is uploaded, and as the model card reads it."""
    hub_names = info.get("hub_names", [])
    shown = {
        "command": public_command(info["command"], hub_names),
        "started": info["started"],
        "phases": public_phases(info.get("phases", []), hub_names),
        "identity": public_identity(info["identity"], hub_names),
        "arguments": {
            name: public_argument(name, value, hub_names)
            for name, value in info["arguments"].items()
        },
        "versions": info["versions"],
        "git": info["git"],
        "data": {
            role: [public_data_source(source, hub_names) for source in sources]
            for role, sources in info["data"].items()
        },
        "machine": info["machine"],
        "hub_names": hub_names,
        "base_licence": info.get("base_licence"),
    }
    if "ended" in info:
        shown["ended"] = info["ended"]
    return shown


def public_config(config: Any) -> Any:
    """A configuration file of a model without local paths and without `auto_map`: it would have
    everybody who loads the model asked whether to run the base model's code."""
    if isinstance(config, dict):
        return {
            key: public_config(value)
            for key, value in config.items()
            if key not in PRIVATE_CONFIG_KEYS
        }
    if isinstance(config, list):
        return [public_config(value) for value in config]
    return config


def public_trainer_state(state: dict[str, Any]) -> dict[str, Any]:
    """trainer_state.json; the best checkpoint by its name, which `adopt_checkpoint` looks for."""
    best = state.get("best_model_checkpoint")
    return state | {"best_model_checkpoint": Path(best).name if best else None}


def public_stream_state(
    state: dict[str, Any], hub_names: Collection[str], data_folders: Collection[str]
) -> dict[str, Any]:
    """stream_state.json; of the settings without those whose text might name something of this
    machine: a run that goes on elsewhere is then not compared in them."""
    damaged = {
        public_row_id(row_id, data_folders): num_rows
        for row_id, num_rows in state.get("damaged_files", {}).items()
    }
    return state | {
        "settings": public_settings(state.get("settings", {}), hub_names),
        "phases": public_phases(state.get("phases", []), hub_names),
        "damaged_files": damaged,
    }


def is_public_setting(name: str, value: Any, hub_names: Collection[str]) -> bool:
    """name: as `training_settings` has it, '--NAME' or '--data_mix, ENTRY: NAME'."""
    flag = re.split(r"--|: ", name)[-1]
    if flag == "exclude_rows":
        return is_of_no_path(flag, value)
    return public_argument(flag, value, hub_names) == value


def public_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Scores and counts: numbers only."""
    return {name: value for name, value in metrics.items() if not isinstance(value, str)}


def public_event_file(path: Path) -> Path:
    """A name without the host's for runs/<date>_<host>/events.out.tfevents.<time>.<host>.<process>.
    <number>. The date has the form Jan31_23-59-59 (transformers 5.23, default_logdir)."""
    date = re.match(r"[A-Z][a-z]{2}\d{2}_\d{2}-\d{2}-\d{2}(?=_)", path.parent.name)
    folder = date.group() if date else "data" if path.parent.name == "data" else "run"
    time, *rest = path.name.removeprefix("events.out.tfevents.").split(".")
    numbers = [part for part in [time, *rest[-2:]] if part.isdigit()]
    return Path("runs", folder, ".".join(["events.out.tfevents", *numbers]))


def public_row_id(row_id: str, data_folders: Collection[str]) -> str:
    """A row's id with its clip's path relative to the data, or else the clip's file name.
    data_folders: absolute paths of local data."""
    match = ROW_ID.fullmatch(row_id)
    shard, path = match.groups() if match else ("", row_id)
    shown = public_clip(path, data_folders)
    return f"{shard}/{shown}" if shard else shown


def public_clip(path: str, data_folders: Collection[str]) -> str:
    """A clip's path relative to the data that it belongs to, or else its file name."""
    in_repository = HUB_FILE.fullmatch(path)
    if in_repository:
        return in_repository.group(1)
    if "://" in path:
        address = urlsplit(path)
        if address.scheme not in ("file", "local"):
            return address.path.rpartition("/")[2]
        path = unquote(address.netloc + address.path)
    absolute = os.path.abspath(path) if path else ""
    for folder in data_folders:
        if absolute.startswith(f"{folder.rstrip(os.sep)}{os.sep}"):
            return Path(os.path.relpath(absolute, folder)).as_posix()
    return re.split(r"[/\\]", path)[-1]


def public_worst_rows(text: str, data_folders: Collection[str]) -> str:
    """worst_<set>.txt: a line '3: <row id>, WER 50 %' for each row, an empty line, alignments."""
    ids, empty_line, alignments = text.partition("\n\n")
    lines = []
    for line in ids.split("\n"):
        match = re.fullmatch(r"(\d+: )(.*)(, WER \S+ %)", line)
        if match:
            number, row_id, score = match.groups()
            lines.append(f"{number}{public_row_id(row_id, data_folders)}{score}")
    return "\n".join(lines) + empty_line + alignments


@dataclass(frozen=True)
class Scrubber:
    """The net below: replaces the local paths that this run is known to use, and then what looks
    like an absolute path or a token."""

    replacements: dict[str, str]  # of paths, the longest first, as one may begin another

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Scrubber":
        """For a run with this run_info.json."""
        hub_names = info.get("hub_names", [])
        found = {str(Path.home()): "~"}
        for name, value in all_arguments(info):
            if isinstance(value, str) and "/" in value:
                shown = str(public_argument(name, value, hub_names))
                if shown != value:
                    found |= {value.rstrip("/"): shown, os.path.abspath(value): shown}
        paths = sorted((path for path in found if "/" in path[:-1]), key=len, reverse=True)
        return cls({path: found[path] for path in paths})

    def text(self, text: str) -> str:
        if self.replacements:
            names = "|".join(map(re.escape, self.replacements))
            # Not within an address or a longer name.
            pattern = rf"(?:(?:file|local)://|(?<![\w/.:-]))({names})(?![\w-])"
            text = re.sub(pattern, self.replace, text)
        return without_folders(text)

    def replace(self, match: re.Match) -> str:
        return self.replacements[match.group(1)]

    def json(self, value: Any) -> Any:
        """A JSON value, with every text in it cleaned."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.json(item) for item in value]
        if isinstance(value, dict):
            return {self.text(name): self.json(item) for name, item in value.items()}
        return value


def all_arguments(info: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, value) of every argument of the run, and the names of its data sets."""
    pairs = [*info.get("arguments", {}).items(), *info.get("identity", {}).items()]
    for sources in info.get("data", {}).values():
        pairs += [("dataset_name", source["name"]) for source in sources]
    return pairs


def local_data_folders(info: dict[str, Any]) -> list[str]:
    """Absolute paths of the folders that local data sets lie in, the longest first."""
    folders = set()
    for name, value in all_arguments(info):
        if name == "dataset_name" and value and value not in info.get("hub_names", []):
            path = Path(os.path.abspath(value))
            folders.add(str(path.parent if path.is_file() else path))
    return sorted(folders, key=len, reverse=True)
