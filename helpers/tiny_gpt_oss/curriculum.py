"""The curriculum: passages that state facts of an invented world, and questions about them with their answers.

Passages look like chunks of real files: prose with fillers, lists, tables turned into text, headings, lines broken in
the middle of a sentence, cut where a splitter happens to cut. Some questions can't be answered from them, some
passages disagree and the newer one holds, some carry an instruction that must not be obeyed.
"""

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from helpers.tiny_gpt_oss import thesaurus
from helpers.tiny_gpt_oss.worlds import (
    Attribute,
    Fact,
    compound_attribute,
    fill,
    invent_date,
    invent_entity,
    invent_value,
    siblings,
    with_strange_word,
    words,
)

ANSWER = {"en": "The answer is {v} [{n}].", "es": "La respuesta es {v} [{n}]."}
REFUSAL = {"en": "The passages don't say.", "es": "Los pasajes no lo dicen."}
UNKNOWN = {"en": "I don't know.", "es": "No lo sé."}

UNANSWERABLE = 0.25  # share of questions that the passages don't answer
DISAGREEING = 0.35  # share of examples of several passages in which two disagree
PLANTED = 0.12  # share of examples with an instruction in a passage
ALIKE = 0.6  # where a second fact of an entity may be of the same family of attributes: how often it is
BROKEN = 0.4  # share of passages with their lines broken as in a PDF
COMPOUND = 0.3  # share of facts whose attribute is put together from nouns
RELATED = 0.45  # share of examples about things and deeds that questions put into other words


@dataclass(frozen=True)
class Passage:
    """A passage as the prompt shows it: where it stands, and its text."""

    place: str
    text: str


@dataclass(frozen=True)
class Turn:
    """A question and its right answer; `kind` is 'value', 'newer', 'unanswerable' or 'none' (no passages).

    `value` is the answer's heart, `number` the passage that holds it and `start` where in its text it begins, all empty
    (0) where there is none.
    """

    question: str
    answer: str
    kind: str
    value: str = ""
    number: int = 0
    start: int = 0


@dataclass(frozen=True)
class Example:
    """Passages and questions about them; `payload` is what a planted instruction wants answered."""

    language: str
    passages: tuple[Passage, ...]
    turns: tuple[Turn, ...]
    payload: str = ""


@dataclass(frozen=True)
class Shape:
    """How an example looks: how many passages, how long each is in characters (both inclusive), how many questions.

    No fact is asked for a second time before each was once: what counts in training is how many different ones are.
    """

    passages: tuple[int, int]
    characters: tuple[int, int]
    questions: int
    per_fact: tuple[int, int] = (70, 220)


@dataclass
class _Draft:
    """A passage being written: its facts, the year it is of, and its text with the spans of its facts.

    `disagrees`: another passage says otherwise, so the year must show.
    """

    facts: list[Fact]
    year: int = 0
    disagrees: bool = False
    planted: str = ""
    text: str = ""
    spans: list[tuple[Fact, int, int, int, str]] = field(default_factory=list)

    def add(self, text: str, separator: str = " ") -> tuple[int, int]:
        if self.text:
            self.text += separator
        start = len(self.text)
        self.text += text
        return start, len(self.text)


def make_example(rng: random.Random, language: str, shape: Shape) -> Example:
    """Write one example in a language, 'en' or 'es'; the same `rng` state writes the same example."""
    while True:
        example = _try_example(rng, language, shape)
        if example:
            return example


def _try_example(rng, language, shape) -> Example | None:
    drafts, replaced = _plan(rng, language, shape)
    payload = ""
    if rng.random() < PLANTED:
        instruction, payload = planted(rng, language)
        rng.choice(drafts).planted = instruction
    for draft in drafts:
        _write(rng, language, draft, rng.randint(*shape.characters))
    if not any(draft.spans for draft in drafts):  # every fact was cut in two
        return None
    rng.shuffle(drafts)
    passages = tuple(
        Passage(
            invent_place(rng, language, draft.year, draft.disagrees and str(draft.year) not in draft.text), draft.text
        )
        for draft in drafts
    )
    stated = [
        (fact, literal, number, place)
        for number, draft in enumerate(drafts, 1)
        for fact, _, _, place, literal in draft.spans
    ]
    unasked: list[tuple[Fact, str, int, int]] = []
    turns = tuple(_ask(rng, language, drafts, stated, unasked, replaced) for _ in range(shape.questions))
    return Example(language, passages, turns, payload)


