"""The tiny checkpoint's tokenizer, loaded once: scoring never changes it."""

from pathlib import Path

import pytest
import transformers


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> transformers.WhisperTokenizer:
    return transformers.WhisperTokenizer.from_pretrained(tiny_model)
