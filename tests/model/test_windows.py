"""Short training windows, batches of like length, augmentation; and one optimiser step in plain
torch."""

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from speech_finetuning.data.passes import RankShare
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream, group_by_length
from speech_finetuning.model.windows import TrainingWindow, encoder_window

Train = Callable[[str], dict[str, float]]


def test_a_short_window_is_the_full_one_cut_and_leaves_no_trace(tiny_model: Path):
    model = WhisperForConditionalGeneration.from_pretrained(tiny_model)
    features = torch.randn(2, 80, 400)
    whole = model.get_encoder()(features).last_hidden_state
    with encoder_window(model, 100):
        short = model.get_encoder()(features[:, :, :100]).last_hidden_state
    assert short.shape == (2, 50, 16) and torch.isfinite(short).all()
    positions = model.get_encoder().embed_positions
    assert (
        model.config.max_source_positions
        == positions.num_embeddings
        == len(positions.weight)
        == 200
    )
    assert torch.equal(model.get_encoder()(features).last_hidden_state, whole)
    with pytest.raises(ZeroDivisionError), encoder_window(model, 100):
        _ = 1 / 0
    assert model.config.max_source_positions == 200


@pytest.mark.slow
@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False)
def test_torch_compile_meets_windows_of_every_length_with_one_graph(train: Train, tmp_path: Path):
    """The first graph is for constant sizes, the second for all."""
    how = "--do_train --max_steps 12 --train_window longest --per_device_train_batch_size 2 --save_strategy no"
    losses = {}
    for name, more in {
        "eager": "",
        "compiled": "--torch_compile True --torch_compile_backend eager",
    }.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        losses[name] = train(f"{how} --output_dir {tmp_path / name} {more}")["train_loss"]
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("how", "keeps_cudnn"),
    [
        ("", True),
        ("--train_window longest --full_window_fraction 0", False),
        ("--pack_utterances", False),
    ],
)
def test_cudnn_s_attention_is_for_batches_of_one_shape(
    train: Train, monkeypatch: pytest.MonkeyPatch, how: str, keeps_cudnn: bool
):
    """It builds a plan for each new shape, while the GPU idles. Scoring has another with each token."""
    settings: dict[bool, set[bool]] = {True: set(), False: set()}

    @functools.wraps(WhisperForConditionalGeneration.forward)
    def forward_and_note(model: WhisperForConditionalGeneration, *args: Any, **inputs: Any) -> Any:
        settings[model.training].add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(model, *args, **inputs)

    forward = WhisperForConditionalGeneration.forward
    monkeypatch.setattr(WhisperForConditionalGeneration, "forward", forward_and_note)
    monkeypatch.setattr("speech_finetuning.training.stages.check_reload", print)
    train(f"--do_train --do_eval --max_steps 3 {how}")
    assert settings == {True: {keeps_cudnn}, False: {False}}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("num_rows", "num_before"), [(20, 0), (20, 3), (3, 0), (1, 7), (8, 2)])
def test_groups_have_like_lengths_whole_batches_and_every_row_once(num_rows: int, num_before: int):
    sizes = np.random.default_rng(0).permutation(num_rows).tolist()
    order = np.random.default_rng(1).permutation(num_rows).tolist()
    how = {"sizes": sizes, "rows_before": num_before, "group_size": 4, "seed": [1, 2, 3]}
    grouped = group_by_length(order, **how)
    assert sorted(grouped) == sorted(order)
    begun = -num_before % 4
    assert grouped[:begun] == order[:begun]
    groups = [[sizes[i] for i in grouped[start : start + 4]] for start in range(begun, num_rows, 4)]
    ranges = sorted((min(group), max(group)) for group in groups)
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
    assert group_by_length(order, **how) == grouped


def test_like_lengths_meet_in_a_batch_and_the_place_is_kept(speech: Path, preprocessor):
    source = load_source(str(speech), split="train")
    plain = SpeechStream(
        sets=(SpeechDataset(source, preprocessor),),
        seed=1,
        block_size=20,
        micro_batch_size=4,
        num_threads=2,
    )
    grouped = replace(plain, is_grouped_by_length=True)
    rows = {id(stream): list(itertools.islice(stream, 80)) for stream in (plain, grouped)}
    spread = {}
    for stream in (plain, grouped):
        seconds = [item.example["duration"] for item in rows[id(stream)]]
        spread[id(stream)] = np.mean([np.ptp(seconds[i : i + 4]) for i in range(0, 80, 4)])
    assert spread[id(grouped)] < 0.5 * spread[id(plain)]
    ids = [item.example["id"] for item in rows[id(grouped)]]
    assert sorted(ids[:40]) == sorted(item.example["id"] for item in rows[id(plain)][:40])
    # Nor does another batch size, or number of processes, skip or repeat a row of a block that is
    # begun.
    rest = replace(grouped, micro_batch_size=3, position=rows[id(grouped)][9].position)
    remaining = [item.example["id"] for item in itertools.islice(rest, 30)]
    assert sorted(ids[:10] + remaining) == sorted(ids[:40])
    for place in (1, 7, 33, 61):
        value = json.loads(json.dumps(rows[id(grouped)][place - 1].position.to_json()))
        rest = replace(grouped, num_threads=1, position=StreamPosition.from_json(value))
        assert [item.example["id"] for item in itertools.islice(rest, 80 - place)] == ids[place:]


