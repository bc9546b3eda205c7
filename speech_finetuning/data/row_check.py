"""What can be measured of one row without a model: its sound, its text, and how both go together."""

import hashlib
import unicodedata
from dataclasses import dataclass, field

import numpy as np

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.oddities import find_oddities
from speech_finetuning.data.preprocessing import Preprocessor
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.text import SPECIAL_TOKEN

SILENCE_IN_DB = 40.0  # below the loudest part of the clip (librosa.effects.split)
FULL_SCALE = 0.98  # of the range; resampling rounds the flat tops of clipped waves
# Scripts of alphabets, whose letters look alike and never share a word.
ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC")
APOSTROPHES = "'\u2019\u02bc\u2018`\u00b4\u02bb"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRow:
    """A usable row and its measures.

    written: the text as it stands in the data; text: as it is trained. audio_hash: of the decoded
    samples, so that one recording is the same in two formats. peak: of samples in [-1, 1].
    waveform: (n_samples,) at 16 kHz, while a model is to hear it.
    """

    id: str
    written: str
    text: str
    speaker: str | None
    seconds: float
    sampling_rate: int  # in Hz, of the file
    audio_hash: str
    peak: float
    clipped_share: float  # of the samples that are at full scale
    silent_share: float  # of the time
    waveform: np.ndarray | None = field(default=None, compare=False, repr=False)

    def letters_per_second(self) -> float:
        """Letters and digits in a second of what is not silent."""
        num_letters = sum(character.isalnum() for character in self.text)
        spoken = max(0.1, self.seconds * (1 - self.silent_share))
        return num_letters / spoken


@dataclass(kw_only=True)
class RowChecker:
    """One undecoded row to its measures. Threads share it. needs_tokens: whether the preprocessor
    has a tokenizer, so that the length of labels is checked too."""

    preprocessor: Preprocessor
    needs_tokens: bool = False
    keeps_waveform: bool = False

    def __call__(self, row: SourceRow) -> CheckedRow | Rejection:
        """Whatever is wrong with the row becomes a Rejection with its id.
        Raises: errors of the network that lasted too long."""
        if row.rejection is not None:
            return row.rejection
        try:
            return self.check(row)
        except Rejection as rejection:
            return Rejection(rejection.reason, rejection.detail, row.id)

    def check(self, row: SourceRow) -> CheckedRow:
        if row.audio is None and row.text is None:
            raise Rejection("row_unreadable", "neither audio nor text")
        if self.needs_tokens:
            text, _ = self.preprocessor.prepare_text(row.text)
        else:
            text = self.preprocessor.clean_text(row.text)
            found = SPECIAL_TOKEN.search(text)
            if found is not None:
                raise Rejection("text_has_special_tokens", f"{found.group()} is a control token")
        waveform, sampling_rate = self.preprocessor.prepare_audio(row.audio, row.segment, 1.0)
        return CheckedRow(
            id=row.id,
            written=row.text or "",
            text=text,
            speaker=row.speaker,
            seconds=len(waveform) / SAMPLE_RATE_IN_HZ,
            sampling_rate=sampling_rate,
            audio_hash=hash_of_samples(waveform),
            peak=float(np.abs(waveform).max()),
            clipped_share=float((np.abs(waveform) >= FULL_SCALE).mean()),
            silent_share=silent_share(waveform),
            waveform=waveform if self.keeps_waveform else None,
        )


def hash_of_samples(waveform: np.ndarray) -> str:
    """Of (n_samples,) in steps of 16 bits."""
    samples = np.clip(np.rint(waveform * 32_767), -32_768, 32_767).astype(np.int16)
    return hashlib.sha256(samples.tobytes()).hexdigest()[:16]


def silent_share(waveform: np.ndarray) -> float:
    """Of (n_samples,) at 16 kHz, the part that is far below its loudest; 1 for digital silence."""
    import librosa  # a second of imports, only for this

    if not waveform.any():
        return 1.0
    intervals = librosa.effects.split(waveform, top_db=SILENCE_IN_DB)
    return 1.0 - float((intervals[:, 1] - intervals[:, 0]).sum()) / len(waveform)


# ---- characters ----
def alphabet_of(character: str) -> str | None:
    """The script of a letter, if it is one of ALPHABETS."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").split(" ")[0]
    return name if name in ALPHABETS else None


def mixed_words(text: str) -> list[str]:
    """Words with letters of several alphabets, such as a Latin a in a Russian word."""
    if text.isascii():
        return []
    mixed = []
    for word in text.split():
        scripts = {alphabet_of(character) for character in word} - {None}
        if len(scripts) > 1:
            mixed.append(word)
    return mixed


def oddities_of(row: CheckedRow) -> set[str]:
    """What a text has of: digits, mixed_scripts, decomposed, ODDITIES; one name for each
    apostrophe."""
    found = set()
    if any(character.isdigit() for character in row.text):
        found.add("digits")
    if mixed_words(row.text):
        found.add("mixed_scripts")
    if not unicodedata.is_normalized("NFC", row.written):
        found.add("decomposed")
    for character in APOSTROPHES:
        if character in row.text:
            found.add(f"apostrophe {character} (U+{ord(character):04X})")
    return found | find_oddities(row.written).keys()
