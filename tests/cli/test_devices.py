"""What several processes cannot do on this machine, told before anything is loaded."""

from types import SimpleNamespace

import pytest

from speech_finetuning.cli.devices import process_problems


def problems(world_size: int, device: str = "cpu") -> list[str]:
    """Of plain arguments, as the library has them in one of the processes."""
    data_args = SimpleNamespace(max_network_wait_in_minutes=60, dry_run=False, long_form=False)
    args = SimpleNamespace(
        world_size=world_size,
        ddp_timeout=7200,
        fsdp=[],
        deepspeed=None,
        device=SimpleNamespace(type=device),
    )
    return list(process_problems(data_args, args))


def test_processes_that_would_each_run_alone_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU and --use_cpu, what torchrun starts are runs that know nothing of each other,
    in one --output_dir."""
    assert problems(1) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems(1) == []  # a cluster's variable alone: nothing has started several
    monkeypatch.setenv("LOCAL_RANK", "0")
    (problem,) = problems(1)
    assert "2 processes were started" in problem and "--use_cpu" in problem
    assert problems(2) == []
