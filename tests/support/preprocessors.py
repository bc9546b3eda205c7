"""The row-to-example stage of a saved model, for tests and benchmarks."""

from pathlib import Path

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.data.preprocessing import Preprocessor
from speech_finetuning.model.loading import load_processor


def make_preprocessor(model: Path, **changes: object) -> Preprocessor:
    """The row-to-example stage of a saved tiny model."""
    processor, _, config = load_processor(str(model), "main", None)
    words = (
        "--model_name_or_path m --dataset_name d --output_dir o --do_train --max_steps 1".split()
    )
    preprocessor = script.make_preprocessor(
        processor, config, script.parse_arguments(words)[1], "es"
    )
    for name, value in changes.items():
        setattr(preprocessor, name, value)
    return preprocessor
