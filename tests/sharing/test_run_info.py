"""Which folder a run may write into."""

import json
from pathlib import Path
from typing import Any

import pytest

from speech_finetuning.base.errors import UserError
from speech_finetuning.sharing.run_info import claim_output_dir

IDENTITY = {"model_name_or_path": "openai/whisper-tiny", "dataset_name": "alice/speech"}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """As a finished run has left it."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "run_info.json").write_text(json.dumps({"identity": IDENTITY}))
    return tmp_path


def test_a_run_goes_on_in_its_own_folder(trained: Path, tmp_path: Path):
    claim_output_dir(trained, IDENTITY, do_train=True)
    claim_output_dir(tmp_path / "new", IDENTITY, do_train=False)


@pytest.mark.parametrize("change", [{"dataset_name": "alice/other"}, {"language": "es"}])
def test_the_weights_of_another_run_are_not_replaced(trained: Path, change: dict[str, Any]):
    with pytest.raises(UserError, match="of another run"):
        claim_output_dir(trained, IDENTITY | change, do_train=True)
    (trained / "run_info.json").unlink()
    with pytest.raises(UserError, match=r"there is no run_info\.json of this script"):
        claim_output_dir(trained, IDENTITY, do_train=True)


def test_the_card_of_trained_weights_does_not_get_the_scores_of_others(trained: Path):
    with pytest.raises(UserError) as error:
        claim_output_dir(trained, IDENTITY, do_train=False)
    assert f"--model_name_or_path {trained} and another --output_dir" in str(error.value)


@pytest.mark.parametrize("place", ["data", "data/../data", "data/train.csv"])
def test_the_folder_of_an_entry_of_a_mix_is_no_output_folder(tmp_path: Path, place: str):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.csv").write_text("path,text\n")
    mix = [{"dataset_name": "alice/speech"}, {"dataset_name": str(tmp_path / place)}]
    identity = {"model_name_or_path": "openai/whisper-tiny", "data_mix": mix}
    with pytest.raises(UserError, match="lies in the folder of the data"):
        claim_output_dir(data, identity, do_train=True)
    claim_output_dir(tmp_path, identity, do_train=True)
