"""CSV, TSV and JSON lines as other programs write them: read right, or refused line by line."""

import json
from pathlib import Path
from typing import Any

import pytest
from rows import outcomes, read_rows, write_clips

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.tables import MAX_LINE_LENGTH


def write_list(folder: Path, lines: list[str], name: str = "train.csv", encoding="utf-8") -> str:
    """A list beside four clips; its path."""
    write_clips(folder)
    path = folder / name
    path.write_bytes("\n".join(lines).encode(encoding))
    return str(path)


def details(path: str) -> list[str]:
    """What is wrong with each row that cannot be read."""
    rows = read_rows(load_source(path, split="train"))
    return [row.rejection.detail for row in rows if row.rejection is not None]


# ---- cells and quotation marks ----
def test_a_row_with_more_cells_than_the_header_is_rejected_with_its_line(
    tmp_path: Path, preprocessor
):
    lines = ["path,sentence", "clips/0.wav,uno, dos", 'clips/1.wav,"tres, cuatro"']
    path = write_list(tmp_path, lines)
    assert outcomes(load_source(path, split="train"), preprocessor) == [
        "row_unreadable",
        "tres, cuatro",
    ]
    (detail,) = details(path)
    assert "train.csv, line 2: 3 cells, but the table has 2 columns" in detail
    assert "quotation marks" in detail


def test_empty_cells_after_the_last_column_are_nothing(tmp_path: Path, preprocessor):
    path = write_list(tmp_path, ["path,sentence", "clips/0.wav,uno,,", "clips/1.wav,dos,"])
    assert outcomes(load_source(path, split="train"), preprocessor) == ["uno", "dos"]


def test_a_tab_within_a_transcript_is_rejected(tmp_path: Path, preprocessor):
    path = write_list(tmp_path, ["path\tsentence", "clips/0.wav\tuno\tdos"], "train.tsv")
    assert outcomes(load_source(path, split="train"), preprocessor) == ["row_unreadable"]


def test_a_quotation_mark_that_is_not_closed_costs_one_row(tmp_path: Path, preprocessor):
    lines = ["path,sentence", *(f"clips/{i % 4}.wav,uno dos" for i in range(300))]
    lines[101] = 'clips/0.wav,"uno dos'
    source = load_source(write_list(tmp_path, lines), split="train")
    assert source.num_rows == 300
    found = outcomes(source, preprocessor)
    assert found.count("uno dos") == 299 and found[100] == "row_unreadable"
    assert "line 102: a quotation mark is not closed" in details(source.data_files[0])[0]


def test_a_mark_that_a_later_line_closes_puts_no_path_into_a_label(tmp_path: Path, preprocessor):
    lines = [
        "path,sentence",
        'clips/0.wav,"uno dos',
        'clips/1.wav,tres "cuatro"',
        "clips/2.wav,seis",
    ]
    source = load_source(write_list(tmp_path, lines), split="train")
    assert outcomes(source, preprocessor) == ["row_unreadable", 'tres "cuatro"', "seis"]


def test_an_open_mark_before_more_than_csv_s_limit_of_a_field(tmp_path: Path, preprocessor):
    lines = ["path,sentence", 'clips/0.wav,"uno dos', *["clips/1.wav,tres cuatro"] * 9000]
    source = load_source(write_list(tmp_path, lines), split="train")
    assert source.num_rows == 9001
    assert [row.text for row in read_rows(source)].count("tres cuatro") == 9000


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('"uno\ndos"', "uno dos"),  # a line break within quotation marks
        ('"dice ""uno"""', 'dice "uno"'),  # RFC 4180
        ('"dice \\"uno\\", dos"', 'dice "uno", dos'),  # Spark, MySQL
        (' "uno, dos"', "uno, dos"),  # a space after the comma
        ('dice "uno"', 'dice "uno"'),
    ],
)
def test_quotation_marks_as_programs_write_them(tmp_path: Path, preprocessor, cell: str, text: str):
    path = write_list(tmp_path, ["path,sentence", f"clips/0.wav,{cell}", "clips/1.wav,tres"])
    assert outcomes(load_source(path, split="train"), preprocessor) == [text, "tres"]


