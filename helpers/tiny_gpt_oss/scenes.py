"""Passages put together at random: who did what to what, when, where, for how much; what things are like; tables.

A sentence of these states several things at once, so that finding it isn't enough: a question must be understood to
know which of its values it wants. Questions use other words of the thesaurus.
"""

import random
from dataclasses import dataclass, field

from helpers.tiny_gpt_oss.curriculum import Example, Shape
from helpers.tiny_gpt_oss.prose import Prose, example_of
from helpers.tiny_gpt_oss.thesaurus import (
    Group,
    aside,
    forms,
    frames,
    groups,
    invent_thing,
    noun_phrase,
    without_article,
)
from helpers.tiny_gpt_oss.worlds import contracted, invent_name, with_strange_word, words

TIMES = ("date", "year", "month", "weekday")
_IN_TABLES = set("money count year length weight clock small percent duration code hours date".split())


@dataclass
class Cast:
    """Who and what the passages of an example tell of, and which deeds and attributes of theirs are told already."""

    people: list[tuple[str, str]]
    things: list[tuple[str, tuple[str, ...]]]
    deeds: list[Group]
    measures: list[Group]
    told: set = field(default_factory=set)


def invent_cast(rng: random.Random, language: str) -> Cast:
    """Return a few people with their roles, things, deeds and attributes, from which passages of one example draw."""
    posts = [group.said(rng) for group in rng.sample(groups(language, "roles"), 6)]
    people = [(f"{invent_name(rng)} {invent_name(rng)}", post) for post in posts]
    things = [invent_thing(rng, language) for _ in range(rng.randint(4, 14))]
    return Cast(people, things, rng.sample(groups(language, "verbs"), 12), rng.sample(groups(language, "measures"), 10))


def make_scenes(rng: random.Random, language: str, shape: Shape) -> Example:
    """Write one example whose passages tell of the same people and things; the same `rng` state writes the same."""
    cast = invent_cast(rng, language)
    chosen = []
    for _ in range(2 * rng.randint(*shape.passages) + 1):
        writer = Writer(rng, language, cast)
        text = writer.passage(rng.randint(*shape.characters))
        chosen.append(Prose(text, tuple(writer.questions), tuple(writer.missing)))
    return example_of(rng, language, shape, chosen)


