"""Runs trainings of several processes each, one after the other, and prints their exit codes.

    python tests/support/ranks.py JOBS.json

A job is {"words": flags, "log": path} and, if wanted,

    "world_size"   2 by default
    "signal"       [rank, number, text]: sent to this rank alone when the log contains the text
    "bad_rank"     its data ends in a UserError after 10 rows
    "full_rank"    its disk is full at the first checkpoint
    "copy"         [[from, to], ...]: beforehand
    "cores"        [[number, ...], ...]: those of each rank
    "is_sharded"   true for --fsdp, see `shard_on_cpus`

Ranks are forks of this process, which has done the imports, so that a start costs a second. Without
a launcher nobody ends the ranks that one has left: they must do it themselves.
"""

import errno
import functools
import json
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import accelerate
import torch
from accelerate.utils import DistributedType
from warm import warm_up

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.training.trainer import SpeechTrainer

LIMIT_IN_SECONDS = 60


def break_data(num_rows: int) -> None:
    """Rows after the first ones raise, in this process and its worker."""
    rows = SpeechStream.rows

    def broken(self: SpeechStream):
        for number, row in enumerate(rows(self)):
            if number >= num_rows:
                raise UserError("this rank's data is broken")
            yield row

    SpeechStream.rows = broken


def fill_disk() -> None:
    """No weights can be written in this process until one checkpoint could not be saved."""
    save = SpeechTrainer._save

    def full(self: SpeechTrainer, *args: Any, **kwargs: Any) -> None:
        SpeechTrainer._save = save
        raise OSError(errno.ENOSPC, "No space left on device")

    SpeechTrainer._save = full


def shard_on_cpus() -> None:
    """Lets --fsdp work on CPUs, in this process. torch and gloo can; but accelerate (1.15,
    state.py) turns FSDP on for GPUs only, for which reason the script refuses it. All else is the
    libraries'.
    Prints what each rank holds."""
    state, module = accelerate.state.AcceleratorState, accelerate.accelerator
    state.__init__ = functools.partialmethod(start_sharded, state.__init__)
    module.fsdp2_prepare_model = functools.partial(shard_and_count, module.fsdp2_prepare_model)
    script.check_arguments = functools.partial(check_as_on_gpus, script.check_arguments)


def start_sharded(
    self: accelerate.state.AcceleratorState,
    start: Callable,
    *args: Any,
    fsdp_plugin: Any = None,
    **kwargs: Any,
) -> None:
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type = accelerate.PartialState._shared_state["distributed_type"] = (
            DistributedType.FSDP
        )


def shard_and_count(
    shard: Callable, accelerator: accelerate.Accelerator, model: torch.nn.Module
) -> torch.nn.Module:
    model = shard(accelerator, model)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    print(f"rank {accelerator.process_index} holds {held} of {whole} weights", flush=True)
    return model


def check_as_on_gpus(
    check: Callable, data_args: script.DataArguments, args: script.TrainingArguments
) -> None:
    is_sharded, args.fsdp = args.fsdp, None
    check(data_args, args)
    args.fsdp = is_sharded


def start_rank(job: dict, rank: int, port: int) -> int:
    """The process id of one rank; its output goes to the job's log."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    descriptor = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    size = str(job.get("world_size", 2))
    if size != "1":
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "cores" in job:
        os.sched_setaffinity(0, job["cores"][rank])
    if job.get("bad_rank") == rank:
        break_data(10)
    if job.get("full_rank") == rank:
        fill_disk()
    if job.get("is_sharded"):
        shard_on_cpus()
    code = 1
    try:
        code = exit_code_of(script.main, job["words"])
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_job(job: dict) -> list[int | str]:
    """The ranks' exit codes; "hung" for those that had to be killed."""
    for source, target in job.get("copy", []):
        Path(target).parent.mkdir(exist_ok=True)
        (shutil.copytree if Path(source).is_dir() else shutil.copy2)(source, target)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_rank(job, rank, port) for rank in range(job.get("world_size", 2))]
    codes: list[int | str | None] = [None] * len(processes)
    deadline, to_send = time.monotonic() + LIMIT_IN_SECONDS, job.get("signal")
    while None in codes:
        log = Path(job["log"])
        if to_send and log.exists() and to_send[2] in log.read_text(errors="replace"):
            os.kill(processes[to_send[0]], to_send[1])
            to_send = None
        for rank, process in enumerate(processes):
            if codes[rank] is None and time.monotonic() > deadline:
                os.kill(process, 9)
                os.waitpid(process, 0)
                codes[rank] = "hung"
            elif codes[rank] is None and (ended := os.waitpid(process, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.02)
    return codes


if __name__ == "__main__":
    warm_up()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({name: run_job(job) for name, job in jobs.items()}))
