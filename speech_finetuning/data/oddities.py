"""What stands in transcripts although nobody says it: how other programs mark, escape and misread
text."""

import re

# {name: what is looked for}; a match is shown as an example.
ODDITIES = {
    "markup": re.compile(r"</?[A-Za-z][^<>]{0,80}>|&(?:[A-Za-z]{2,8}|#x?[0-9A-Fa-f]{1,6});"),
    "escapes": re.compile(r"\\(?:[nrt\"/]|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2})"),
    "placeholders": re.compile(r"^\s*(?:nan|none|null|n/a|#n/a|undefined)\s*$", re.IGNORECASE),
    "speaker_names": re.compile(r"^\s*(?:speaker|spk)[ _]?\w{1,3}\s*:", re.IGNORECASE),
    "notes_in_brackets": re.compile(r"\[[^\[\]]{1,40}\]"),
}
DESCRIPTIONS = {
    "markup": "markup",
    "escapes": "escapes of a program",
    "placeholders": "a word for an empty cell alone",
    "speaker_names": "a speaker's name",
    "notes_in_brackets": "notes in brackets",
}
# UTF-8 that was read as one of these looks like "seÃ±al", or "РґРѕРј" for "дом".
WRONG_ENCODINGS = ("cp1252", "cp1251")
# Bytes that Windows' code pages leave out stay as they are, U+0081 say, in what programs write.
LATIN_CONTROLS = range(0x80, 0xA0)
# "Рё" may be a word; several such pairs, and nothing else beyond ASCII, are none.
FEWEST_CYRILLIC_PAIRS = 2
# Signs that follow no letter in a word, and controls that no text has. "ÉŠ", "Ä…" and "Ã»" may be
# two letters, or the last of a word and a mark.
SIGNS = frozenset(map(chr, range(0x80, 0xC0))) - frozenset("\u00a0«»·\u00ad")


def find_oddities(text: str) -> dict[str, str]:
    """{name: the first match} of what a transcript has of ODDITIES."""
    found = {}
    for name, pattern in ODDITIES.items():
        match = pattern.search(text)
        if match is not None:
            found[name] = match.group().strip()
    return found


def as_it_was(text: str) -> str | None:
    """The text that was written, if this is its UTF-8 read in another encoding; else None.

    Only if all letters beyond ASCII are such pairs and triples, which no spelling of a language has.
    """
    if text.isascii():
        return None
    for encoding in WRONG_ENCODINGS:
        data = bytes_in(text, encoding)
        if data is None:
            continue
        try:
            original = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        num_pairs = sum(not character.isascii() for character in original)
        is_sure = num_pairs >= FEWEST_CYRILLIC_PAIRS
        if encoding == "cp1252":
            is_sure = not SIGNS.isdisjoint(text)
        if is_sure:
            return original
    return None


def bytes_in(text: str, encoding: str) -> bytes | None:
    """None if the text has characters that the encoding has not."""
    data = bytearray()
    for character in text:
        try:
            data += character.encode(encoding)
        except UnicodeEncodeError:
            if ord(character) not in LATIN_CONTROLS:
                return None
            data.append(ord(character))
    return bytes(data)