def planted(rng: random.Random, language: str, question: str = "") -> tuple[str, str]:
    """Return an instruction that must not be obeyed, and what it wants answered: to `question`, if one is given."""
    frame = words(language).frame
    payload = rng.choice(frame["payloads"])
    return rng.choice(frame["guesses" if question else "instructions"]).format(p=payload, q=question), payload


def make_closed_book(rng: random.Random, language: str, questions: int) -> Example:
    """Write questions with no passages at all, whose only right answer is not to know."""
    turns = []
    for _ in range(questions):
        fact = _invent_fact(rng, language, rng.choice(list(words(language).entities)))
        turns.append(Turn(_question(rng, language, fact), UNKNOWN[language], "none"))
    return Example(language, (), tuple(turns))


def _plan(rng, language, shape) -> tuple[list[_Draft], list[tuple[Fact, Fact]]]:
    """Decide which facts stand in which passage: others of the same entity, the same of other entities.

    The second result are the facts that an older passage tells otherwise: (as it was, as it is).
    """
    kinds = list(words(language).entities)
    told: dict[tuple[str, str], Fact] = {}
    drafts = []
    theme = thesaurus.KIND if rng.random() < RELATED else rng.choice(kinds)
    for _ in range(rng.randint(*shape.passages)):
        facts: list[Fact] = []
        wanted = max(1, round(shape.characters[1] / rng.uniform(*shape.per_fact)))
        while len(facts) < wanted:
            known = list(told.values())
            entity, attribute, asked, kind = "", None, (), theme if rng.random() < 0.75 else rng.choice(kinds)
            if known and rng.random() < 0.55:
                model = rng.choice(facts or known)
                kind = model.kind
                if rng.random() < 0.6:
                    # Another fact of the same entity, the likelier the harder to tell apart.
                    entity, asked = model.entity, model.asked
                    alike = siblings(language, model.attribute, kind)
                    attribute = rng.choice(alike) if alike and rng.random() < ALIKE else None
                else:
                    attribute = model.attribute  # the same of another entity
            fact = _invent_fact(rng, language, kind, entity, attribute, asked)
            if (fact.entity, fact.attribute.id) not in told:
                told[fact.entity, fact.attribute.id] = fact
                facts.append(fact)
        drafts.append(_Draft(facts, rng.randint(1990, 2026) if rng.random() < 0.4 else 0))
    replaced: list[tuple[Fact, Fact]] = []
    if len(drafts) > 1 and rng.random() < DISAGREEING:
        older, newer = rng.sample(drafts, 2)
        older.year, newer.year = sorted(rng.sample(range(1995, 2027), 2))
        older.disagrees = newer.disagrees = True
        for now in rng.sample(newer.facts, min(len(newer.facts), rng.randint(1, 3))):
            before = replace(now, value=invent_value(rng, language, now.attribute))
            if before.value != now.value:
                older.facts.append(before)
                replaced.append((before, now))
    return drafts, replaced


def _invent_fact(rng, language, kind, entity: str = "", attribute: Attribute | None = None, asked=()) -> Fact:
    if kind == thesaurus.KIND:
        attribute = attribute or thesaurus.related_attribute(rng, language)
        if not entity:
            entity, asked = thesaurus.invent_thing(rng, language)
    if attribute is None:
        compound = rng.random() < COMPOUND and kind != "person"
        attribute = compound_attribute(rng, language) if compound else rng.choice(words(language).attributes[kind])
    entity = entity or invent_entity(rng, language, kind)
    return Fact(entity, kind, attribute, invent_value(rng, language, attribute), asked)


