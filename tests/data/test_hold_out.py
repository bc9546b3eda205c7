"""What is held out of a training split: whole speakers, the same ones for ever, never trained on."""

import functools
import io
import itertools
import json
import shutil
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import make_clip, write_clips

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.hold_out import (
    choose_groups,
    choose_rows,
    load_or_hold_out,
)
from speech_finetuning.data.listed import WindowLimits
from speech_finetuning.data.passes import RankShare, read_pass
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.row_keys import read_keys
from speech_finetuning.data.selection import HoldOut, hash_of
from speech_finetuning.data.sources import MissingSplit, load_source
from speech_finetuning.data.stream import SpeechStream


@dataclass
class Record:
    """What `choose_rows` asks of the script's."""

    dataset_name: str
    train_split_name: str | None = "train"
    speaker_column_name: str | None = None
    eval_fraction: float = 0.1
    name: str = ""
    is_continued: bool = False
    hold_out: HoldOut | None = None


def open_speech(
    record: Record,
    preprocessor: Preprocessor,
    max_rows: int | None = None,
    window_limits: WindowLimits | None = None,
) -> dict[str, list[SpeechDataset]]:
    """As the script opens one data set to train and to score. window_limits: of training."""
    speech = {}
    for role, split in (("train", "train"), ("eval", "validation")):
        limits = window_limits if role == "train" else None
        source, is_held_out = load_or_hold_out(
            functools.partial(
                load_source, record.dataset_name, record=record.name, window_limits=limits
            ),
            role,
            split,
            record,
        )
        speech[role] = [
            SpeechDataset(source, preprocessor, max_rows=max_rows, is_held_out=is_held_out)
        ]
    return choose_rows(speech, [record])


def ids_read(dataset: SpeechDataset) -> list[str]:
    blocks = read_pass(dataset, block_size=7)
    return [row.id.split("/", 3)[-1] for block in blocks for row in block.rows]


def ids_trained(dataset: SpeechDataset, count: int, **changes: object) -> list[str]:
    settings = {"seed": 1, "block_size": 7, "micro_batch_size": 2, "num_threads": 1}
    stream = SpeechStream(sets=(dataset,), **{**settings, **changes})
    rows = itertools.islice(stream.rows(), count)
    return [drawn.row.id.split("/", 3)[-1] for _, drawn in rows]


def speaker_of(number: int) -> str:
    """Twenty speakers of five rows each, one after the other."""
    return f"speaker {number // 5}"


