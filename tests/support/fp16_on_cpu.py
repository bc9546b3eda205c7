"""--fp16 on the CPU: torch has autocast and a loss scaler for it, accelerate uses them on GPUs
only."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate
import torch
import transformers

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import devices


@contextlib.contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Within, --fp16 with --use_cpu trains in float16 with a real GradScaler, in this process.

    All else is the libraries': accelerate (1.15, accelerator.py) leaves out autocast and scaler
    where the device is a CPU, for which reason the script refuses --fp16 there.
    """
    with contextlib.ExitStack() as patches:
        start = accelerate.Accelerator.__init__
        with_scaler = functools.partialmethod(start_with_scaler, start)
        patches.enter_context(mock.patch.object(accelerate.Accelerator, "__init__", with_scaler))
        patches.enter_context(mock.patch.object(devices, "check_devices", accept_devices))
        # Switches --fp16 off where there is no GPU.
        patches.enter_context(mock.patch.object(script, "settle_precision", keep_precision))
        yield


def start_with_scaler(
    self: accelerate.Accelerator, start: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    start(self, *args, **kwargs)
    if self.state.mixed_precision == "fp16":
        assert self.device.type == "cpu"
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu")


def keep_precision(words: list[str]) -> SimpleNamespace:
    """In place of the script's settle_precision: the command line as it is."""
    return SimpleNamespace(words=words)


def accept_devices(args: transformers.Seq2SeqTrainingArguments) -> None:
    """In place of `check_devices`."""
