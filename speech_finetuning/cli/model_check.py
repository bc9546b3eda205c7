"""What a model hears in each row, beside what its transcript says: for transcripts of other clips."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import jiwer
import langcodes
import numpy as np
import torch

from speech_finetuning.base.files import printable
from speech_finetuning.data.row_check import CheckedRow
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.model.recogniser import DETECT, Recogniser, chosen_language
from speech_finetuning.model.transcription import extract_features
from speech_finetuning.scoring.normalization import NORM, Normalizer, read_text, text_normalizers

logger = logging.getLogger(__name__)

BATCH_SIZE = 16
# A transcript does not fit if its CER is so high, and so many robust deviations beyond the median.
MIN_CER = 50.0  # percent
CER_DEVIATIONS = 4.0
# More rows in another language than that are the model's mistake, or the flag's.
MAX_SHARE_OF_OTHER_LANGUAGES = 0.2
LONGEST_EXAMPLE = 80  # characters of what was heard


@dataclass(frozen=True, kw_only=True)
class HeardRow:
    """cer: of the row's transcript to what the model wrote, in percent, both normalised; None
    without a transcript. language: by the model's own detection; None if it has none."""

    text: str
    cer: float | None
    language: str | None


@dataclass(kw_only=True)
class Listener:
    """Transcribes rows in batches, in the order in which they come."""

    recogniser: Recogniser
    language: str  # a code, or DETECT
    normalize: Normalizer
    heard: dict[str, HeardRow] = field(default_factory=dict)  # by the row's id
    waiting: list[CheckedRow] = field(default_factory=list)

    @classmethod
    def of(cls, recogniser: Recogniser, language: str | None) -> "Listener":
        """language: of the data, as it was told. Raises: UserError for one without a token."""
        code = chosen_language(recogniser, language)
        tokenizer: Any = recogniser.processor.tokenizer
        normalizers = text_normalizers("" if code == DETECT else code, tokenizer)
        return cls(recogniser=recogniser, language=code, normalize=normalizers[NORM])

    def add(self, row: CheckedRow) -> CheckedRow:
        """Returns the row without its samples, which are kept only until they are heard."""
        assert row.waveform is not None
        # A model with a shorter window than the data's limit does not hear the rest.
        if 0 < len(row.waveform) <= self.recogniser.window_in_samples:
            self.waiting.append(row)
        if len(self.waiting) == BATCH_SIZE:
            self.finish()
        return replace(row, waveform=None)

    @torch.no_grad()
    def finish(self) -> None:
        """Hears what is left."""
        if not self.waiting:
            return
        rows = self.waiting
        self.waiting = []
        model: Any = self.recogniser.model
        waveforms = [row.waveform for row in rows if row.waveform is not None]
        encoded = model.get_encoder()(extract_features(self.recogniser, waveforms))
        told = {"task": "transcribe"} if "transcribe" in self.recogniser.tasks else {}
        if self.recogniser.languages and self.language != DETECT:
            told["language"] = self.language
        ids = generate_ids(model, encoded, **told)
        languages = self.languages_of(encoded, len(rows))
        tokenizer: Any = self.recogniser.processor.tokenizer
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for row, text, language in zip(rows, texts, languages, strict=True):
            self.heard[row.id] = HeardRow(
                text=text.strip(), cer=self.error_rate(row.text, text), language=language
            )

    def languages_of(self, encoded: Any, num_rows: int) -> list[str | None]:
        """Codes of the languages that the model takes the rows for."""
        if not self.recogniser.languages:
            return [None] * num_rows
        model: Any = self.recogniser.model
        names = {number: name for name, number in model.generation_config.lang_to_id.items()}
        detected = model.detect_language(encoder_outputs=encoded).flatten().tolist()
        return [names[number].strip("<|>") for number in detected]

    def error_rate(self, written: str, heard: str) -> float | None:
        reference = read_text(written, self.normalize)
        if not reference:
            return None
        return 100 * jiwer.cer(reference, read_text(heard, self.normalize))


def find_misfits(listeners: list[Listener]) -> dict[str, dict[str, str]]:
    """By id: rows whose transcript is far from what the model heard, or that are in another
    language."""
    heard: dict[str, HeardRow] = {}
    for listener in listeners:
        heard |= listener.heard
    reasons = unlike_transcripts(heard)
    for listener in listeners:
        for row_id, found in other_languages(listener).items():
            reasons.setdefault(row_id, {}).update(found)
    return reasons


def median_cer(heard: dict[str, HeardRow]) -> float | None:
    """In percent; None if nothing was compared."""
    rates = [row.cer for row in heard.values() if row.cer is not None]
    return float(np.median(rates)) if rates else None


def unlike_transcripts(heard: dict[str, HeardRow]) -> dict[str, dict[str, str]]:
    usual = median_cer(heard)
    if usual is None:
        return {}
    rates = np.array([row.cer for row in heard.values() if row.cer is not None])
    # 1.4826: what makes the median deviation of a normal distribution its standard deviation.
    deviation = 1.4826 * float(np.median(np.abs(rates - usual)))
    limit = max(MIN_CER, usual + CER_DEVIATIONS * deviation)
    return {
        row_id: {
            "does_not_fit": f"CER {row.cer:.0f} %, {usual:.0f} % are usual; heard: "
            f"{printable(row.text[:LONGEST_EXAMPLE]) or 'nothing'}"
        }
        for row_id, row in heard.items()
        if row.cer is not None and row.cer > limit
    }


def other_languages(listener: Listener) -> dict[str, dict[str, str]]:
    """Of a data set whose language is known; empty if the model takes too much for another one."""
    if listener.language == DETECT:
        return {}
    found = {
        row_id: row.language
        for row_id, row in listener.heard.items()
        if row.language not in (None, listener.language)
    }
    if len(found) > MAX_SHARE_OF_OTHER_LANGUAGES * len(listener.heard):
        return {}
    return {
        row_id: {"other_language": f"sounds like {langcodes.Language.get(code).display_name()}"}
        for row_id, code in found.items()
        if code is not None
    }
