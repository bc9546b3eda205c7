"""Transcripts with times as people's programs write them, cue by cue."""

import json
from typing import Any

import pytest

from speech_finetuning.data.subtitles import parse_transcript


def cues_of(text: str, suffix: str) -> list[tuple[float | None, float | None, str]]:
    """Of cues without a problem."""
    return [
        (cue.start_in_seconds, cue.end_in_seconds, cue.text)
        for cue in parse_transcript(text, suffix)
        if cue.problem is None
    ]


def srt(*texts: str, line_break: str = "\n") -> str:
    """Cues of a second each."""
    lines = []
    for number, text in enumerate(texts, start=1):
        times = f"00:00:0{number - 1},000 --> 00:00:0{number},000"
        lines += [str(number), times, *text.split("\n"), ""]
    return line_break.join(lines)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_subrip_whatever_ends_its_lines(line_break: str):
    text = srt("uno", "dos\ntres", line_break=line_break)
    assert cues_of(text, ".srt") == [(0, 1, "uno"), (1, 2, "dos tres")]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("<i>uno</i> <font color='red'>dos</font>", "uno dos"),
        ("{\\an8}uno", "uno"),
        ("1 < 2 > 0", "1 < 2 > 0"),
        ("uno &amp; dos &#39;tres&#39;", "uno & dos 'tres'"),
        ("AT&T &copy", "AT&T &copy"),
        ("u\x07n\x00o\tdos\x0btres\u2028seis", "uno dos tres seis"),
        ("uno\n\ndos", "uno dos"),
        ("in\n1999", "in 1999"),
        ("", ""),
        ("日本\n語", "日本語"),
    ],
)
def test_texts_of_subrip(written: str, text: str):
    assert [cue[2] for cue in cues_of(srt(written, "fin"), ".srt")] == [text, "fin"]


def test_numbers_of_cues_are_no_text_with_or_without_empty_lines():
    text = "1\n00:00:00,000 --> 00:00:01,000\nuno\n2\n00:00:01,000 --> 00:00:02,000\ndos\n\n3\n"
    text += "00:00:02,000 --> 00:00:03,000\n"
    assert [cue[2] for cue in cues_of(text, ".srt")] == ["uno", "dos", ""]


def test_one_bad_cue_costs_no_other():
    text = srt("uno", "dos", "tres").replace("00:00:01,000 -->", "00:00:1x,000 -->")
    assert cues_of(text, ".srt") == [(0, 1, "uno"), (2, 3, "tres")]
    text = srt("uno", "dos", "tres").replace("--> 00:00:02", "--> 00:00:01")
    (problem,) = [cue for cue in parse_transcript(text, ".srt") if cue.problem]
    assert problem.line == 6 and problem.problem == "ends at 1 s, but begins at 1 s"


VTT = """WEBVTT - of a talk

STYLE
::cue { color: red }

NOTE not said

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Anna>Hello <00:00:01.500><c.loud>you</c>

NOTE
nor this

100:00:02.000 --> 100:00:03.000
A&nbsp;b &lt;3
"""


def test_webvtt_without_hours_with_notes_names_and_voices():
    assert cues_of(VTT, ".vtt") == [(1, 2.5, "Hello you"), (360_002, 360_003, "A b <3")]


def test_captions_that_roll_up_say_each_line_once():
    """As YouTube writes automatic ones: a line comes again above the next one."""
    parts = ["WEBVTT\n"]
    words = ["uno", "dos", "tres", "seis"]
    for i, word in enumerate(words):
        above = words[i - 1] if i else " "
        parts.append(f"00:0{i}.000 --> 00:0{i}.990\n{above}\n<c>{word}</c>\n")
        parts.append(f"00:0{i}.990 --> 00:0{i + 1}.000\n{word}\n \n")
    assert [cue[2] for cue in cues_of("\n".join(parts), ".vtt")] == words


def test_a_line_that_is_said_twice_stays():
    assert [cue[2] for cue in cues_of(srt("no", "no", "sí", "tal vez"), ".srt")][:2] == ["no", "no"]


def test_cues_with_the_same_times_are_one_utterance_others_may_overlap():
    text = "1\n00:00:00,000 --> 00:00:02,000\nuno\n\n2\n00:00:00,000 --> 00:00:02,000\ndos\n\n"
    text += "3\n00:00:01,000 --> 00:00:03,000\ntres\n"
    assert cues_of(text, ".srt") == [(0, 2, "uno dos"), (1, 3, "tres")]


@pytest.mark.parametrize(
    "value",
    [
        {"text": " uno dos", "segments": [{"start": 0, "end": 1.5, "text": " uno"}]},
        {"transcription": [{"offsets": {"from": 0, "to": 1500}, "text": " uno"}]},
        {"chunks": [{"timestamp": [0.0, 1.5], "text": " uno"}]},
    ],
)
def test_json_of_whisper_and_its_kin(value: Any):
    assert cues_of(json.dumps(value), ".json") == [(0, 1.5, "uno")]


@pytest.mark.parametrize(
    "segment", [{}, 3, {"text": 3}, {"text": "a"}, {"text": "a", "start": True, "end": 2}]
)
def test_segments_that_are_none_are_named(segment: Any):
    good = {"start": 1, "end": 2, "text": "uno"}
    cues = parse_transcript(json.dumps({"segments": [segment, good]}), ".json")
    assert [cue.text for cue in cues if cue.problem is None] == ["uno"]
    assert cues[0].problem is not None and "segments[0]" in cues[0].problem


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 5000, '{"a": NaN}'])
def test_other_json_is_refused(text: str):
    with pytest.raises(ValueError, match="JSON"):
        parse_transcript(text, ".json")


def test_audacity_labels_whisper_s_tsv_and_plain_text():
    labels = "0.000000\t1.500000\tuno\n\\\t100.0\t200.0\n1,5\t2,5\tdos\n3.0\t3.0\tpoint\n"
    assert cues_of(labels, ".txt") == [(0, 1.5, "uno"), (1.5, 2.5, "dos")]
    assert cues_of("start\tend\ttext\n0\t1500\tuno\n", ".tsv") == [(0, 1.5, "uno")]
    assert cues_of("uno\ndos\n", ".txt") == [(None, None, "uno dos")]
    with pytest.raises(ValueError, match=r"Whisper's TSV"):
        parse_transcript("path\tsentence\n", ".tsv")


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([{"start": 0, "text": "a"}, {"start": 2, "text": "b"}], [(0, 2, "a"), (2, None, "b")]),
        ([{"start": 0, "duration": 1.5, "text": "a"}, {"start": 2, "end": 3, "text": "b"}],
         [(0, 1.5, "a"), (2, 3, "b")]),
        ([{"timestamp": [0, None], "text": "a"}, {"timestamp": [2, 3], "text": "b"}],
         [(0, 2, "a"), (2, 3, "b")]),
        ([{"start": 2, "text": "a"}, {"start": 1, "end": 3, "text": "b"}], [(1, 3, "b")]),
        ([{"start": 10**400, "end": 1, "text": "a"}, {"start": 1, "end": 3, "text": "b"}],
         [(1, 3, "b")]),
    ],
)  # fmt: skip
def test_only_the_last_segment_goes_on_to_the_end_of_the_recording(segments, expected):
    """Else the words of one were trained with the sound of all that follow."""
    assert cues_of(json.dumps({"segments": segments}), ".json") == expected
