"""Data sets that have left the Hub are answered with where they are now."""

import pytest

from speech_finetuning.data.dataset_names import where_it_is_now


@pytest.mark.parametrize(
    "name",
    [
        "mozilla-foundation/common_voice_11_0",
        "mozilla-foundation/common_voice_17_0",
        "common_voice",
        "legacy-datasets/common_voice",
        "facebook/covost2",
    ],
)
def test_common_voice_and_its_kin_are_answered_with_the_download(name: str):
    answer = where_it_is_now(name)
    assert "mozilladatacollective.com" in answer
    assert "--dataset_name FOLDER --dataset_config_name es" in answer


@pytest.mark.parametrize(
    "name", ["google/fleurs", "alice/my_common_voice_11_0", "speech/common_voice/es"]
)
def test_others_are_not(name: str):
    assert where_it_is_now(name) is None
