"""What `datasets` says of a column: whether it is audio, samples, text, and columns within it."""

from collections.abc import Mapping
from typing import Any

import datasets

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.columns import SAMPLING_RATE_COLUMNS, find_name


def feature_at(features: Mapping[str, Any], name: str) -> Any:
    """Of a column; of 'talk.audio' that of audio within talk."""
    if name in features or "." not in name:
        return features[name]
    outer, _, inner = name.partition(".")
    return feature_at(features[outer], inner)


def names_of_features(features: Mapping[str, Any]) -> list[str]:
    """The columns, and those within columns that are not audio themselves."""
    names = list(features)
    for name, feature in features.items():
        if isinstance(feature, dict) and not is_audio(feature):
            names += [f"{name}.{inner}" for inner in names_of_features(feature)]
    return names


def without_decoding(feature: Any, inner: str, undecoded: Any) -> Any:
    """A column's feature in which that of `inner` ('' : itself) is replaced."""
    if not inner:
        return undecoded
    name, _, rest = inner.partition(".")
    return {**feature, name: without_decoding(feature[name], rest, undecoded)}


def undecoded_feature(builder_name: str, feature: Any) -> Any:
    """What to cast audio to, so that it is not decoded; None if it is not audio to `datasets`.

    The builder of folders imports torchcodec even for Audio(decode=False) (datasets 5.2,
    features/audio.py:106), so its column becomes the file's path.
    """
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = undecoded_feature(builder_name, feature.feature)
        return None if inner is None else type(feature)(inner)
    if not isinstance(feature, datasets.Audio):
        return None
    if builder_name == "audiofolder":
        return datasets.Value("string")
    return datasets.Audio(decode=False)


def sampling_rate_column(features: datasets.Features, audio: str) -> str | None:
    """The column with the rate of audio that is a list of samples; None for other audio.

    Raises: UserError if the column is no audio, or the rate is missing.
    """
    feature = feature_at(features, audio)
    if is_audio(feature):
        return None
    there = f"Found: {', '.join(features)}."
    if not is_samples(feature):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise UserError(f"--audio_column_name {audio}: holds {kind}, not audio. {there}")
    rate = find_name(list(features), None, SAMPLING_RATE_COLUMNS)
    if rate is None:
        raise UserError(
            f"--audio_column_name {audio}: holds lists of samples, whose rate is unknown. Add a "
            f"column sampling_rate, in Hz. {there}"
        )
    return rate


def is_audio(feature: Any) -> bool:
    """Encoded bytes, a path, both, samples with their rate, or a list of such audio."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return is_audio(feature.feature) and not isinstance(feature.feature, datasets.Value)
    if isinstance(feature, dict):
        return "path" in feature or "bytes" in feature or {"array", "sampling_rate"} <= set(feature)
    kinds = ("string", "large_string", "binary", "large_binary")
    is_value = isinstance(feature, datasets.Value) and feature.dtype in kinds
    return is_value or isinstance(feature, datasets.Audio)


def is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def is_typed(feature: Any) -> bool:
    """Whether a column is audio by its type, not perhaps a column of paths."""
    return is_audio(feature) and not is_text(feature)


def is_samples(feature: Any) -> bool:
    is_list = isinstance(feature, datasets.List | datasets.LargeList)
    return is_list and getattr(feature.feature, "dtype", "").startswith(("float", "double", "int"))


def check_is_text(features: datasets.Features, column: str) -> None:
    """Raises: UserError."""
    feature = feature_at(features, column)
    if not is_text(feature):
        dtype = getattr(feature, "dtype", type(feature).__name__)
        raise UserError(
            f"--text_column_name {column}: holds {dtype}, not text. Found: {', '.join(features)}."
        )
