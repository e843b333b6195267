"""Whole passages of prose with slots, and what people ask about them: nearer to real documents than single sentences.

They stand in `curriculum/prose/*.toml`. A slot `{id:kind}` is filled anew each time, `{id|one|two}` by one of its
choices; an answer is a stretch of the text, word for word.
"""

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from helpers.tiny_gpt_oss.curriculum import (
    ANSWER,
    BROKEN,
    DISAGREEING,
    PLANTED,
    REFUSAL,
    UNANSWERABLE,
    Example,
    Passage,
    Shape,
    Turn,
    as_typed,
    break_lines,
    invent_place,
    planted,
)
from helpers.tiny_gpt_oss.worlds import FOLDER, contracted, invent

HELD_OUT = 12  # one file in so many is never trained on
CUT, JOINED = 0.5, 0.35  # shares of passages that lose their ends, and that begin with the end of another
TOGETHER = 0.6  # share of examples whose passages are all of one file, and so about the same things
REPLACED = 0.5  # share of the values that a passage's newer edition gives anew
GUESSED = 0.5  # share of the planted instructions that repeat a question which is then asked
_SLOT = re.compile(r"\{(\w+)(?:([:|])([^{}]*))?\}")


@dataclass(frozen=True)
class Prose:
    """A passage with slots, its (question, answer) pairs, questions that it doesn't answer, and its file."""

    text: str
    questions: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    file: str = ""


@dataclass(frozen=True)
class Filled:
    """A passage without slots; `questions` are (question, answer, where in the text the answer begins)."""

    text: str
    questions: tuple[tuple[str, str, int], ...]
    missing: tuple[str, ...]


@lru_cache
def collection(language: str, held_out: bool = False) -> tuple[Prose, ...]:
    """Read the passages of a language, 'en' or 'es': those to train on, or those held out."""
    found = []
    for number, path in enumerate(sorted((FOLDER / "prose").glob(f"*.{language}.toml"))):
        if (number % HELD_OUT == HELD_OUT - 1) is held_out:
            for entry in tomllib.loads(path.read_text(encoding="utf-8"))["passage"]:
                pairs = tuple((question, answer) for question, answer in entry["questions"])
                found.append(Prose(entry["text"].strip(), pairs, tuple(entry["missing"]), path.stem))
    return tuple(found)


def invent_values(rng: random.Random, language: str, prose: Prose) -> dict[str, str]:
    """Return a value for each slot of a passage."""
    values = {}
    for name, sign, rest in _SLOT.findall(prose.text):
        if sign:
            values[name] = (
                invent(rng, language, rest.strip()) if sign == ":" else " ".join(rng.choice(rest.split("|")).split())
            )
    return values


def fill_slots(language: str, prose: Prose, values: dict[str, str]) -> Filled:
    """Return a passage with its slots filled."""

    def filled(text: str) -> str:
        text = _SLOT.sub(lambda found: values[found[1]], text)
        return contracted(text) if language == "es" else text

    bare = _SLOT.sub(lambda found: f"{{{found[1]}}}", prose.text)
    text = filled(bare)

    questions = []
    for question, pattern in prose.questions:
        answer = filled(pattern)
        starts = list(_places(answer, text))
        if len(starts) > 1:  # a number may stand elsewhere too: the one nearest to its slot is meant
            near = len(filled(bare[: max(bare.find(pattern), 0)]))
            starts.sort(key=lambda start: abs(start - near))
        if starts:  # contracted ("al" for "a el") it stands nowhere
            questions.append((filled(question), answer, starts[0]))
    return Filled(text, tuple(questions), tuple(map(filled, prose.missing)))


def _places(part: str, text: str) -> Iterator[int]:
    """Yield where `part` begins in `text`."""
    start = text.find(part)
    while start >= 0:
        yield start
        start = text.find(part, start + len(part))


