"""What a file is that libsndfile cannot read, and what to do about it."""

import re
from dataclasses import dataclass

from speech_finetuning.base.files import printable
from speech_finetuning.data.containers import find_mp3_stream

# What libsndfile knows, so that its own message says what is wrong within such a file.
DECODABLE_FILES = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff", b"caff", b".snd", b"fLaC", b"OggS")
# (where, bytes, suffix, name) of audio and video that ffmpeg converts.
CONVERTIBLE = (
    (4, b"ftypM4A", "m4a", "m4a"),
    (4, b"ftyp3g", "3gp", "3gp"),
    (4, b"ftypqt", "mov", "QuickTime"),
    (4, b"ftyp", "m4a", "m4a or mp4"),
    (0, b"\x1aE\xdf\xa3", "webm", "webm or Matroska"),
    (0, b"#!AMR", "amr", "AMR"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "wma", "WMA"),
    (0, b"ADIF", "aac", "AAC"),
    (0, b"FLV\x01", "flv", "Flash video"),
    (0, b".RMF", "rm", "RealAudio"),
    (0, b".ra\xfd", "ra", "RealAudio"),
    (0, b"#!SILK_V3", "silk", "SILK"),
    (0, b"\x02#!SILK_V3", "silk", "SILK"),
    (0, b"wvpk", "wv", "WavPack"),
    (0, b"MAC ", "ape", "Monkey's Audio"),
    (0, b"TTA1", "tta", "True Audio"),
    (0, b"tBaK", "tak", "TAK"),
    (0, b"MPCK", "mpc", "Musepack"),
    (0, b"MP+", "mpc", "Musepack"),
    (0, b"ajkg", "shn", "Shorten"),
    (0, b"DSD ", "dsf", "DSD"),
    (0, b"FRM8", "dff", "DSD"),
    (0, b"\x0bw", "ac3", "AC-3"),
    (8, b"AVI ", "avi", "AVI video"),
    (0, b"\x00\x00\x01\xba", "mpg", "MPEG video"),
    (28, b"Speex   ", "spx", "Speex"),
    (28, b"\x80theora", "ogv", "Theora video"),
    (0, b"NIST_1A", "sph", "NIST Sphere in a compressed form"),
    (0, b"RIFF", "wav", "WAV in a codec that is not supported"),
    (0, b"RIFX", "wav", "WAV in a codec that is not supported"),
    (0, b"FORM", "aiff", "AIFF in a codec that is not supported"),
    (0, b"OggS", "ogg", "Ogg in a codec that is not supported"),
    (0, b"caff", "caf", "CAF in a codec that is not supported"),
)
OTHER_FILES = (
    (0, b"PK\x03\x04", "a zip archive: unpack it"),
    (0, b"\x1f\x8b", "compressed with gzip: unpack it"),
    (0, b"BZh", "compressed with bzip2: unpack it"),
    (0, b"\xfd7zXZ\x00", "compressed with xz: unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (0, b"Rar!", "a rar archive: unpack it"),
    (257, b"ustar", "a tar archive: unpack it"),
    (0, b"PAR1", "a parquet file, not a clip: it is a data set of its own"),
    (0, b"\x93NUMPY", "a numpy array: write it as FLAC with soundfile.write"),
    (0, b"MThd", "MIDI, notes without sound"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
)
# What git writes in place of a symbolic link where the file system has none.
LINK = re.compile(
    r"[^\s\"<>{}]{1,250}\.(wav|flac|mp3|ogg|opus|m4a|mp4|webm|aac|aiff?)", re.IGNORECASE
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BYTES_OF_A_LOOK = 8192  # what is looked at of a file without a signature


@dataclass(frozen=True, kw_only=True)
class FileKind:
    suffix: str
    name: str


def is_web_page(data: bytes) -> bool:
    """Whether this is HTML, which servers send in place of a file, with status 200, too."""
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return re.match(rb"<!doctype html|<html|<head|<\?xml[^>]*>\s*<!doctype html", start) is not None


def convertible_kind(data: bytes) -> FileKind | None:
    """Of audio and video that FFmpeg reads; the first 64 bytes are enough."""
    for position, signature, suffix, name in CONVERTIBLE:
        if data.startswith(signature, position):
            return FileKind(suffix=suffix, name=name)
    if is_adts_aac(data):
        return FileKind(suffix="aac", name="AAC")
    return None


def describe_bytes(data: bytes) -> str:
    """What these bytes are, with a remedy."""
    if data.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself: run git lfs pull in the data's folder"
    if is_web_page(data):
        return "a web page (HTML), not audio: the download was answered with it; download again"
    for position, signature, name in OTHER_FILES:
        if data.startswith(signature, position):
            return name
    if len(data) > 188 and data[0] == data[188] == 0x47:  # packets of 188 bytes
        return f"an MPEG transport stream is not supported: {conversion('ts')}"
    kind = convertible_kind(data)
    if kind is not None:
        return f"{kind.name} is not supported: {conversion(kind.suffix)}"
    if find_mp3_stream(data, 0, min(len(data), BYTES_OF_A_LOOK)) is not None:
        return f"mp3 whose start is missing: download it again, or {conversion('mp3')}"
    return describe_text(data) or describe_unknown(data)


def conversion(suffix: str) -> str:
    return f"convert with ffmpeg -i IN.{suffix} -ar 16000 -ac 1 OUT.flac"


def is_adts_aac(data: bytes) -> bool:
    """Whether this begins with the header of an AAC frame (ISO 13818-7, section 6.2)."""
    if len(data) < 7 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0:
        return False
    sample_rate_index = data[2] >> 2 & 15
    frame_size = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    return sample_rate_index < 13 and frame_size > 7


def describe_text(data: bytes) -> str | None:
    """None if it is no text. It is quoted only where that helps: a row may name any file, and what
    is said of it goes into logs."""
    try:
        text = data[:BYTES_OF_A_LOOK].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(data), BYTES_OF_A_LOOK) - 3:  # not a letter cut at the end
            return None
        text = data[: error.start].decode("utf-8")
    if "\0" in text or not text.strip():
        return None
    text = text.strip()
    if LINK.fullmatch(text):
        return f'a link that was saved as text, to "{printable(text)}": put that file in its place'
    if text.startswith(("{", "[")):
        return "JSON, not audio: a server's answer in place of the file? Download it again"
    return "text, not audio"


def describe_unknown(data: bytes) -> str:
    advice = "ffmpeg -f s16le -ar RATE -ac 1 -i IN OUT.flac converts samples without a header"
    return f"Format not recognised, first bytes {data[:8].hex(' ')}. {advice}"