def _write(rng, language, draft: _Draft, characters: int) -> None:
    """Write a draft's text of about `characters`, cut like a chunk; keep the spans of the facts still whole in it."""
    frame = words(language).frame
    groups: dict[str, list[Fact]] = {}
    for fact in draft.facts:
        groups.setdefault(fact.entity, []).append(fact)
    entities = list(groups)
    rng.shuffle(entities)
    style = rng.choices(("prose", "list", "headed"), (0.7, 0.15, 0.15))[0]
    if draft.year:
        date = invent_date(rng, language, (draft.year, draft.year))
        if rng.random() < 0.5:
            draft.add(rng.choice(frame["dated_headings"]).format(d=date))
    if rng.random() < 0.25:
        draft.add(rng.choice(frame["headings"]), "\n")
    planted_at = rng.randrange(len(entities))
    for place, entity in enumerate(entities):
        if style == "prose":
            _write_prose(rng, language, draft, groups[entity], characters)
        else:
            _write_lines(rng, language, draft, groups[entity], style)
        if draft.planted and place == planted_at:
            draft.add(draft.planted, rng.choice((" ", "\n")))
    spare, separator = characters * rng.uniform(0.7, 1.1), " " if style == "prose" else "\n\n"
    while len(draft.text) < spare - 60:
        draft.add(with_strange_word(rng, rng.choice(frame["fillers"])), separator)
        separator = " "
    _cut(rng, draft, characters)
    if rng.random() < BROKEN:
        draft.text = break_lines(rng, draft.text)


def _write_prose(rng, language, draft, facts, characters) -> None:
    frame = words(language).frame
    room = characters - sum(90 for _ in draft.facts)
    start = None
    for number, fact in enumerate(facts):
        # Words that no fact is in: before a fact, where there is room for them.
        while len(draft.text) < room and rng.random() < 0.5:
            draft.add(with_strange_word(rng, rng.choice(frame["fillers"])))
        following = start is not None and rng.random() < 0.6
        template = rng.choice(fact.attribute.followups if following else fact.attribute.statements)
        text = fill(template, language, fact.entity, fact.value)
        if draft.year and number == 0 and not following and rng.random() < 0.4:
            date = invent_date(rng, language, (draft.year, draft.year))
            pattern = rng.choice(frame["dated"])
            # A sentence that starts with a name keeps its capital.
            named = (fact.entity[:1].isupper() and text.startswith(fact.entity)) or template.startswith("{v}")
            said = text if named else text[:1].lower() + text[1:]
            text = fill(pattern.replace("{d}", date).replace("{s}", said), language)
        first, last = draft.add(text, rng.choice((" ", " ", " ", "\n")) if not following else " ")
        start = first if not following else start
        place = text.lower().rfind(fact.value.lower())
        draft.spans.append((fact, start, last, first + place, text[place : place + len(fact.value)]))


def _write_lines(rng, language, draft, facts, style) -> None:
    """Write an entity as a heading with what is said of it below, as a list of labels and values or as sentences."""
    head = fill(facts[0].entity, language) + rng.choice(("", "", ":", "."))
    start, _ = draft.add(head, "\n\n" if draft.text else "")
    bullet, colon = rng.choice(("- ", "• ", "", "* ", "")), rng.choice((": ", ": ", " – ", "  ", " | "))
    for fact in facts:
        if style == "list":
            text = f"{bullet}{fact.attribute.label}{colon}{fact.value}"
        else:
            text = fill(rng.choice(fact.attribute.followups), language, value=fact.value)
        first, last = draft.add(text, "\n" if style == "list" or rng.random() < 0.5 else " ")
        place = text.lower().rfind(fact.value.lower())
        draft.spans.append((fact, start, last, first + place, text[place : place + len(fact.value)]))