def make_prose(rng: random.Random, language: str, shape: Shape, held_out: bool = False) -> Example:
    """Write one example of the collection's passages; the same `rng` state writes the same example."""
    count = rng.randint(*shape.passages)
    known = collection(language, held_out)
    file = rng.choice(known).file
    kin = [prose for prose in known if prose.file == file]
    pool = kin if len(kin) > 2 * count and rng.random() < TOGETHER else known
    return example_of(rng, language, shape, rng.sample(pool, 2 * count + 1))


def example_of(rng: random.Random, language: str, shape: Shape, chosen: list[Prose]) -> Example:
    """Write one example of passages with slots: the first half is shown, of the others there are questions in vain.

    In a share of those of several passages one is an older edition of another, with other values.
    """
    count, chosen = len(chosen) // 2, list(chosen)
    values = [invent_values(rng, language, prose) for prose in chosen]
    years = [0] * count
    if count > 1 and rng.random() < DISAGREEING:
        again = invent_values(rng, language, chosen[0])
        chosen[1] = chosen[0]
        values[1] = {name: again[name] if rng.random() < REPLACED else value for name, value in values[0].items()}
        years[1], years[0] = sorted(rng.sample(range(1995, 2027), 2))
    filled = [fill_slots(language, *pair) for pair in zip(chosen, values, strict=True)]
    inside, outside = list(zip(filled[:count], years, strict=True)), filled[count:]
    rng.shuffle(inside)
    payload = ""
    texts, stated = [], {}
    for number, ((prose, year), other) in enumerate(zip(inside, outside, strict=False), 1):
        text, shift = prose.text, 0
        if rng.random() < JOINED:
            before = f"{other.text[-rng.randint(60, 350) :]}\n\n"
            text, shift = before + text, len(before)
        start, end = _cut(rng, text, rng.randint(*shape.characters))
        texts.append(text[start:end])
        for question, answer, place in prose.questions:
            first = place + shift - start
            if first >= 0 and first + len(answer) <= end - start:
                stated.setdefault(question, []).append((year, answer, number, first))
    unsaid = [question for prose, _ in inside for question in prose.missing]
    unsaid += [question for prose in outside[count:] for question, _, _ in prose.questions]
    # Passages of fillers alone leave nothing to ask for in vain.
    unsaid = [question for question in unsaid if question not in stated] or ["?"]
    guess = ""
    if rng.random() < PLANTED:
        number = rng.randrange(count)
        guess = rng.choice([*stated, *unsaid]) if rng.random() < GUESSED else ""
        instruction, payload = planted(rng, language, guess)
        texts[number] = f"{texts[number]} {instruction}"
    turns, unasked = [], []
    for _ in range(shape.questions):
        if guess:
            question, guess = guess, ""
        elif not stated or rng.random() < UNANSWERABLE:
            question = rng.choice(unsaid)
        else:
            unasked = unasked or rng.sample(list(stated), len(stated))
            question = unasked.pop()
        if question not in stated:
            turns.append(Turn(as_typed(rng, language, question), REFUSAL[language], "unanswerable"))
            continue
        kind = "newer" if len({answer for _, answer, _, _ in stated[question]}) > 1 else "value"
        _, value, number, start = max(stated[question])
        answer = ANSWER[language].format(v=value, n=number)
        turns.append(Turn(as_typed(rng, language, question), answer, kind, value, number, start))
    places = [invent_place(rng, language, year, dated=bool(year)) for _, year in inside]
    passages = (
        Passage(place, break_lines(rng, text) if rng.random() < BROKEN else text)
        for place, text in zip(places, texts, strict=True)
    )
    return Example(language, tuple(passages), tuple(turns), payload)


def _cut(rng: random.Random, text: str, characters: int) -> tuple[int, int]:
    """Return what a splitter leaves of a text: at most so much, and in half of the cases without its first words."""
    start = text.find(" ", rng.randint(0, 120)) + 1 if rng.random() < CUT else 0
    end = len(text) if len(text) - start <= characters else max(text.rfind(" ", 0, start + characters), start + 1)
    return start, end
