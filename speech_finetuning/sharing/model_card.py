"""The model's README.md."""

import itertools
import math
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers.modelcard import make_markdown_table

from speech_finetuning.scoring.scores import score_table


def curve_table(history: list[dict[str, Any]]) -> str:
    """Markdown: step, training loss, evaluation loss, WER and CER of every evaluation; nothing before the first."""
    lines, loss = [], math.nan
    for entry in history:
        loss = entry.get("loss", loss)
        if "eval_wer" in entry:
            scores = {name: f"{entry[name]:.4g}" for name in ("eval_loss", "eval_wer", "eval_cer")}
            lines.append({"step": entry["step"], "loss": f"{loss:.4g}", **scores})
    return make_markdown_table(lines)


def card_metadata(
    info: dict[str, Any], metrics: dict[str, float], languages: list[str], name: str
) -> str:
    """The card's YAML: what the Hub reads, with one result for each set, split and kind of error rate."""
    base, results = info["identity"]["model_name_or_path"], []
    sources = [(role, source) for role, sources in info["data"].items() for source in sources]
    kinds = {"wer_norm": "WER, normalised", "wer_ortho": "WER, as written", "cer": "CER"}
    for (role, source), (kind, title) in itertools.product(sources, kinds.items()):
        key = "_".join(
            filter(None, (role, source["record"] if len(info["data"][role]) > 1 else "", kind))
        )
        if role != "train" and key in metrics:
            place = {f"dataset_{what}": source[what] for what in ("split", "revision")}
            place |= {"dataset_config": source["config_name"] or "default", "metric_name": title}
            what = (
                "automatic-speech-recognition",
                source["name"],
                source["name"],
                kind.split("_")[0],
            )
            results.append(huggingface_hub.EvalResult(*what, round(metrics[key], 2), **place))
    return huggingface_hub.ModelCardData(
        language=languages[0] if len(languages) == 1 else languages,
        license=info.get("base_licence"),
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        base_model=None if Path(base).exists() else base,
        datasets=sorted(
            {source["name"] for _, source in sources if not Path(source["name"]).exists()}
        )
        or None,
        metrics=["wer", "cer"],
        tags=["whisper", "speech", "generated_from_trainer", *languages],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def model_card(
    info: dict, languages: list[str], name: str, metrics: dict[str, float], history: list[dict]
) -> str:
    """README.md of the trained model: metadata, scores, curve, how to use it, settings, the command, versions."""
    base = info["identity"]["model_name_or_path"]
    datasets_used = {
        Path(source["name"]).name for sources in info["data"].values() for source in sources
    }
    names = """lora_rank train_window pack_utterances timestamp_probability learning_rate max_steps
        per_device_train_batch_size gradient_accumulation_steps fp16 bf16 seed"""
    audio, hours = metrics.get("train_audio_hours", 0.0), metrics.get("train_hours", 0.0)
    rows, rejected = (int(metrics.get(key, 0)) for key in ("train_rows", "train_rejected"))
    trained = f"{rows} rows ({rejected} of them rejected), {audio:.2f} h of audio, in {hours:.2f} h"
    facts = {
        "training": trained if rows else "none by this run",
        "settings": ", ".join(f"{key} {info['arguments'][key]}" for key in names.split()),
        "hardware": ", ".join(info["machine"]["gpus"]) or f"{info['machine']['cores']} CPU cores",
        "versions": ", ".join(
            f"{key} {found}" for key, found in {**info["versions"], "git": info["git"]}.items()
        ),
    }
    sets = [source["record"] for source in info["data"].get("eval", []) if source["record"]]
    spoken = f'"{languages[0]}"' if len(languages) == 1 else None
    return (
        f"---\n{card_metadata(info, metrics, languages, name)}\n---\n\n# {name}\n\n{Path(base).name} fine-tuned on "
        f"{', '.join(sorted(datasets_used))}; scored by real generation.\n\n```\n{score_table(metrics, sets)}\n```\n\n"
        f"{curve_table(history)}\n\n```python\nfrom transformers import pipeline\n\n"
        f'print(pipeline("automatic-speech-recognition", model="{name}")("speech.flac")["text"])\n```\n\n'
        "With faster-whisper:\n\n```bash\npip install faster-whisper 'av<19'\n"
        f"ct2-transformers-converter --model {name} --output_dir whisper-ct2 "
        "--copy_files tokenizer.json preprocessor_config.json\n```\n\n```python\n"
        'from faster_whisper import WhisperModel\n\nmodel = WhisperModel("whisper-ct2")\n'
        f'segments, _ = model.transcribe("speech.flac", language={spoken}, without_timestamps=True)\n'
        'print("".join(segment.text for segment in segments))\n```\n\n'
        + "".join(f"* {title}: {text}\n" for title, text in facts.items())
        + f"\n```\n{info['command']}\n```\n"
    )
