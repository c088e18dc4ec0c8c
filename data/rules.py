"""What a record must be before its images are looked at: rules on text, licence and scores. Each answer names rule, value and setting."""

import unicodedata
from collections.abc import Iterator

from data.config import TextRules
from data.records import Reason, Record


def judge(record: Record, texts: TextRules, min_scores: dict[str, float], max_scores: dict[str, float]) -> tuple[Reason, str, str] | None:
    """(reason, stage, message) of the first rule that the record breaks; None if it breaks none."""
    if record.task == "image_edit" and not record.references:
        return Reason.REFERENCE_MISSING, "text", "an edit needs at least one source image, and this has none"
    if record.task == "text_to_image" and record.references:
        return Reason.RECORD_BAD, "text", f"{len(record.references)} source images given; text_to_image takes none: is it an edit?"
    for reason, message in _text_faults(record.prompt, texts):
        return reason, "text", message
    for name, floor in min_scores.items():
        if (value := record.scores.get(name)) is None or not value >= floor:
            return Reason.SCORE, "policy", f"score {name} is {value}, min_scores.{name} is {floor}"
    for name, ceiling in max_scores.items():
        if (value := record.scores.get(name)) is None or not value <= ceiling:
            return Reason.SCORE, "policy", f"score {name} is {value}, max_scores.{name} is {ceiling}"
    return None


def _text_faults(prompt: str, rules: TextRules) -> Iterator[tuple[Reason, str]]:
    stripped = prompt.strip()
    if not stripped:
        yield Reason.TEXT_EMPTY, "the prompt is empty"
        return
    if bad := next((letter for letter in prompt if _is_bad(letter)), None):
        yield Reason.TEXT_BAD, f"the prompt holds U+{ord(bad):04X}, a control character or half a surrogate pair"
    if len(prompt) > rules.max_characters:
        yield Reason.TEXT_TOO_LONG, f"the prompt has {len(prompt)} characters, texts.max_characters is {rules.max_characters}"
    folded = " ".join(stripped.casefold().split()).strip(".!")
    if folded in rules.boilerplate:
        yield Reason.TEXT_BOILERPLATE, f"the prompt {stripped!r} says nothing (texts.boilerplate)"
    if rules.scripts is not None:
        foreign = sum(_script(letter) not in rules.scripts for letter in prompt if letter.isalpha())
        letters = sum(letter.isalpha() for letter in prompt)
        if foreign * 2 > letters:
            yield Reason.LANGUAGE, f"{foreign} of {letters} letters are of another script than texts.scripts {list(rules.scripts)}"


def _is_bad(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r"


def _script(letter: str) -> str:
    """The first word of the character's Unicode name: LATIN, CJK, CYRILLIC, ARABIC, HIRAGANA..."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0].partition("-")[0].lower()
