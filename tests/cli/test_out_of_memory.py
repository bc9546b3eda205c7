"""Out of memory: which errors say so, and the flags that are named then."""

import pytest
import torch

from speech_finetuning.base.errors import memory_that_is_out
from speech_finetuning.cli.exit_status import ending_of
from speech_finetuning.cli.out_of_memory import advice

# As torch 2.13, its libraries and NCCL word them.
OF_CUDA = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
OF_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
OF_NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'"""
OF_NCCL_ELSEWHERE = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, remote
process exited or there was a network error"""
OF_PROCESSES = """NCCL error in: NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details)
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"""
OF_RAM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU memory"),
        (torch.AcceleratorError(OF_CUDA), "GPU memory"),
        (RuntimeError(OF_CUBLAS), "GPU memory"),
        (torch.distributed.DistBackendError(OF_NCCL), "GPU memory"),
        (RuntimeError(OF_RAM), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
        (torch.distributed.DistBackendError(OF_NCCL_ELSEWHERE), None),
        (ValueError("out of memory"), None),
    ],
)
def test_every_allocator_is_understood(error: Exception, kind: str | None):
    assert memory_that_is_out(error) == kind


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (OF_NCCL, 74, "out of GPU memory. Append to the same command: --per_device_train_batch_"),
        (OF_NCCL_ELSEWHERE, 75, "another process of this run has ended. To go on, start"),
        (OF_PROCESSES, 2, "more processes than GPUs. Start one for each GPU: --nproc_per_node"),
    ],
)
def test_what_nccl_says_is_one_line(error: str, code: int, reason: str):
    ending = ending_of(torch.distributed.DistBackendError(error), ["--do_train"])
    assert ending is not None and ending.code == code
    assert ending.reason.startswith(reason) and "\n" not in ending.reason


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--do_train", "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
         "--gradient_checkpointing (the same batch in all)"),
        ("--do_train --per_device_train_batch_size 16 --gradient_accumulation_steps 2 "
         "--gradient_checkpointing", "--per_device_train_batch_size 8 "
         "--gradient_accumulation_steps 4 (the same batch in all)"),
        ("--do_train --per_device_train_batch_size 9 --gradient_checkpointing True",
         "--per_device_train_batch_size 3 --gradient_accumulation_steps 3 (the same batch in all)"),
        ("--do_train --per_device_train_batch_size 1", "--gradient_checkpointing"),
        ("--do_train --per_device_train_batch_size=1 --gradient_checkpointing",
         "Append to the same command --lora_rank 32 and another --output_dir: adapters need a third "
         "of it. Or take a smaller model."),
        ("--do_train --per_device_train_batch_size 1 --gradient_checkpointing --lora_rank 8",
         "Take a smaller model."),
        ("--do_eval", "--per_device_eval_batch_size 1"),
    ],
)  # fmt: skip
def test_the_flags_to_append_have_their_numbers(words: str, told: str):
    lead = "" if told.startswith(("Append", "Take")) else "Append to the same command: "
    assert advice(words.split()) == lead + told
