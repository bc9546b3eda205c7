"""A tiny Whisper and synthetic speech, made on the spot: nothing binary is committed, nothing is
downloaded.

    python -m speech_finetuning.cli.demonstration OUT_DIR --train 8 --validation 8 --test 8

writes OUT_DIR/model (a random two-layer Whisper of width 64 with a 4 s window) and OUT_DIR/speech
(parquet shards whose Audio column holds FLAC bytes). Every word of the vocabulary is a distinct
sound, so that the model can really learn.
"""

import argparse
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from datasets import Audio, Features, Value
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    pipeline,
    set_seed,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from speech_finetuning.cli.silenced import WithoutSilenced, quieten_libraries

SAMPLE_RATE_IN_HZ = 16_000
SMOKE_OK = """\
smoke ok: reading, training, scoring, saving and loading work here. A model
of four steps is not meant to understand, or to stop; for one that does, in
a minute: bash run.sh learn"""
WORDS = ["uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez"]


def make_tokenizer(num_languages: int = 99, num_timestamps: int = 1501) -> WhisperTokenizer:
    """A byte-level tokenizer without merges, with Whisper's special tokens in Whisper's order."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:num_languages]]
    tasks = [
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|startoftranscript|>", *languages, *tasks]}
    )
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(num_timestamps)])
    return tokenizer


def make_generation_config(
    tokenizer: WhisperTokenizer, max_length: int, multilingual: bool
) -> GenerationConfig:
    """What OpenAI's checkpoints say in generation_config.json, for this vocabulary. The default one,
    which is made anew of the model's config when it is loaded, has no lang_to_id."""
    ids = tokenizer.convert_tokens_to_ids
    settings = {
        "is_multilingual": multilingual,
        "no_timestamps_token_id": ids("<|notimestamps|>"),
        "prev_sot_token_id": ids("<|startofprev|>"),
        "decoder_start_token_id": ids("<|startoftranscript|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "max_length": max_length,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
    }
    if multilingual:
        tokens = {f"<|{code}|>" for code in LANGUAGES} & set(tokenizer.get_vocab())
        settings["lang_to_id"] = {token: ids(token) for token in sorted(tokens)}
        settings["task_to_id"] = {task: ids(f"<|{task}|>") for task in ("translate", "transcribe")}
    return GenerationConfig(**settings)


def make_model(
    folder: str | Path,
    *,
    d_model: int = 64,
    num_layers: int = 2,
    window_in_seconds: int = 4,
    n_mels: int = 80,
    max_target_positions: int = 64,
    multilingual: bool = True,
    dropout: float = 0.0,
    dtype: str = "float32",
    apply_spec_augment: bool = False,
    num_decoder_layers: int | None = None,
    num_heads: int = 2,
    vocab_size: int | None = None,  # None: the tokenizer's
    num_timestamps: int = 1501,  # of 0.02 s each, from 0 on
    seed: int = 0,
) -> Path:
    """Saves a random Whisper with its processor. Returns the folder."""
    set_seed(seed)
    tokenizer = make_tokenizer(100 if n_mels == 128 else 99, num_timestamps)
    end = cast(int, tokenizer.eos_token_id)
    config = WhisperConfig(
        vocab_size=vocab_size or len(tokenizer),
        d_model=d_model,
        num_mel_bins=n_mels,
        encoder_layers=num_layers,
        decoder_layers=num_decoder_layers or num_layers,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        max_source_positions=window_in_seconds * 50,
        max_target_positions=max_target_positions,
        dropout=dropout,
        apply_spec_augment=apply_spec_augment,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=cast(int, tokenizer.convert_tokens_to_ids("<|startoftranscript|>")),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = make_generation_config(tokenizer, max_target_positions, multilingual)
    extractor = WhisperFeatureExtractor(feature_size=n_mels, chunk_length=window_in_seconds)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return Path(folder)


def chord(word: str, seconds: np.ndarray, pitch: float) -> np.ndarray:
    """The sound of a word: two tones that no other word has, rising and falling."""
    index = WORDS.index(word)
    low_in_hz = (300 + 130 * index) * pitch
    high_in_hz = (2200 + 330 * ((index * 7) % len(WORDS))) * pitch
    envelope = np.sin(np.pi * np.linspace(0, 1, len(seconds))) ** 0.5
    low = np.sin(2 * np.pi * low_in_hz * seconds)
    high = np.sin(2 * np.pi * high_in_hz * seconds)
    return envelope * (low + 0.6 * high)


def silence(generator: np.random.Generator, shortest: float, longest: float) -> np.ndarray:
    """A pause of between `shortest` and `longest` seconds."""
    return np.zeros(int(generator.uniform(shortest, longest) * SAMPLE_RATE_IN_HZ))


def speak(words: list[str], generator: np.random.Generator) -> np.ndarray:
    """One utterance, (n_samples,) float32 at 16 kHz: words with pauses between them, and noise."""
    pieces = [silence(generator, 0.02, 0.1)]
    for word in words:
        num_samples = int(generator.uniform(0.25, 0.4) * SAMPLE_RATE_IN_HZ)
        pitch = generator.uniform(0.97, 1.03)
        pieces.append(chord(word, np.arange(num_samples) / SAMPLE_RATE_IN_HZ, pitch))
        pieces.append(silence(generator, 0.05, 0.15))
    waveform = np.concatenate(pieces) * generator.uniform(0.1, 0.4)
    return (waveform + generator.normal(0, 0.003, len(waveform))).astype(np.float32)


def encode(
    waveform: np.ndarray, audio_format: str = "FLAC", sampling_rate: int = SAMPLE_RATE_IN_HZ
) -> bytes:
    """The waveform as the bytes of a file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, sampling_rate, format=audio_format)
    return buffer.getvalue()


def make_rows(num_rows: int, seed: int, max_words: int = 5) -> list[tuple[bytes, str]]:
    """(FLAC bytes, text) pairs of one to max_words words each."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        words = [
            str(word) for word in generator.choice(WORDS, size=generator.integers(1, max_words + 1))
        ]
        rows.append((encode(speak(words, generator)), " ".join(words)))
    return rows


def write_parquet(
    path: Path, rows: Sequence[tuple[bytes | None, str | None]], row_group_size: int = 50
) -> None:
    """A parquet file with an Audio column `audio` and a string column `text`, as `datasets` writes
    them."""
    features = Features({"audio": Audio(), "text": Value("string")})
    audio = [{"bytes": data, "path": f"{path.stem}-{i}.flac"} for i, (data, _) in enumerate(rows)]
    table = pa.table(
        {"audio": audio, "text": [text for _, text in rows]}, schema=features.arrow_schema
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def make_speech(folder: str | Path, sizes: dict[str, int], num_shards: int = 2) -> Path:
    """A parquet dataset: `sizes` rows of each split, each split in num_shards files."""
    for split_index, (split, num_rows) in enumerate(sizes.items()):
        rows = make_rows(num_rows, seed=1000 + split_index)
        for shard in range(num_shards):
            name = f"{split}-{shard:05}-of-{num_shards:05}.parquet"
            write_parquet(Path(folder) / name, rows[shard::num_shards])
    return Path(folder)


def check_saved_model(model: str | Path, speech: str | Path) -> None:
    """Loads a saved model afresh, as its users will, and has it transcribe the first test clip.
    Raises: what transformers raises if the model is none."""
    first_file = sorted(Path(speech).glob("test-*.parquet"))[0]
    row = pq.read_table(first_file).slice(0, 1).to_pylist()[0]
    waveform, sampling_rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
    recogniser = pipeline("automatic-speech-recognition", model=str(model))
    recogniser({"raw": waveform, "sampling_rate": sampling_rate})


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--train", type=int, default=8)
    parser.add_argument("--validation", type=int, default=8)
    parser.add_argument("--test", type=int, default=8)
    parser.add_argument("--check", metavar="MODEL", help="only see whether this model works")
    args = parser.parse_args()
    quieten_libraries()
    handler = logging.StreamHandler()
    handler.addFilter(WithoutSilenced(is_main=True))
    logging.getLogger().addHandler(handler)
    speech = Path(args.folder) / "speech"
    if args.check:
        check_saved_model(args.check, speech)
        print(SMOKE_OK)
        return
    make_speech(speech, {"train": args.train, "validation": args.validation, "test": args.test})
    make_model(Path(args.folder) / "model")


if __name__ == "__main__":
    main()
