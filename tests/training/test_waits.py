"""A step asks for one value: see docs/gpu-waits.md."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fp16_on_cpu import fp16_on_cpu
from waits import fetched_in

Train = Callable[[str], dict[str, float]]
# No line of the log, no saving: only steps.
QUIET = "--do_train --logging_steps 1000 --save_strategy no"
ACCUMULATION = 3


def fetched(train: Train, output: Path, num_steps: int, more: str) -> Counter[str]:
    words = f"{QUIET} --max_steps {num_steps} --gradient_accumulation_steps {ACCUMULATION}"
    return fetched_in(train, f"{words} --output_dir {output} {more}")


@pytest.mark.parametrize("more", ["", "--fp16 --train_window longest"])
def test_a_step_fetches_one_value(train: Train, tmp_path: Path, more: str):
    """What four more steps fetch, so that the start and the end of a run do not count."""
    with fp16_on_cpu():
        few = fetched(train, tmp_path / "few", 2, more)
        many = fetched(train, tmp_path / "many", 6, more)
    assert many - few == {"callbacks.py:on_pre_optimizer_step": 4}
