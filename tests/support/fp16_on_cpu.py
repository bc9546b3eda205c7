"""--fp16 on the CPU: torch has autocast and a loss scaler for it, accelerate uses them on GPUs
only."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import torch
import transformers

from speech_finetuning.cli import devices


@contextlib.contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Within, --fp16 with --use_cpu trains in float16 with a real GradScaler, in this process.

    All else is the libraries': accelerate (1.15, accelerator.py) leaves out autocast and scaler
    where the device is a CPU, for which reason the script refuses --fp16 there.
    """
    start = accelerate.Accelerator.__init__
    check = devices.check_devices
    accelerate.Accelerator.__init__ = functools.partialmethod(start_with_scaler, start)
    devices.check_devices = accept_devices
    try:
        yield
    finally:
        accelerate.Accelerator.__init__ = start
        devices.check_devices = check


def start_with_scaler(
    self: accelerate.Accelerator, start: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    start(self, *args, **kwargs)
    if self.state.mixed_precision == "fp16":
        assert self.device.type == "cpu"
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu")


def accept_devices(args: transformers.Seq2SeqTrainingArguments) -> None:
    """In place of `check_devices`."""