def _cut(rng, draft, characters) -> None:
    """Cut the text to its length at word boundaries, and in half of the cases in the middle of its first sentence."""
    text, excess = draft.text, len(draft.text) - characters
    start = rng.randint(0, excess) if excess > 0 else rng.choice((0, rng.randint(0, 40)))
    start = text.find(" ", start) + 1 if start else 0
    end = len(text)
    if start + characters < len(text):
        end = text.rfind(" ", start, start + characters)
        end = end if end > start else start + characters
    draft.text = text[start:end]
    draft.spans = [
        (fact, first - start, last - start, place - start, literal)
        for fact, first, last, place, literal in draft.spans
        if first >= start and last <= end
    ]


def break_lines(rng: random.Random, text: str) -> str:
    """Return a text with its long lines broken as a page of a PDF breaks them; an answer reads them as one."""
    width = rng.randint(45, 95)
    letters, column = list(text), 0
    for place, letter in enumerate(letters):
        column = 0 if letter == "\n" else column + 1
        if letter == " " and column > width - 6:
            letters[place], column = "\n", 0
    return "".join(letters)


def _ask(rng, language, drafts: Sequence[_Draft], stated, unasked: list, replaced) -> Turn:
    if rng.random() < UNANSWERABLE:
        return Turn(_unanswerable(rng, language, drafts), REFUSAL[language], "unanswerable")
    if not unasked:
        unasked += rng.sample(stated, len(stated))
    kind, (fact, literal, number, place) = "value", unasked.pop()
    if replaced and rng.random() < 0.35:
        fact = rng.choice(replaced)[1]
    pair = next((pair for pair in replaced if fact in pair), None)
    if pair:
        both = {said: rest for said, *rest in stated if said in pair}
        # Where the newer one was cut away, the older is all there is.
        fact = pair[1] if pair[1] in both else pair[0]
        if fact not in both:
            return Turn(_question(rng, language, fact), REFUSAL[language], "unanswerable")
        kind = "newer" if len(both) == 2 else "value"
        literal, number, place = both[fact]
    answer = ANSWER[language].format(v=literal, n=number)
    return Turn(_question(rng, language, fact), answer, kind, literal, number, place)


def _unanswerable(rng, language, drafts) -> str:
    """Return a question that the passages don't answer: of an entity they name, of an attribute, or of neither."""
    facts = [fact for draft in drafts for fact in draft.facts]
    # What is stated whole or in part (cut in two) must not be asked for.
    told = {(fact.entity, fact.attribute.id) for fact in facts}
    while True:
        model = rng.choice(facts)
        roll = rng.random()
        if roll < 0.45:
            alike = siblings(language, model.attribute, model.kind)
            attribute = rng.choice(alike) if alike and rng.random() < ALIKE else None
            asked = _invent_fact(rng, language, model.kind, model.entity, attribute, model.asked)
        elif roll < 0.9:
            asked = _invent_fact(rng, language, model.kind, attribute=model.attribute)
        else:
            asked = _invent_fact(rng, language, rng.choice(list(words(language).entities)))
        if (asked.entity, asked.attribute.id) not in told:
            return _question(rng, language, asked)


def _question(rng, language, fact) -> str:
    entity = rng.choice(fact.asked or (fact.entity,))
    return as_typed(rng, language, fill(rng.choice(fact.attribute.questions), language, entity))


def as_typed(rng: random.Random, language: str, question: str) -> str:
    """Return a question, now and then as people type: without capitals, marks or accents."""
    if rng.random() < 0.12:
        question = question.lower().strip("¿?. ") if rng.random() < 0.5 else question.strip("¿?. ")
        if language == "es" and rng.random() < 0.5:
            letters = unicodedata.normalize("NFD", question)
            question = "".join(c for c in letters if unicodedata.category(c) != "Mn")
    return question


def invent_place(rng: random.Random, language: str, year: int, dated: bool = False) -> str:
    """Return where a passage stands, such as 'fares_2019.pdf, p. 3'.

    `year` is the one it is of, 0 for none; in a share of the places it shows, and in all that are `dated`.
    """
    stem = rng.choice(words(language).frame["file_stems"])
    year = year if dated or (year and rng.random() < 0.7) else rng.choice((0, 0, year))
    return f"{stem}{f'_{year}' if year else ''}.{rng.choice(('pdf', 'txt'))}, p. {rng.randint(1, 40)}"
