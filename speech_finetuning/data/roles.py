"""What a run reads, by role: to train on, to score, to test and to transcribe.

A record that is a guard has the role `guard`: it is scored wherever `eval` is, has no part in the
total, and shapes neither the weights nor what is saved with them."""

from collections.abc import Callable
from typing import Any

from speech_finetuning.base.errors import Problems, UserError
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset


def open_by_role(
    records: list[Any],
    preprocessors: list[Preprocessor],
    is_wanted: dict[str, bool],
    open_one: Callable[..., SpeechDataset],
) -> dict[str, list[SpeechDataset]]:
    """The datasets of each role that is wanted: of every record that names a split for it.

    records: the script's, each with a preprocessor; open_one(role, split, record, preprocessor)
    opens a dataset. Raises: UserError with all that cannot be opened.
    """
    problems = Problems()
    speech: dict[str, list[SpeechDataset]] = {}
    for role in [role for role, wanted in is_wanted.items() if wanted]:
        for record, preprocessor in zip(records, preprocessors, strict=True):
            split = getattr(record, f"{role}_split_name")
            if not split:
                continue
            opened_as = "guard" if record.guard else role
            dataset = problems.attempt(
                record.name, open_one, opened_as, split, record, preprocessor
            )
            speech.setdefault(opened_as, [])
            if dataset is not None:
                speech[opened_as].append(dataset)
        if role in ("train", "eval") and role not in speech:
            raise UserError(f"--do_{role}: no entry of --data_mix has a {role}_split_name.")
    problems.raise_if_any()
    return speech


def languages_of_model(records: list[Any], languages: list[str | None]) -> list[str | None]:
    """Those that the model is trained for, of each of the script's records that is no guard.
    languages: of each record."""
    pairs = zip(records, languages, strict=True)
    return [language for record, language in pairs if not record.guard]
