"""Two real torchrun processes against one: the same rows in the same steps, equal losses, every row scored once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script


@pytest.mark.slow
def test_two_processes_equal_one(flags: list[str], tmp_path: Path):
    words = [*flags, "--do_train", "--do_eval", "--max_steps", "20", "--max_eval_samples", "5", "--use_cpu"]
    words += ["--dataloader_num_workers", "1", "--disable_tqdm", "True", "--gradient_accumulation_steps", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541"]
    launches = {
        "one": [sys.executable, script.__file__, *words, "--per_device_train_batch_size", "4"],
        "two": [*torchrun, script.__file__, *words, "--per_device_train_batch_size", "2", "--ddp_backend", "gloo"],
    }
    logged, metrics = {}, {}
    for name, command in launches.items():
        folder = tmp_path / name
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, "--output_dir", folder], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
        history = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
        logged[name] = [[entry[key] for entry in history if key in entry] for key in ("loss", "grad_norm")]
        metrics[name] = json.loads((folder / "all_results.json").read_text())
        assert json.loads((folder / "exit_status.json").read_text())["code"] == 0
    assert len(logged["one"][0]) == 20
    assert logged["two"][0] == pytest.approx(logged["one"][0], abs=1e-5)
    assert logged["two"][1] == pytest.approx(logged["one"][1], rel=1e-4)
    assert metrics["two"]["eval_num_rows"] == metrics["one"]["eval_num_rows"] == 5
    assert metrics["two"]["eval_hits"] == metrics["one"]["eval_hits"]
