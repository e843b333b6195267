"""Whole passages of prose with slots, and what people ask about them: nearer to real documents than single sentences.

They stand in `curriculum/prose/*.toml`. A slot `{id:kind}` is filled anew each time, `{id|one|two}` by one of its
choices; an answer is a stretch of the text, word for word.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache

from helpers.tiny_gpt_oss.curriculum import (
    ANSWER,
    PLANTED,
    REFUSAL,
    UNANSWERABLE,
    Example,
    Passage,
    Shape,
    Turn,
    as_typed,
    invent_place,
    planted,
)
from helpers.tiny_gpt_oss.worlds import FOLDER, contracted, invent

CUT, JOINED = 0.5, 0.35  # shares of passages that lose their ends, and that begin with the end of another
_SLOT = re.compile(r"\{(\w+)(?:([:|])([^{}]*))?\}")


@dataclass(frozen=True)
class Prose:
    """A passage with slots, its (question, answer) pairs, and questions that it doesn't answer."""

    text: str
    questions: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


@lru_cache
def collection(language: str) -> tuple[Prose, ...]:
    """Read the passages of a language, 'en' or 'es'."""
    found = []
    for path in sorted((FOLDER / "prose").glob(f"*.{language}.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["passage"]:
            pairs = tuple((question, answer) for question, answer in entry["questions"])
            found.append(Prose(entry["text"].strip(), pairs, tuple(entry["missing"])))
    return tuple(found)


def fill_slots(rng: random.Random, language: str, prose: Prose) -> Prose:
    """Return a passage with every slot filled; lines are joined."""
    values: dict[str, str] = {}
    for name, sign, rest in _SLOT.findall(prose.text):
        if sign == ":":
            values[name] = invent(rng, language, rest.strip())
        elif sign:
            values[name] = " ".join(rng.choice(rest.split("|")).split())

    def filled(text: str) -> str:
        text = _SLOT.sub(lambda found: values[found[1]], text)
        return contracted(text) if language == "es" else text

    paragraphs = [" ".join(part.split()) if len(part) > 120 else part for part in prose.text.split("\n\n")]
    text = "\n\n".join(paragraphs)
    pairs = tuple((filled(question), filled(answer)) for question, answer in prose.questions)
    return Prose(filled(text), pairs, tuple(map(filled, prose.missing)))


def make_prose(rng: random.Random, language: str, shape: Shape) -> Example:
    """Write one example of filled passages; the same `rng` state writes the same example."""
    count = rng.randint(*shape.passages)
    chosen = [fill_slots(rng, language, prose) for prose in rng.sample(collection(language), 2 * count + 1)]
    inside, outside = chosen[:count], chosen[count:]
    payload = ""
    texts = []
    for prose, other in zip(inside, outside, strict=False):
        text = prose.text
        if rng.random() < JOINED:
            text = f"{other.text[-rng.randint(60, 350) :]}\n\n{text}"
        texts.append(_cut(rng, text, rng.randint(*shape.characters)))
    if rng.random() < PLANTED:
        number = rng.randrange(count)
        instruction, payload = planted(rng, language)
        texts[number] = f"{texts[number]} {instruction}"
    stated = [
        (question, answer, number, text.index(answer))
        for number, (prose, text) in enumerate(zip(inside, texts, strict=True), 1)
        for question, answer in prose.questions
        if answer in text
    ]
    unsaid = [question for prose in inside for question in prose.missing]
    unsaid += [question for prose in outside[count:] for question, _ in prose.questions]
    turns, unasked = [], []
    for _ in range(shape.questions):
        if not stated or rng.random() < UNANSWERABLE:
            turns.append(Turn(as_typed(rng, language, rng.choice(unsaid)), REFUSAL[language], "unanswerable"))
            continue
        unasked = unasked or rng.sample(stated, len(stated))
        question, value, number, start = unasked.pop()
        answer = ANSWER[language].format(v=value, n=number)
        turns.append(Turn(as_typed(rng, language, question), answer, "value", value, number, start))
    passages = tuple(Passage(invent_place(rng, language, 0), text) for text in texts)
    return Example(language, passages, tuple(turns), payload)


def _cut(rng: random.Random, text: str, characters: int) -> str:
    """Return a text as a splitter leaves it: at most so long, and in half of the cases without its first words."""
    start = text.find(" ", rng.randint(0, 120)) + 1 if rng.random() < CUT else 0
    end = len(text) if len(text) - start <= characters else max(text.rfind(" ", 0, start + characters), start + 1)
    return text[start:end]
