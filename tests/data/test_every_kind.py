"""Every kind of data that docs/data.md names, by its command there."""

import functools
import io
import re
import shlex
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from rows import make_clip, outcomes, write_clips

import run_speech_recognition_seq2seq_streaming as script

PAGE = Path(script.__file__).parent / "docs" / "data.md"


@pytest.fixture
def every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data that the commands of docs/data.md name, beside each other."""
    monkeypatch.chdir(tmp_path)
    for folder in ("speech", "LJSpeech-1.1", "common_voice/de", "audio_folder/train"):
        (tmp_path / folder).mkdir(parents=True)
    write_clips(tmp_path)
    write_clips(tmp_path / "speech")
    write_clips(tmp_path / "common_voice" / "de")
    clip = make_clip()
    (tmp_path / "LJSpeech-1.1" / "wavs").mkdir()
    (tmp_path / "LJSpeech-1.1" / "wavs" / "LJ001-0001.wav").write_bytes(clip)
    (tmp_path / "audio_folder" / "train" / "0.wav").write_bytes(clip)
    texts = {
        "speech/train.csv": "path,sentence\nclips/0.wav,uno\n",
        "manifest.jsonl": '{"audio_filepath": "clips/0.wav", "text": "uno", "offset": 0.1, '
        '"duration": 0.5}\n',
        "corpus.json": '[{"file": "clips/0.wav", "meta": {"said": "uno"}}]',
        "train.csv": "path,sentence\nclips/0.wav,uno\n",
        "LJSpeech-1.1/metadata.csv": "LJ001-0001|Uno|uno\n",
        "common_voice/de/train.tsv": "client_id\tpath\tsentence\nx\t0.wav\tuno\n",
        "audio_folder/train/metadata.csv": "file_name,text\n0.wav,uno\n",
        "talks/talk.srt": "1\n00:00:00,100 --> 00:00:00,900\nuno\n",
        "kaldi/data/train/wav.scp": f"rec {tmp_path}/clips/0.wav\n",
        "kaldi/data/train/segments": "u1 rec 0.1 0.9\n",
        "kaldi/data/train/text": "u1 uno\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "talks" / "talk.wav").write_bytes(clip)
    rows = [{"audio": {"bytes": clip, "path": None}, "text": "uno"}]
    dataset = datasets.Dataset.from_list(rows)
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as tar:
        for name, data in {"0.wav": clip, "0.json": b'{"said": "uno"}'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return tmp_path


def commands_of_kinds() -> list[list[str]]:
    """The flags of each command in docs/data.md's section on them."""
    section = PAGE.read_text(encoding="utf-8").partition("### One command for each kind")[2]
    (block,) = re.findall(r"```bash\n(.*?)```", section.partition("\n### ")[0], re.S)
    words = [shlex.split(line) for line in block.splitlines()]
    assert {tuple(line[:4:2]) for line in words} == {("python", "--config")}
    return [line[4:] for line in words]


def test_the_command_of_each_kind_reads_it(every_kind: Path, flags: list[str], preprocessor):
    """Up to the examples; a list at an address is served from here."""
    served = functools.partial(SimpleHTTPRequestHandler, directory=str(every_kind))
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        commands = commands_of_kinds()
        assert len(commands) >= 13
        for words in commands:
            port = str(server.server_address[1])
            words = [word.replace("localhost:8000", f"127.0.0.1:{port}") for word in words]
            more = [*flags, "--do_train", "--max_steps", "1", *words]
            _, data_args, training_args = script.parse_arguments(more)
            records = script.data_records(data_args)
            speech = script.load_speech(records, [preprocessor], training_args, None)
            (dataset,) = speech["train"]
            assert [text.lower() for text in outcomes(dataset.source, preprocessor)] == ["uno"], (
                words
            )
        server.shutdown()


def test_a_run_trains_on_recordings(every_kind: Path, train):
    """With neighbours in windows, from the start to a saved model."""
    cues = [f"{i}\n00:00:0{i},000 --> 00:00:0{i},900\nuno\n" for i in range(9)]
    (every_kind / "talks" / "talk.srt").write_text("\n".join(cues))
    (every_kind / "talks" / "talk.wav").write_bytes(make_clip(9.0))
    metrics = train(
        "--dataset_name talks --do_train --max_steps 2 --pack_utterances "
        "--timestamp_probability 0.5 --per_device_train_batch_size 2"
    )
    assert metrics["train_rows"] == 4
