"""The command of the 2022 event runs as it is."""

import logging
import shlex
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration

# run.sh of the Whisper fine-tuning event, December 2022, as it was handed out.
EVENT_COMMAND = r"""
python run_speech_recognition_seq2seq_streaming.py \
    --model_name_or_path="openai/whisper-small" \
    --dataset_name="mozilla-foundation/common_voice_11_0" \
    --dataset_config_name="es" \
    --language="spanish" \
    --train_split_name="train+validation" \
    --eval_split_name="test" \
    --model_index_name="Whisper Small Spanish" \
    --max_steps="5000" \
    --output_dir="./" \
    --per_device_train_batch_size="64" \
    --per_device_eval_batch_size="32" \
    --logging_steps="25" \
    --learning_rate="1e-5" \
    --warmup_steps="500" \
    --evaluation_strategy="steps" \
    --eval_steps="1000" \
    --save_strategy="steps" \
    --save_steps="1000" \
    --generation_max_length="225" \
    --length_column_name="input_length" \
    --max_duration_in_seconds="30" \
    --text_column_name="sentence" \
    --freeze_feature_encoder="False" \
    --report_to="tensorboard" \
    --metric_for_best_model="wer" \
    --greater_is_better="False" \
    --load_best_model_at_end \
    --gradient_checkpointing \
    --fp16 \
    --overwrite_output_dir \
    --do_train \
    --do_eval \
    --predict_with_generate \
    --do_normalize_eval \
    --streaming \
    --use_auth_token \
    --push_to_hub
"""
EVENT_FLAGS = shlex.split(EVENT_COMMAND.replace("\\\n", " "))[2:]
RETIRED = {
    "evaluation_strategy",
    "length_column_name",
    "freeze_feature_encoder",
    "overwrite_output_dir",
    "use_auth_token",
}


def test_the_event_s_command_means_what_it_meant():
    model_args, data_args, args = script.parse_arguments(EVENT_FLAGS)
    assert model_args.model_name_or_path == "openai/whisper-small"
    assert model_args.model_index_name == "Whisper Small Spanish"
    assert (data_args.train_split_name, data_args.eval_split_name) == ("train+validation", "test")
    assert data_args.streaming and data_args.do_normalize_eval
    assert (args.eval_strategy, args.eval_steps, args.save_steps) == ("steps", 1000, 1000)
    assert args.load_best_model_at_end and args.greater_is_better is False
    assert args.activation_checkpointing and args.push_to_hub
    assert not args.fp16  # the tests have no GPU: see below
    script.check_arguments(data_args, args)


def make_common_voice(folder: Path) -> Path:
    """Tables of files with Common Voice's columns."""
    for split, num_rows in (("train", 12), ("validation", 4), ("test", 4)):
        lines = ["path,sentence"]
        for number, (audio, text) in enumerate(demonstration.make_rows(num_rows, seed=num_rows)):
            clip = folder / "clips" / f"{split}_{number}.flac"
            clip.parent.mkdir(parents=True, exist_ok=True)
            clip.write_bytes(audio)
            lines.append(f"clips/{clip.name},{text}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_event_s_command_trains(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Its model and data are replaced, and what needs an account is left out."""
    data = make_common_voice(tmp_path / "common_voice")
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "README.md").write_text("of the model's repository")
    monkeypatch.chdir(tmp_path / "clone")
    words = [word for word in EVENT_FLAGS if word != "--push_to_hub"]
    words = [word for word in words if not word.startswith("--dataset_config_name")]
    words += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(data)]
    words += "--max_steps 2 --warmup_steps 1 --eval_steps 2 --save_steps 2".split()
    words += "--per_device_train_batch_size 4 --generation_max_length 12".split()
    with caplog.at_level(logging.WARNING):
        metrics = script.main(words)
    assert metrics["eval_wer"] > 0
    assert (tmp_path / "clone" / "checkpoint-2" / "stream_state.json").is_file()
    told = [record.message for record in caplog.records if "flags of 2022" in record.message]
    assert len(told) == 1
    assert all(f"--{name} " in told[0] for name in RETIRED)
    assert [record.message for record in caplog.records if "--fp16 is off" in record.message]