def write_list(folder: Path, num_rows: int = 100, column: str | None = "speaker") -> Path:
    """A list sorted by speaker."""
    folder.mkdir(exist_ok=True, parents=True)
    clip = make_clip(0.2)
    lines = ["path,sentence" + (f",{column}" if column else "")]
    for number in range(num_rows):
        (folder / f"{number:03}.wav").write_bytes(clip)
        lines.append(f"{number:03}.wav,uno" + (f",{speaker_of(number)}" if column else ""))
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, num_rows: int = 100, **columns: list) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    data = make_clip(0.2)
    audio = [{"bytes": data, "path": f"{number:03}.wav"} for number in range(num_rows)]
    for shard in range(2):
        rows = slice(shard * num_rows // 2, (shard + 1) * num_rows // 2)
        table = pa.table(
            {
                "audio": audio[rows],
                "text": ["uno"] * len(audio[rows]),
                **{name: values[rows] for name, values in columns.items()},
            }
        )
        pq.write_table(table, folder / f"train-{shard}.parquet", row_group_size=10)
    return folder


def numbers_of(ids: list[str]) -> set[int]:
    return {int(Path(row_id).stem) for row_id in ids}


@pytest.mark.parametrize("kind", ["list", "parquet"])
def test_whole_speakers_are_held_out_and_never_trained_on(
    tmp_path: Path, preprocessor, kind: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    if kind == "list":
        write_list(tmp_path / "speech")
    else:
        write_parquet(tmp_path / "speech", client_id=[speaker_of(n) for n in range(100)])
    speech = open_speech(Record(str(tmp_path / "speech")), preprocessor)
    (train,), (scored,) = speech["train"], speech["eval"]
    held_out = numbers_of(ids_read(scored))
    assert len(held_out) == 10 == scored.rows_per_pass() and train.rows_per_pass() == 90
    assert len({speaker_of(number) for number in held_out}) == 2
    trained = ids_trained(train, 270)
    for number in range(3):
        assert numbers_of(trained[90 * number : 90 * number + 90]) == set(range(100)) - held_out
    shares = [RankShare(rank=rank, world_size=2) for rank in (0, 1)]
    ranks = [ids_trained(train, 90, share=share) for share in shares]
    assert not numbers_of(ranks[0] + ranks[1]) & held_out
    lines = [message for message in caplog.messages if message.startswith("hold-out")]
    assert len(lines) == 1 and "10 of 100 rows" in lines[0] and "2 of 20 speakers" in lines[0]


def test_a_hold_out_is_the_same_in_another_folder(tmp_path: Path, preprocessor):
    first = write_list(tmp_path / "a", column=None)
    held_out = []
    for folder in (first, shutil.copytree(first, tmp_path / "moved" / "b")):
        held_out.append(ids_read(open_speech(Record(str(folder)), preprocessor)["eval"][0]))
    assert [numbers_of(ids) for ids in held_out] == [numbers_of(held_out[0])] * 2
    assert len(held_out[0]) == 10


def test_rows_that_are_added_change_nothing_of_what_a_checkpoint_held_out(
    tmp_path: Path, preprocessor
):
    folder = write_list(tmp_path / "speech")
    train = open_speech(Record(str(folder)), preprocessor)["train"][0]
    saved = HoldOut.from_json(json.loads(json.dumps(train.selection.hold_out.to_json())))
    before = numbers_of(ids_trained(train, 90))
    write_list(folder, num_rows=300)
    record = Record(str(folder), is_continued=True, hold_out=saved)
    speech = open_speech(record, preprocessor)
    held_out = numbers_of(ids_read(speech["eval"][0]))
    assert held_out == set(range(100)) - before
    assert numbers_of(ids_trained(speech["train"][0], 290)) == set(range(300)) - held_out


@pytest.mark.parametrize("added", ["train-00000-of-00003", "train-00001-of-00003", "train-00009"])
def test_a_parquet_file_that_is_added_changes_nothing_of_the_others(
    tmp_path: Path, preprocessor, added: str
):
    """Of rows that nothing names but their places; wherever the file is sorted in."""
    folder = tmp_path / "speech"
    clips = [{"bytes": make_clip(0.2), "path": None}] * 40
    write_table(folder / "train-00005-of-00002.parquet", clips, [f"a{i}" for i in range(40)])
    write_table(folder / "train-00006-of-00002.parquet", clips, [f"b{i}" for i in range(40)])
    speech = open_speech(Record(str(folder)), preprocessor)
    held_out = texts_read(speech["eval"][0])
    saved = speech["train"][0].selection.hold_out
    assert saved.by in ("recording", "row")
    write_table(folder / f"{added}.parquet", clips, [f"c{i}" for i in range(40)])
    record = Record(str(folder), is_continued=True, hold_out=saved)
    assert texts_read(open_speech(record, preprocessor)["eval"][0]) == held_out


def test_windows_of_an_audio_folder_are_held_out_by_recording(tmp_path: Path, preprocessor):
    """Its windows are other rows than the utterances that are scored."""
    folder = tmp_path / "train"
    folder.mkdir()
    lines = ["file_name,text,start,end"]
    for number in range(20):
        (folder / f"{number:03}.wav").write_bytes(make_clip(3.0))
        lines += [f"{number:03}.wav,t{number},{at},{at + 0.5}" for at in (0.0, 0.6, 1.2, 1.8, 2.4)]
    (folder / "metadata.csv").write_text("\n".join(lines))
    limits = preprocessor.window_limits(frozenset())
    speech = open_speech(Record(str(tmp_path)), preprocessor, window_limits=limits)
    (train,) = speech["train"]
    held_out = {name.partition("#")[0] for name in ids_read(speech["eval"][0])}
    trained = {name.partition("#")[0] for name in ids_trained(train, 40)}
    assert len(held_out) == 2 and len(trained) == 18 and not held_out & trained
    assert train.source.num_rows == 20 and len(train.selection.mask) == 20


def test_speakers_within_a_struct_are_held_out_whole(tmp_path: Path, preprocessor):
    meta = [{"speaker": speaker_of(number)} for number in range(100)]
    folder = write_parquet(tmp_path / "speech", meta=meta)
    record = Record(str(folder), speaker_column_name="meta.speaker")
    speech = open_speech(record, preprocessor)
    assert speech["train"][0].selection.hold_out.by == "speaker"
    held_out = numbers_of(ids_read(speech["eval"][0]))
    assert len(held_out) == 10 and len({speaker_of(number) for number in held_out}) == 2


def test_speakers_of_metadata_that_datasets_reads_are_held_out_whole(tmp_path: Path, preprocessor):
    folder = tmp_path / "train"
    folder.mkdir()
    names = [f"{number:03}.wav" for number in range(100)]
    for name in names:
        (folder / name).write_bytes(make_clip(0.2))
    speakers = [speaker_of(number) for number in range(100)]
    table = pa.table({"file_name": names, "text": ["uno"] * 100, "speaker": speakers})
    pq.write_table(table, folder / "metadata.parquet")
    speech = open_speech(Record(str(tmp_path)), preprocessor)
    assert speech["train"][0].selection.hold_out.by == "speaker"
    held_out = numbers_of(ids_read(speech["eval"][0]))
    assert len(held_out) == 10 and len({speaker_of(number) for number in held_out}) == 2


def test_a_list_that_grows_while_it_is_open_trains_nothing_that_was_held_out(
    tmp_path: Path, preprocessor
):
    folder = write_list(tmp_path / "speech")
    speech = open_speech(Record(str(folder)), preprocessor)
    write_list(folder, num_rows=101)
    with pytest.raises(UserError, match="has changed .* 101 rows, were 100"):
        ids_trained(speech["train"][0], 5)


def test_a_folder_that_is_added_changes_nothing_of_the_others(tmp_path: Path, preprocessor):
    write_talks(tmp_path / "talks" / "2023", range(20))
    speech = open_speech(Record(str(tmp_path / "talks")), preprocessor)
    held_out = ids_read(speech["eval"][0])
    saved = speech["train"][0].selection.hold_out
    write_talks(tmp_path / "talks" / "2024", range(20, 40))
    record = Record(str(tmp_path / "talks"), is_continued=True, hold_out=saved)
    assert ids_read(open_speech(record, preprocessor)["eval"][0]) == held_out


def test_a_hold_out_of_other_files_is_not_applied_to_tars(tmp_path: Path, preprocessor):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, data in (("a.wav", make_clip(0.2)), ("a.txt", b"uno")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    saved = HoldOut(by="speaker", groups=frozenset([1, 2]))
    record = Record(str(tmp_path), is_continued=True, hold_out=saved)
    with pytest.raises(UserError, match="held out before the checkpoint, by speaker"):
        open_speech(record, preprocessor)


def write_talks(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / f"{number:03}.wav").write_bytes(make_clip(0.2))
        (folder / f"{number:03}.txt").write_text("uno")


def write_table(path: Path, audio: list[dict], texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"audio": audio, "text": texts}), path)


def texts_read(dataset: SpeechDataset) -> set[str]:
    return {row.text for block in read_pass(dataset, block_size=7) for row in block.rows}


def test_a_run_that_was_trained_on_all_rows_gets_no_hold_out(tmp_path: Path, preprocessor):
    record = Record(str(write_list(tmp_path / "speech")), is_continued=True)
    with pytest.raises(UserError, match=r"was trained on all rows .* --eval_split_name"):
        open_speech(record, preprocessor)


def test_a_hold_out_stays_held_out_when_nothing_is_scored(tmp_path: Path, preprocessor):
    folder = write_list(tmp_path / "speech")
    speech = open_speech(Record(str(folder)), preprocessor)
    hold_out = speech["train"][0].selection.hold_out
    record = Record(str(folder), is_continued=True, hold_out=hold_out)
    train = replace(speech["train"][0], selection=None)
    (again,) = choose_rows({"train": [train]}, [record])["train"]
    assert np.array_equal(again.selection.mask, speech["train"][0].selection.mask)


def test_segments_of_a_recording_stay_together(tmp_path: Path, preprocessor):
    write_clips(tmp_path, 20)
    rows = [
        {"audio_filepath": f"clips/{n // 5}.wav", "text": "uno", "offset": 0.1 * (n % 5)}
        for n in range(100)
    ]
    text = "".join(json.dumps(row | {"duration": 0.1}) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    speech = open_speech(Record(str(tmp_path / "train.jsonl")), preprocessor)
    recordings = [row_id.split("#")[0] for row_id in ids_read(speech["eval"][0])]
    assert len(recordings) == 10 and len(set(recordings)) == 2
    trained = [row_id.split("#")[0] for row_id in ids_trained(speech["train"][0], 90)]
    assert not set(trained) & set(recordings)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_rows_of_tars_are_held_out_by_name(tmp_path: Path, preprocessor, suffix: str):
    from test_stream import make_tars

    make_tars(tmp_path / "speech", [60, 70, 70], suffix)
    speech = open_speech(Record(str(tmp_path / "speech")), preprocessor)
    held_out = numbers_of(ids_read(speech["eval"][0]))
    assert 8 < len(held_out) < 35
    rest = 200 - len(held_out)
    assert numbers_of(ids_trained(speech["train"][0], rest)) == set(range(200)) - held_out


def test_a_named_split_that_is_not_there_is_an_error(tmp_path: Path):
    folder = write_list(tmp_path / "speech")
    record = Record(str(folder))
    for role, split in (("eval", "dev"), ("test", "validation"), ("train", "validation")):
        with pytest.raises(MissingSplit, match=f"split '{split}'"):
            load_or_hold_out(
                lambda **changes: load_source(str(folder), **changes), role, split, record
            )


def test_a_guard_is_the_only_split_that_there_is(tmp_path: Path):
    """It need not be called as one to score: nothing else is read of it."""
    folder = write_list(tmp_path / "speech")
    load = functools.partial(load_source, str(folder))
    source, is_held_out = load_or_hold_out(load, "guard", "validation", Record(str(folder)))
    assert (source.split, is_held_out) == ("train", False)
    with pytest.raises(MissingSplit, match="split 'dev'"):
        load_or_hold_out(load, "guard", "dev", Record(str(folder)))


def test_a_column_of_speakers_that_is_not_there_is_an_error(tmp_path: Path, preprocessor):
    record = Record(str(write_list(tmp_path / "speech")), speaker_column_name="who")
    with pytest.raises(UserError, match=r"--speaker_column_name who: .*Found: path, sentence"):
        open_speech(record, preprocessor)


def test_rows_without_a_speaker_are_recordings_of_their_own(tmp_path: Path, preprocessor):
    speakers = ["Ana"] * 3 + [None, ""] + ["Ben"] * 5
    folder = write_parquet(tmp_path / "speech", num_rows=10, speaker=speakers)
    source = load_source(str(folder), split="train")
    keys = read_keys(SpeechDataset(source, preprocessor))
    expected = [hash_of("Ana")] * 3 + [hash_of("003.wav"), hash_of("004.wav")]
    assert keys.speakers.tolist() == expected + [hash_of("Ben")] * 5
    assert len(set(keys.rows.tolist())) == 10


def test_at_most_500_rows_are_scored(tmp_path: Path, preprocessor):
    speakers = [f"s{number % 10}" for number in range(12_000)]
    folder = write_parquet(tmp_path / "speech", num_rows=12_000, speaker=speakers)
    speech = open_speech(Record(str(folder)), preprocessor)
    assert speech["eval"][0].rows_per_pass() == 500
    assert speech["train"][0].rows_per_pass() == 10_800  # a speaker's 1,200 rows are not trained on


def test_samples_are_of_what_is_trained_and_of_what_is_held_out(tmp_path: Path, preprocessor):
    record = Record(str(write_list(tmp_path / "speech")))
    whole = open_speech(record, preprocessor)
    few = open_speech(record, preprocessor, max_rows=6)
    for role in ("train", "eval"):
        ids = ids_read(few[role][0])
        assert len(ids) == 6 and set(ids) < set(ids_read(whole[role][0]))


# ---- the choice of groups ----
def sizes_of(counts: list[int], fraction: float = 0.1, max_rows: int = 500) -> list[int] | None:
    """Sizes of the groups that are held out of groups of these sizes, whose keys are in order."""
    keys = np.repeat(np.arange(len(counts)), counts).astype(np.uint64)
    chosen = choose_groups(keys, fraction, max_rows)
    return None if chosen is None else [counts[number] for number in sorted(chosen)]


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [
        ([5] * 20, [5, 5]),
        ([50, 3, 40, 4, 3], [3, 4, 3]),  # those that fit
        ([20] * 5, [20]),  # none fits: one of at most twice as many rows
        ([60, 2, 38], [2]),  # too few, but no other is small enough
        ([50, 50], None),
        ([100], None),
        ([1] * 10, [1]),
        ([1] * 3, None),
        ([], None),
    ],
)
def test_groups_are_held_out_whole(counts: list[int], held_out: list[int] | None):
    assert sizes_of(counts) == held_out


def test_a_large_table_gives_up_500_rows():
    assert sum(sizes_of([7] * 10_000)) in range(490, 501)
