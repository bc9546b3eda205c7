"""The languages of a checkpoint: what people write for them, and neighbours of those it lacks.

Whisper has a token for each of some hundred languages. `langcodes` knows the rest: ISO 639-1 and
639-3, BCP 47 tags, English names, and CLDR's table of which language's readers read which other.
"""

import difflib

import langcodes
import transformers
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from speech_finetuning.base.errors import UserError

NUM_NEIGHBOURS = 3
# CLDR's distances, as langcodes gives them (3.5): up to 5 another name of the same language; below
# 50 its readers usually read the other one as well; beyond, scripts and countries are compared.
SAME_LANGUAGE = 5
READ_BY_MANY = 50


def check_language(
    language: str | None, generation_config: transformers.GenerationConfig, name: str
) -> str | None:
    """The language's code as the checkpoint knows it; None for English-only models.

    Raises: UserError if it is missing or has no token in this checkpoint, or if an English-only
    checkpoint is given another language.
    """
    known = getattr(generation_config, "lang_to_id", None) or {}
    if not getattr(generation_config, "is_multilingual", bool(known)):
        if language is not None and find_code(language, list(LANGUAGES)) != "en":
            raise UserError(
                f"--language {language}: {name} knows English only. Leave out --language and "
                "--task, or choose a multilingual model (without .en in its name)."
            )
        return None
    codes = sorted(token.strip("<|>") for token in known)
    if language is None:
        raise UserError(
            f"--language is missing: {name} knows {len(codes)} languages. Pass --language es, say."
        )
    return find_code(language, codes)


def find_code(language: str, codes: list[str]) -> str:
    """The checkpoint's code for a language, however it is written: es, spa, es-MX, Spanish.

    codes: of the languages that the checkpoint has tokens for. Raises: UserError with the nearest
    spelling, or for a language without a token with its neighbours.
    """
    word = plain_word(language)
    code = TO_LANGUAGE_CODE.get(word, word)
    if code in codes:
        return code
    tag = find_tag(word)
    if tag is None:
        raise UserError(unknown_language(language, codes))
    for code in codes:
        if langcodes.tag_distance(tag, code) <= SAME_LANGUAGE:
            return code
    raise UserError(language_without_token(language, tag, codes))


def plain_word(language: str) -> str:
    """'es-mx' of ' <|es_MX|> '."""
    return language.strip().removeprefix("<|").removesuffix("|>").lower().replace("_", "-")


def find_tag(word: str) -> str | None:
    """The language's tag, without country and script, of a tag or an English name."""
    try:
        if langcodes.tag_is_valid(word):
            return langcodes.Language.get(word).language
        return langcodes.find(word).language
    except LookupError:  # langcodes' own errors are LookupErrors
        return None


def name_of(code: str) -> str:
    """'Spanish (es)'."""
    name = LANGUAGES.get(code) or langcodes.Language.get(code).display_name()
    return f"{name.title()} ({code})"


def check_is_language(language: str) -> None:
    """Raises: UserError for what is no language at all, whatever the checkpoint knows."""
    word = plain_word(language)
    if word not in TO_LANGUAGE_CODE and find_tag(word) is None:
        raise UserError(unknown_language(language, list(LANGUAGES)))


def unknown_language(language: str, codes: list[str]) -> str:
    """The problem of something that is no language, with the nearest names, in one line."""
    names = {LANGUAGES[code]: code for code in codes if code in LANGUAGES}
    names |= {name: code for name, code in TO_LANGUAGE_CODE.items() if code in codes}
    problem = f"--language {language}: no such language."
    for num_names, likeness, question in ((1, 0.6, "Did you mean"), (3, 0.5, "Is it")):
        nearest = difflib.get_close_matches(
            language.lower(), list(names), n=num_names, cutoff=likeness
        )
        *others, last = dict.fromkeys(name_of(names[name]) for name in nearest) or [""]
        if last:
            meant = f"{', '.join(others)} or {last}" if others else last
            return f"{problem} {question} {meant}?"
    return f"{problem} Write its English name or its code, such as Spanish or es."


def language_without_token(language: str, tag: str, codes: list[str]) -> str:
    """The problem of a language without a token, with those whose token may stand for it."""
    lines = [
        f"--language {language}: the model has no token for {name_of(tag)}. Choose a neighbour, "
        "whose token then stands for it:"
    ]
    lines += [
        f"  --language {code}: {name_of(code)}, {reason}" for code, reason in neighbours(tag, codes)
    ]
    return "\n".join(lines)


def neighbours(tag: str, codes: list[str]) -> list[tuple[str, str]]:
    """(code, reason) of the languages that are nearest to one, at most three, the best first.

    Among equals the one with more speech in Whisper's training comes first, which is the order of
    LANGUAGES.
    """
    language = langcodes.Language.get(tag).maximize()
    ranked: list[tuple[int, str, str]] = []
    for code in sorted(codes, key=training_rank):
        other = langcodes.Language.get(code).maximize()
        has_script = other.script == language.script
        has_country = other.territory == language.territory
        # As written in the same script: Cantonese is near to traditional Chinese only.
        distance = langcodes.tag_distance(tag, f"{code}-{language.script}")
        if distance < READ_BY_MANY:
            ranked.append((distance, code, "which its readers usually read too"))
        elif has_script and has_country:
            ranked.append((100, code, "the same script, in the same country"))
        elif has_country:
            ranked.append((200, code, "in the same country, but another script"))
        elif has_script:
            ranked.append((300, code, "the same script"))
    ranked.sort(key=distance_of)
    return [(code, reason) for _, code, reason in ranked[:NUM_NEIGHBOURS]]


def distance_of(entry: tuple[int, str, str]) -> int:
    return entry[0]


def training_rank(code: str) -> int:
    """0 for the language with most speech in Whisper's training."""
    order = list(LANGUAGES)
    return order.index(code) if code in order else len(order)