@pytest.mark.parametrize("is_sharded_by_rank", [False, True])
def test_processes_have_the_full_window_at_the_same_time(is_sharded_by_rank: bool):
    """Two ranks that take turns in one order of rows, or go through orders of their own."""
    share = RankShare(world_size=2, is_sharded_by_rank=is_sharded_by_rank)
    window = TrainingWindow(
        full_window_in_frames=400, full_fraction=0.25, seed=1, rows_at_once=share.rows_per_round(4)
    )
    windows = []
    for rank in (0, 1):
        rounds = range(1, 401)
        ends = [4 * n if is_sharded_by_rank else 4 * (2 * (n - 1) + rank + 1) for n in rounds]
        windows.append([window.frames([50, 20], last_row=end) for end in ends])
    assert windows[0] == windows[1]
    assert set(windows[0]) == {100, 400} and 70 < windows[0].count(400) < 130


def test_short_windows_save_padding_and_change_nothing_that_is_saved(train: Train, tmp_path: Path):
    flags = "--do_train --do_eval --max_steps 8 --eval_steps 8 --train_window"
    padding = {}
    for how in ("full", "longest --full_window_fraction 0", "longest --full_window_fraction 1"):
        folder = tmp_path / how.replace(" ", "")
        train(f"{flags} {how} --output_dir {folder}")
        history = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())[
            "log_history"
        ]
        padding[how] = np.mean(
            [entry["padding_fraction"] for entry in history if "padding_fraction" in entry]
        )
        assert json.loads((folder / "config.json").read_text())["max_source_positions"] == 200
        assert (
            len(load_file(folder / "model.safetensors")["model.encoder.embed_positions.weight"])
            == 200
        )
    full, short, share = padding.values()
    assert short < 0.35 < full and share == pytest.approx(full, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        "--train_window longest --full_window_fraction 0.5 --gradient_checkpointing",
        "--speed_perturbation",
        "--apply_spec_augment",
        "--pack_utterances --timestamp_probability 0.5",
    ],
)
def test_a_continued_run_with_these_ends_with_the_same_weights(
    train: Train, tmp_path: Path, more: str
):
    common = f"--do_train --save_steps 3 --shuffle_buffer_size 9 {more} --max_steps 8"
    plain = train(f"{common.replace(more, '')} --output_dir {tmp_path / 'plain'}")
    assert train(f"{common} --output_dir {tmp_path / 'whole'}")["train_loss"] != plain["train_loss"]
    train(f"{common} --output_dir {tmp_path / 'parts'}")
    for name in ("checkpoint-6", "checkpoint-8"):
        (tmp_path / "parts" / name).rename(tmp_path / name)
    train(f"{common} --output_dir {tmp_path / 'parts'} --num_decoding_threads 3")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_speeds_are_of_the_row_and_lose_no_clip(speech: Path, preprocessor):
    source = load_source(str(speech), split="train")
    stream = SpeechStream(
        sets=(SpeechDataset(source, preprocessor),),
        seed=1,
        block_size=20,
        micro_batch_size=4,
        num_threads=1,
    )
    streams = [
        stream,
        replace(stream, speed_perturbation=True),
        replace(stream, speed_perturbation=True, num_threads=4),
    ]
    plain, one, four = (
        [item.example["duration"] for item in itertools.islice(stream, 80)] for stream in streams
    )
    assert one == four and plain[:40] != one[:40]
    speeds = np.array(plain) / np.array(one)
    assert 0.899 < speeds.min() < 0.93 and 1.07 < speeds.max() < 1.101


def test_a_clip_that_a_lower_speed_would_make_too_long_keeps_its_speed(
    tmp_path: Path, preprocessor
):
    tone = np.sin(np.arange(int(3.9 * 16_000)) / 20).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", tone, 16_000)
    assert preprocessor.prepare(str(tmp_path / "a.wav"), "uno", 0.9)["duration"] == 3.9
    assert preprocessor.prepare(str(tmp_path / "a.wav"), "uno", 1.1)["duration"] == pytest.approx(
        3.9 / 1.1, abs=1e-3
    )


def test_an_optimiser_step_in_plain_torch(
    train: Train, tmp_path: Path, speech: Path, preprocessor, tiny_model: Path
):
    """Two steps of two micro-batches: features, shift, cross-entropy, clipping, AdamW and schedule
    written out."""
    flags = "--do_train --max_steps 2 --gradient_accumulation_steps 2 --learning_rate 1e-2 --max_grad_norm 0.5"
    train(f"{flags} --weight_decay 0.1 --warmup_steps 1 --save_steps 1 --seed 7")
    source = load_source(str(speech), split="train")
    stream = SpeechStream(
        sets=(SpeechDataset(source, preprocessor),),
        seed=7,
        block_size=500,
        micro_batch_size=4,
        num_threads=1,
    )
    rows = [item.example for item in itertools.islice(stream, 16)]
    model = WhisperForConditionalGeneration.from_pretrained(tiny_model)
    model.model.encoder.embed_positions.requires_grad_(False)
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and not n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    history = json.loads((tmp_path / "output" / "checkpoint-2" / "trainer_state.json").read_text())[
        "log_history"
    ]
    logged = [entry for entry in history if "loss" in entry]
    for step, rate in enumerate((0.0, 1e-2)):  # warm-up begins at 0
        losses, num_tokens = [], 0
        for row in rows[8 * step : 8 * step + 8]:
            frames = row["features"]
            silence = torch.full((80, 400 - frames.shape[1]), max(float(frames.max()) - 2.0, -1.5))
            features, ids = torch.cat([frames, silence], dim=1)[None], torch.tensor(row["labels"])
            logits = model(input_features=features, decoder_input_ids=ids[None, :-1]).logits[0]
            losses.append(-logits.log_softmax(dim=-1)[range(len(ids) - 1), ids[1:]].sum())
            num_tokens += len(ids) - 1
        loss = torch.stack(losses).sum() / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert logged[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    ours = load_file(tmp_path / "output" / "checkpoint-2" / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-4, atol=1e-5)