def test_a_line_beyond_the_bound_is_rejected_and_the_next_is_read(tmp_path: Path, preprocessor):
    lines = ["path,sentence", f"clips/0.wav,{'a' * MAX_LINE_LENGTH}", "clips/1.wav,dos"]
    path = write_list(tmp_path, lines)
    assert outcomes(load_source(path, split="train"), preprocessor) == ["row_unreadable", "dos"]
    assert "longer than" in details(path)[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("within", ["\n", "\r"])
@pytest.mark.parametrize(
    ("header", "torn", "whole"),
    [
        ("path,sentence", "clips/0.wav,uno dos|tres", "clips/1.wav,seis"),
        ("path,sentence,speaker", "clips/0.wav,uno dos|tres,Ana", "clips/1.wav,seis,Ben"),
        ("path,sentence", "clips/0.wav,uno dos|tres|cuatro", "clips/1.wav,seis"),
    ],
)
def test_a_line_break_without_quotation_marks_cuts_no_label(
    tmp_path: Path, preprocessor, end: str, within: str, header: str, torn: str, whole: str
):
    lines = [header, whole, torn.replace("|", within), whole]
    write_clips(tmp_path)
    path = tmp_path / "train.csv"
    path.write_bytes(end.join(lines).encode())
    found = outcomes(load_source(str(path), split="train"), preprocessor)
    assert found[:2] == ["seis", "row_unreadable"] and found[-1] == "seis"
    assert "uno dos" not in found
    assert "line 3: a cell goes on in line 4" in details(str(path))[0]


def test_rows_without_a_text_tear_no_other(tmp_path: Path, preprocessor):
    lines = ["path,sentence", "clips/0.wav,uno", "clips/1.wav", "clips/2.wav,tres", ""]
    path = write_list(tmp_path, lines)
    expected = ["uno", "text_empty", "tres"]
    assert outcomes(load_source(path, split="train"), preprocessor) == expected


# ---- delimiters and headers ----
@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=,"])
def test_the_separator_that_excel_takes_is_no_header(tmp_path: Path, preprocessor, first: str):
    delimiter = "," if "," in first else ";"
    lines = [first, f"path{delimiter}sentence", f"clips/0.wav{delimiter}uno"]
    path = write_list(tmp_path, lines)
    assert outcomes(load_source(path, split="train"), preprocessor) == ["uno"]


@pytest.mark.parametrize(
    ("name", "header", "row"),
    [
        ("train.csv", "path;sentence", "clips/0.wav;uno, dos"),
        ("train.csv", "path|sentence", "clips/0.wav|uno, dos"),
        ("train.csv", "path\tsentence", "clips/0.wav\tuno, dos"),
        ("train.csv", "Path,Sentence", 'clips/0.wav,"uno, dos"'),
        ("train.csv", "path, sentence", 'clips/0.wav, "uno, dos"'),
        ("train.csv", "filename,text", 'clips/0.wav,"uno, dos"'),
        ("train.csv", "wav_filename,wav_filesize,transcript", 'clips/0.wav,9,"uno, dos"'),
        ("train.tsv", "path,sentence", "clips/0.wav,uno"),
        ("train.CSV", "path,sentence", 'clips/0.wav,"uno, dos"'),
    ],
)
def test_delimiters_and_headers_of_other_programs(
    tmp_path: Path, preprocessor, name: str, header: str, row: str
):
    path = write_list(tmp_path, [header, row], name)
    text = "uno" if name.endswith("tsv") else "uno, dos"
    assert outcomes(load_source(path, split="train"), preprocessor) == [text]


@pytest.mark.parametrize("rows", [["clips/0.wav,uno"], ["uno;clips/0.wav"], ["0|uno"]])
def test_a_list_without_a_header_is_read_where_it_is_clear(
    tmp_path: Path, preprocessor, rows: list[str], caplog: pytest.LogCaptureFixture
):
    path = write_list(tmp_path, rows)
    assert outcomes(load_source(path, split="train"), preprocessor) == ["uno"]
    assert "has no header" in caplog.text


def test_a_list_without_a_header_that_is_not_clear_says_what_to_write(tmp_path: Path):
    path = write_list(tmp_path, ["clips/0.wav,uno,speaker 1"])
    with pytest.raises(UserError, match="write one: path,sentence"):
        load_source(path, split="train")


# ---- encodings ----
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_a_byte_order_mark_decides(tmp_path: Path, preprocessor, encoding: str, name: str):
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = [f"path{delimiter}sentence", f"clips/0.wav{delimiter}señal número"]
    if name.endswith("jsonl"):
        row = {"path": "clips/0.wav", "sentence": "señal número"}
        lines = [json.dumps(row, ensure_ascii=False)]
    path = write_list(tmp_path, lines, name, encoding)
    assert outcomes(load_source(path, split="train"), preprocessor) == ["señal número"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman", "gb18030", "utf-16-le"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_another_encoding_is_one_line_with_its_remedy(tmp_path: Path, encoding: str, name: str):
    delimiter = "\t" if name.endswith("tsv") else ","
    text = "uno" if encoding == "utf-16-le" else "é 一" if encoding == "gb18030" else "señal"
    lines = [
        f"path{delimiter}sentence",
        f"clips/0.wav{delimiter}dos",
        f"clips/0.wav{delimiter}{text}",
    ]
    path = write_list(tmp_path, lines, name, encoding)
    line = 1 if encoding == "utf-16-le" else 3
    with pytest.raises(UserError, match=rf"{name}, line {line}: .* iconv -f \S+ -t UTF-8 {path} >"):
        load_source(path, split="train")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["uno", "señal", "一二三四五六七八九十" * 9])
@pytest.mark.parametrize("name", ["train.csv", "train.json"])
def test_the_encoding_without_a_byte_order_mark_is_named(
    tmp_path: Path, encoding: str, text: str, name: str
):
    lines = ["path,sentence", *(f"clips/{number}.wav,{text}" for number in range(4))]
    if name.endswith("json"):
        rows = [{"path": "clips/0.wav", "sentence": text}] * 4
        lines = [json.dumps(rows, ensure_ascii=False)]
    path = write_list(tmp_path, lines, name, encoding)
    code = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    message = f"line 1: is {code} without a byte order mark.* iconv -f {code} -t UTF-8 .*{name} >"
    with pytest.raises(UserError, match=message):
        load_source(path, split="train")


@pytest.mark.parametrize("line", ["clips/1.wav,u\0no", "\0" * 4096, "clips/1.wav,uno\0\0\0"])
def test_nul_bytes_of_a_damaged_file_are_no_encoding(tmp_path: Path, line: str):
    path = write_list(tmp_path, ["path,sentence", *["clips/0.wav,uno"] * 400, line])
    with pytest.raises(UserError, match="line 402: contains NUL bytes, which no text has"):
        load_source(path, split="train")


def test_characters_that_a_conversion_has_lost_are_not_trained(tmp_path: Path, preprocessor):
    path = write_list(tmp_path, ["path,sentence", "clips/0.wav,se\ufffdal", "clips/1.wav,dos"])
    assert outcomes(load_source(path, split="train"), preprocessor) == ["row_unreadable", "dos"]


# ---- JSON ----
JSON_ROWS = [{"path": "clips/0.wav", "sentence": "uno"}, {"path": "clips/1.wav", "sentence": "dos"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("value", [JSON_ROWS, {"data": JSON_ROWS}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_json_array_is_read(
    tmp_path: Path, preprocessor, value: Any, indent: int | None, encoding: str
):
    path = write_list(tmp_path, [json.dumps(value, indent=indent)], "train.json", encoding)
    source = load_source(path, split="train")
    assert source.num_rows == 2 and outcomes(source, preprocessor) == ["uno", "dos"]


def test_what_is_wrong_in_an_array_costs_its_entry(tmp_path: Path, preprocessor):
    rows = [JSON_ROWS[0], 3, {"path": "clips/1.wav", "sentence": [1]}]
    path = write_list(tmp_path, [json.dumps(rows, indent=1)], "train.json")
    assert outcomes(load_source(path, split="train"), preprocessor) == [
        "uno",
        *["row_unreadable"] * 2,
    ]
    assert "entry 2: expected a JSON object, found int" in details(path)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "no JSON: .* Mend it there"),
        ('{\n"a": 1}', "expected an array of objects, or one object a line"),
        ('{\n"a": [{"b": 1}], "c": [{"b": 1}]}', "expected an array of objects"),
    ],
)
def test_other_json_says_what_to_write(tmp_path: Path, text: str, message: str):
    path = write_list(tmp_path, [text], "train.json")
    with pytest.raises(UserError, match=message):
        load_source(path, split="train")


def test_an_array_beyond_the_bound_says_how_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_list(tmp_path, [json.dumps(JSON_ROWS)], "train.json")
    monkeypatch.setattr("speech_finetuning.data.tables.MAX_JSON_IN_BYTES", 60)
    with pytest.raises(UserError, match=r"jq -c '\.\[\]' 'train.json' > 'train.jsonl'"):
        load_source(path, split="train")


def test_a_row_with_objects_in_it_is_a_row(tmp_path: Path, preprocessor):
    row = JSON_ROWS[0] | {"words": [{"word": "uno"}]}
    path = write_list(tmp_path, [json.dumps(row)], "train.jsonl")
    assert outcomes(load_source(path, split="train"), preprocessor) == ["uno"]


def test_a_file_without_any_json_says_so(tmp_path: Path):
    path = write_list(tmp_path, ["path,sentence", "clips/0.wav,uno"], "train.jsonl")
    message = r"train.jsonl, line 1: no JSON: Expecting value.*\. Write an object on each line: {"
    with pytest.raises(UserError, match=message):
        load_source(path, split="train")


def test_lines_that_are_no_json_object_are_rejected_with_their_number(tmp_path: Path, preprocessor):
    lines = ['{"path": "clips/0.wav", "sentence": "uno"}', "", '{"path": "cl', "[]", "[" * 5000]
    path = write_list(tmp_path, lines, "train.jsonl")
    assert outcomes(load_source(path, split="train"), preprocessor) == [
        "uno",
        *["row_unreadable"] * 3,
    ]
    assert ["line 3" in details(path)[0], "line 4" in details(path)[1]] == [True, True]
