"""What the bytes of an audio file say about themselves, before a decoder believes them.

libsndfile 1.2 decodes what it finds and is silent about the rest: the missing half of a WAV file,
the second of two joined Ogg streams, the samples after a header that was never completed.
"""

import struct
from dataclasses import dataclass

from speech_finetuning.base.rejections import Rejection

# A size beyond this is what programs write before they know it: ffmpeg 0xFFFFFFFF, sox 0x7FFFF000.
LARGEST_REAL_SIZE = 0x7FFF_0000
# Less is not heard, and happens in whole files: some programs count the header as samples.
NEGLIGIBLE_BYTES = 256
MAX_STREAMS = 64  # that are joined in one file
MP3_FRAMES_OF_A_STREAM = 4  # in a row; fewer may be the remains of a tag


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """How a file of chunks (IFF and its relatives) is laid out."""

    first_chunk: int  # bytes before it
    header: str  # of a chunk: name and size, for `struct`
    samples: bytes  # the name of the chunk with the samples
    alignment: int = 2  # chunks begin at multiples of it
    size_has_header: bool = False

    def aligned(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment


WAV = ChunkLayout(first_chunk=12, header="<4sI", samples=b"data")
CHUNK_LAYOUTS = {
    b"RIFF": WAV,
    b"RF64": WAV,
    b"RIFX": ChunkLayout(first_chunk=12, header=">4sI", samples=b"data"),
    b"FORM": ChunkLayout(first_chunk=12, header=">4sI", samples=b"SSND"),
    b"caff": ChunkLayout(first_chunk=8, header=">4sQ", samples=b"data", alignment=1),
    b"riff": ChunkLayout(
        first_chunk=40,
        header="<16sQ",
        samples=b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a",
        alignment=8,
        size_has_header=True,
    ),
}
TAGS = (b"ID3", b"TAG", b"APETAGEX")  # that programs for music append to any file
AU_BYTE_ORDERS = {b".snd": ">", b"dns.": "<"}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Where the samples of a file stand, and how many bytes of them its header states."""

    start: int
    size: int


def split_streams(data: bytes) -> list[bytes]:
    """The files that are joined in one, each with a header that libsndfile can read; mostly just
    one.

    Raises: Rejection(audio_damaged) if the file contains less, or more, than its header states.
    """
    kind = data[:4]
    if kind in CHUNK_LAYOUTS:
        streams = split_chunks(data, CHUNK_LAYOUTS[kind])
    elif kind in AU_BYTE_ORDERS:
        streams = split_au(data)
    elif kind == b"OggS":
        streams = split_ogg(data)
    elif kind[:3] == b"ID3" or is_mp3_frame(data, 0):
        streams = split_mp3(data)
    else:
        streams = [data]
    if len(streams) > MAX_STREAMS:
        raise Rejection("audio_unreadable", f"{len(streams)} files joined in one")
    return streams


def damaged(size: int, missing: int) -> Rejection:
    """Of a file of `size` bytes."""
    detail = f"the header states {missing} bytes more than the file of {size} bytes contains"
    return Rejection("audio_damaged", f"{detail}: a broken download?")


# ---- WAV, AIFF, W64, CAF: chunks ---------------------------------------------------------------


def find_samples(data: bytes, layout: ChunkLayout) -> Samples | None:
    """The chunk with the samples; None without it, which libsndfile reports."""
    header_size = struct.calcsize(layout.header)
    position = layout.first_chunk
    size_in_ds64 = None  # of RF64, whose chunk says 0xFFFFFFFF
    while position + header_size <= len(data):
        name, size = struct.unpack_from(layout.header, data, position)
        start = position + header_size
        if layout.size_has_header:
            size = max(size - header_size, 0)
        if name == b"ds64" and len(data) >= start + 16:
            (size_in_ds64,) = struct.unpack_from("<Q", data, start + 8)
        if name == layout.samples:
            if size_in_ds64 is not None and size > LARGEST_REAL_SIZE:
                size = size_in_ds64
            return Samples(start=start, size=size)
        position = layout.aligned(start + size)
    return None


def split_chunks(data: bytes, layout: ChunkLayout) -> list[bytes]:
    """As `split_streams`."""
    samples = find_samples(data, layout)
    if samples is None or samples.size > LARGEST_REAL_SIZE:
        return [data]
    missing = samples.start + samples.size - len(data)
    if missing > NEGLIGIBLE_BYTES:
        raise damaged(len(data), missing)
    end = samples.start + samples.size
    aligned_end = layout.aligned(end)
    if data[aligned_end : aligned_end + 4] == data[:4]:
        return [data[:aligned_end], *split_streams(data[aligned_end:])]
    rest = data[aligned_end:]
    if len(rest) <= NEGLIGIBLE_BYTES or is_named(rest, layout) or is_named(data[end:], layout):
        return [data]
    if samples.size == 0 and layout is WAV:
        return [with_stated_size(data, samples)]
    detail = f"the header states {samples.size} bytes of samples, {len(rest)} more bytes follow"
    raise Rejection("audio_damaged", detail)


def is_named(rest: bytes, layout: ChunkLayout) -> bool:
    """Whether what follows the samples is a chunk, a tag or padding, and not samples."""
    rest = rest.lstrip(b"\0")
    if len(rest) < struct.calcsize(layout.header) or rest.startswith(TAGS):
        return True
    name, size = struct.unpack_from(layout.header, rest)
    return all(32 <= letter < 127 for letter in name[:4]) and size <= len(rest)


def with_stated_size(data: bytes, samples: Samples) -> bytes:
    """A WAV file of a recorder that died before it wrote the size of the samples, with that
    size."""
    size = struct.pack("<I", len(data) - samples.start)
    return data[: samples.start - len(size)] + size + data[samples.start :]


def split_au(data: bytes) -> list[bytes]:
    """As `split_streams`. The header: magic, offset and size of the samples in bytes."""
    if len(data) < 12:
        return [data]
    start, size = struct.unpack_from(f"{AU_BYTE_ORDERS[data[:4]]}II", data, 4)
    if size > LARGEST_REAL_SIZE:
        return [data]
    missing = start + size - len(data)
    if missing > NEGLIGIBLE_BYTES:
        raise damaged(len(data), missing)
    rest = data[start + size :]
    if rest[:4] == data[:4]:
        return [data[: start + size], *split_streams(rest)]
    return [data]


# ---- Ogg: pages --------------------------------------------------------------------------------

OGG_PAGE_HEADER_SIZE = 27
OGG_FIRST_PAGE = 2  # flag of a stream's first page


def ogg_page_end(data: bytes, position: int) -> int:
    """Where the page at `position` ends, possibly beyond the data (RFC 3533, section 6)."""
    table = position + OGG_PAGE_HEADER_SIZE
    if table > len(data):
        return table
    num_segments = data[table - 1]
    return table + num_segments + sum(data[table : table + num_segments])


def split_ogg(data: bytes) -> list[bytes]:
    """As `split_streams`: a new file begins where first pages follow other pages (a chained
    stream).

    A last page that is cut is damage: libsndfile decodes nothing of Vorbis then, and of Opus less.
    """
    starts = [0]
    position = 0
    is_among_first_pages = True  # several in a row are of streams that play together
    while data[position : position + 4] == b"OggS":
        end = ogg_page_end(data, position)
        if end > len(data):
            raise Rejection("audio_damaged", "the file ends within an Ogg page: a broken download?")
        is_first_page = bool(data[position + 5] & OGG_FIRST_PAGE)
        if is_first_page and not is_among_first_pages:
            starts.append(position)
        is_among_first_pages = is_first_page
        position = end
    ends = [*starts[1:], len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


# ---- mp3: frames -------------------------------------------------------------------------------

# In kbit/s, by the header's index: MPEG 1 and MPEG 2 / 2.5, layer III.
MP3_BIT_RATES = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_SAMPLE_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def mp3_frame_size(data: bytes, position: int) -> int:
    """Bytes of the layer III frame at `position`; 0 if there is none, or its bit rate is free."""
    if len(data) < position + 4 or data[position] != 0xFF or data[position + 1] & 0xE6 != 0xE2:
        return 0
    version = data[position + 1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bit_rate_index = data[position + 2] >> 4
    sample_rate_index = data[position + 2] >> 2 & 3
    if version == 1 or bit_rate_index == 15 or sample_rate_index == 3:
        return 0
    bit_rate = 1000 * MP3_BIT_RATES[3 if version == 3 else 2][bit_rate_index]
    if bit_rate == 0:
        return 0
    padding = data[position + 2] >> 1 & 1
    bytes_by_rate = 144 if version == 3 else 72  # samples of a frame / 8
    return bytes_by_rate * bit_rate // MP3_SAMPLE_RATES[version][sample_rate_index] + padding


def is_mp3_frame(data: bytes, position: int) -> bool:
    return mp3_frame_size(data, position) > 0


def find_mp3_stream(data: bytes, start: int, end: int) -> int | None:
    """The first of some frames in a row that begin from `start` on, before `end`."""
    position = data.find(b"\xff", start, end)
    while position >= 0:
        following = position
        for _ in range(MP3_FRAMES_OF_A_STREAM):
            size = mp3_frame_size(data, following)
            if size == 0:
                break
            following += size
        else:
            return position
        position = data.find(b"\xff", position + 1, end)
    return None


def after_id3(data: bytes, position: int) -> int:
    """Behind an ID3v2 tag, if there is one at `position`; its size has 7 bits in each byte."""
    if data[position : position + 3] != b"ID3" or len(data) < position + 10:
        return position
    size = 0
    for byte in data[position + 6 : position + 10]:
        size = size << 7 | byte & 0x7F
    return position + 10 + size


def place_of_mp3_tag(data: bytes, frame: int) -> int:
    """Where in a first frame its Xing or Info header stands, if it has one."""
    is_mono = data[frame + 3] >> 6 == 3
    is_mpeg_1 = (data[frame + 1] >> 3 & 3) == 3
    side_information_sizes = (32, 17) if is_mpeg_1 else (17, 9)  # of stereo and mono
    return frame + 4 + side_information_sizes[is_mono]


def has_mp3_length(data: bytes, frame: int) -> bool:
    """Whether the first frame has a Xing, Info or VBRI header that states the number of frames."""
    tag = place_of_mp3_tag(data, frame)
    if data[tag : tag + 4] in (b"Xing", b"Info") and len(data) >= tag + 8:
        return bool(data[tag + 7] & 1)
    return data[frame + 36 : frame + 40] == b"VBRI"


def stated_mp3_size(data: bytes, frame: int) -> int | None:
    """Bytes of the stream whose first frame stands at `frame`, by its Xing, Info or VBRI header."""
    if len(data) < frame + 64:
        return None
    if data[frame + 36 : frame + 40] == b"VBRI":
        (size,) = struct.unpack_from(">I", data, frame + 46)
        return size
    tag = place_of_mp3_tag(data, frame)
    if data[tag : tag + 4] not in (b"Xing", b"Info"):
        return None
    flags, first_number, second_number = struct.unpack_from(">III", data, tag + 4)
    has_frames = bool(flags & 1)
    has_size = bool(flags & 2)
    if not has_size:
        return None
    return second_number if has_frames else first_number


@dataclass(frozen=True, kw_only=True)
class Mp3Frames:
    """A row of frames of one sampling rate. end: behind the last."""

    count: int
    end: int
    has_one_size: bool  # within a byte of padding


def follow_mp3_frames(data: bytes, frame: int) -> Mp3Frames:
    """Those from the one at `frame` on."""
    rate = data[frame + 1] & 0x18, data[frame + 2] & 0x0C  # version and index
    first_size = mp3_frame_size(data, frame)
    count = 0
    has_one_size = True
    position = frame
    while size := mp3_frame_size(data, position):
        if (data[position + 1] & 0x18, data[position + 2] & 0x0C) != rate:
            break
        has_one_size = has_one_size and abs(size - first_size) <= 1
        count += 1
        position += size
    return Mp3Frames(count=count, end=position, has_one_size=has_one_size)


def with_stated_frames(data: bytes, frame: int, num_frames: int) -> bytes:
    """An mp3 stream behind a frame that states how many follow. Without one the decoder guesses the
    length by the first frame's bit rate, and ends there, be it in the middle of a sentence."""
    size = mp3_frame_size(data, frame)
    header = bytearray(size)
    header[:4] = data[frame : frame + 4]
    header[1] |= 1  # no checksum
    tag = place_of_mp3_tag(data, frame) - frame
    if tag + 12 > size:  # of a bit rate that is too low to hold it
        return data
    struct.pack_into(">4sII", header, tag, b"Xing", 1, num_frames)
    return bytes(header) + data[frame:]


def split_mp3(data: bytes) -> list[bytes]:
    """As `split_streams`: the decoder ends where the first stream's header says that it ends, and
    where there is none, as it guesses."""
    frame = after_id3(data, 0)
    if not is_mp3_frame(data, frame):
        return [data]
    size = stated_mp3_size(data, frame)
    if size is None and not has_mp3_length(data, frame):
        return split_unstated_mp3(data, frame)
    if size is None or frame + size >= len(data) - NEGLIGIBLE_BYTES:
        return [data]
    end = frame + size
    # Tags of the first may stand between, with pictures in them: all that remains is looked
    # through.
    following = find_mp3_stream(data, end, len(data))
    if following is None:
        return [data]
    return [data[:end], *split_mp3(data[following:])]


def split_unstated_mp3(data: bytes, frame: int) -> list[bytes]:
    """As `split_mp3`, of a stream whose length no header states."""
    found = follow_mp3_frames(data, frame)
    following = find_mp3_stream(data, found.end, len(data))
    if following is None and found.has_one_size:
        return [data]  # which the decoder guesses right
    stream = with_stated_frames(data[: found.end], frame, found.count)
    return [stream] if following is None else [stream, *split_mp3(data[following:])]
