"""The memory of a step, against the table that benchmarks/memory.py has counted."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from speech_finetuning.training.memory import needs_checkpointing, step_in_bytes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SIZES = {  # width, heads, layers of the encoder and the decoder, mel bins
    "small": (768, 12, 12, 12, 80),
    "medium": (1024, 16, 24, 24, 80),
    "large-v3-turbo": (1280, 20, 32, 4, 128),
}


def make_empty_model(name: str) -> transformers.WhisperForConditionalGeneration:
    """Of OpenAI's size, without numbers."""
    width, num_heads, num_encoder_layers, num_decoder_layers, n_mels = SIZES[name]
    config = transformers.WhisperConfig(
        vocab_size=51_866,
        d_model=width,
        num_mel_bins=n_mels,
        encoder_layers=num_encoder_layers,
        decoder_layers=num_decoder_layers,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )
    with torch.device("meta"):
        return transformers.WhisperForConditionalGeneration(config)


def test_the_sum_is_that_of_the_table():
    """Its lines without checkpointing, of the longest transcripts."""
    lines = re.findall(
        r"^\| \d+ GB \| (\S+) \| (\d+) \| \d+ \| `--gradient_checkpointing False` \| .* (\d+) GB \|$",
        PAGE.read_text(encoding="utf-8"),
        re.M,
    )
    assert len(lines) == 4
    for name, num_rows, counted_in_gb in lines:
        need_in_gb = step_in_bytes(make_empty_model(name), int(num_rows)) / 1e9
        assert need_in_gb == pytest.approx(int(counted_in_gb), rel=0.1), name


def test_frozen_weights_need_no_optimiser():
    model = make_empty_model("small")
    all_trained = step_in_bytes(model, 1)
    model.freeze_encoder()
    assert 5e8 < all_trained - step_in_bytes(model, 1) < 2e9


@pytest.mark.parametrize(
    ("need_in_gb", "memory_in_gb", "is_needed"),
    [(26, 16, True), (26, 40, False), (38, 40, True), (26, None, False)],
)
def test_checkpointing_is_for_what_would_not_fit(
    need_in_gb: float, memory_in_gb: float | None, is_needed: bool
):
    memory_in_bytes = None if memory_in_gb is None else memory_in_gb * 1e9
    assert needs_checkpointing(need_in_gb * 1e9, memory_in_bytes) == is_needed