class Writer:
    """Writes one passage with slots and the questions on it."""

    def __init__(self, rng: random.Random, language: str, cast: Cast):
        self.rng, self.language, self.cast, self.frames = rng, language, cast, frames(language)
        self.questions: list[tuple[str, str]] = []
        self.missing: list[str] = []
        self.slots = 0
        self.known: set[str] = set()  # people whose role was told

    def slot(self, kind: str) -> tuple[str, str]:
        """Return a new slot as the text defines it, and as questions and answers name it."""
        self.slots += 1
        return f"{{v{self.slots}:{kind}}}", f"{{v{self.slots}}}"

    def passage(self, characters: int) -> str:
        """Return the text of a passage of about so many characters."""
        rng, frame = self.rng, words(self.language).frame
        parts: list[str] = []
        style = rng.choice((" ", " ", " ", "\n"))
        while sum(map(len, parts)) < characters:
            roll = rng.random()
            if roll < 0.55:
                parts.append(self.event())
            elif roll < 0.82:
                parts.append(self.state())
            elif roll < 0.87 and characters > 300:
                parts.append(f"\n{self.table()}\n")
            else:
                parts.append(with_strange_word(rng, rng.choice(frame["fillers"])))
        return style.join(part for part in parts if part).strip()

    def fresh(self, options: list, *with_: object):
        """Return an option that wasn't told together with the rest, and mark it as told; None where there is none."""
        for option in self.rng.sample(options, len(options)):
            key = (id(option), *map(id, with_))
            if key not in self.cast.told:
                self.cast.told.add(key)
                return option
        return None

    def ask(self, kind: str, answer: str, group: Group, said: str, **parts: str | tuple[str, ...]) -> None:
        """Add two questions about a deed that use other words."""
        for _ in range(2):
            self.questions.append((self.question(kind, group, said, **parts), answer))

    def question(self, kind: str, group: Group, said: str, **parts: str | tuple[str, ...]) -> str:
        """Return a question about a deed; parts that are tuples are wordings to choose from."""
        template = self.rng.choice(self.frames["asked"][kind])
        past, participle = forms(group.asked(self.rng, said))
        chosen = {key: self.rng.choice(part) if isinstance(part, tuple) else part for key, part in parts.items()}
        return _sentence(template.format(d=participle, p=past, **chosen))

    def event(self) -> str:
        """Return a sentence on who did what to a thing, and ask for what it tells."""
        rng, language, cast = self.rng, self.language, self.cast
        thing = rng.choice(cast.things)
        group = self.fresh(cast.deeds, thing)
        if group is None:
            return ""
        said = group.said(rng)
        past, participle = forms(said)
        entity, wordings = thing
        person = self.fresh(cast.people, group) if rng.random() < 0.75 else None
        kinds = rng.sample(list(self.frames["told"]), rng.choice((0, 1, 1, 2, 2, 3)))
        times = [kind for kind in kinds if kind in TIMES]
        kinds = [kind for kind in kinds if kind not in times[1:]]
        phrases = []
        for kind in kinds:
            value, name = self.value(kind)
            phrases.append(rng.choice(self.frames["told"][kind]).format(v=value))
            self.ask(kind, name, group, said, e=wordings)
        rng.shuffle(phrases)
        phrases.sort(key=lambda phrase: phrase.startswith(("because", "since", "porque", "ya que")))
        front = phrases.pop(0) + ", " if len(phrases) > 1 and rng.random() < 0.4 else ""
        rest = "".join(f" {phrase}" for phrase in phrases)
        by = f", {aside(rng, language)}," if rng.random() < 0.15 else ""
        if person is None:
            text = f"{entity}{by} was {participle}" if language == "en" else f"{entity}{by} se {said}"
        else:
            name, post = person
            self.ask("who", name, group, said, e=wordings)
            self.ask("what", entity, group, said, a=name)
            if name not in self.known and rng.random() < 0.4:
                self.known.add(name)
                title = noun_phrase(language, post)
                by = f", {title},"
                self.questions.append((_sentence(rng.choice(self.frames["asked"]["role"]).format(a=name)), title))
            if language == "es":
                text = f"{name}{by} {said} {entity}" if rng.random() < 0.7 else f"fue {name}{by} quien {said} {entity}"
            elif rng.random() < 0.6:
                text = f"{name}{by} {past} {entity}"
            else:
                text = f"{entity} was {participle} by {name}{by}"
        untold = [kind for kind in ("place", "money", "why", "clock", "with") if kind not in kinds]
        self.missing.append(self.question(rng.choice(untold), group, said, e=wordings))
        other = self.fresh(cast.deeds, thing)
        if other:
            asked = rng.choice(["date", "who", *kinds])
            self.missing.append(self.question(asked, other, other.said(rng), e=wordings, a=""))
        return _sentence(f"{front}{text.rstrip(',')}{rest}.")

    def value(self, kind: str) -> tuple[str, str]:
        """Return the value of a circumstance as the text has it, and as an answer names it."""
        rng = self.rng
        if kind == "with":
            thing, _ = invent_thing(rng, self.language)
            return thing, thing
        if kind == "why":
            reason = rng.choice(self.frames["reasons"])
            return reason, reason
        return self.slot("person" if kind == "for" else kind)

    def state(self) -> str:
        """Return a sentence on one to three attributes of a thing, and ask for each."""
        rng, language, cast = self.rng, self.language, self.cast
        entity, wordings = thing = rng.choice(cast.things)
        told = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            group = self.fresh(cast.measures, thing)
            if group:
                said = group.said(rng)
                told.append((group, said, *self.slot(rng.choice(group.kinds))))
        if not told:
            return ""
        for group, said, _, name in told:
            for _ in range(2):
                self.questions.append((self.inquiry(group, said, wordings), name))
        other = self.fresh(cast.measures, thing)
        if other:
            self.missing.append(self.inquiry(other, other.said(rng), wordings))
        _, said, value, _ = told[0]
        both = ("and", "its") if language == "en" else ("y", "su")
        more = [f"{both[1]} {without_article(noun)} {number}" for _, noun, number, _ in told[1:]]
        joined = f", {more[0]}" if len(more) == 1 else f", {more[0]} {both[0]} {more[1]}" if more else ""
        text = rng.choice(self.frames["stated"]).format(
            m=noun_phrase(language, said),
            b=without_article(said),
            e=entity,
            v=value,
            more=joined,
            s=aside(rng, language),
        )
        return _sentence(text)

    def inquiry(self, group: Group, said: str, wordings: tuple[str, ...]) -> str:
        """Return a question for an attribute."""
        noun = group.asked(self.rng, said)
        template = self.rng.choice(self.frames["inquired"])
        phrase = {"m": noun_phrase(self.language, noun), "b": without_article(noun)}
        return _sentence(template.format(e=self.rng.choice(wordings), **phrase))

    def table(self) -> str:
        """Return a table as its text comes out of a PDF: a line of headings, then a line for each thing."""
        rng, cast = self.rng, self.cast
        columns = [group for group in cast.measures if _IN_TABLES & set(group.kinds)][: rng.randint(1, 4)]
        rows = rng.sample(cast.things, min(len(cast.things), rng.randint(2, 5)))
        columns = [column for column in columns if not any((id(column), id(row)) in cast.told for row in rows)]
        if not columns:
            return ""
        heads = [(column, column.said(rng), rng.choice(sorted(_IN_TABLES & set(column.kinds)))) for column in columns]
        gap = rng.choice((" ", "  ", " | ", "\t"))
        lines = [gap.join(["", *(without_article(said) for _, said, _ in heads)]).strip()]
        for row in rows:
            entity, wordings = row
            cells = []
            for column, said, kind in heads:
                cast.told.add((id(column), id(row)))
                cell, name = self.slot(kind)
                cells.append(cell)
                self.questions.append((self.inquiry(column, said, wordings), name))
            lines.append(gap.join([without_article(entity).capitalize(), *cells]))
        return "\n".join(lines)


def _sentence(text: str) -> str:
    """Return a text that begins with a capital, contracted in Spanish."""
    text = contracted(text)
    start = next((place for place, letter in enumerate(text) if letter.isalpha() or letter == "{"), 0)
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]
