"""Facts that are stated in some words and asked for in others: "the ferry was inspected", "when was the boat checked?".

A model of this size meets too little text to learn by itself which words mean the same. `curriculum/thesaurus/` holds
groups of words that may stand for each other; things, attributes and deeds are put together from them at random.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache

from helpers.tiny_gpt_oss.worlds import FOLDER, Attribute, invent_name

KIND = "thing"  # the kind of entity that facts of this module are about
SAME = 0.25  # share of words that a question takes over as they stand
ASKED = 5  # wordings of an entity that questions use, and of a question
_LINE = re.compile(r"(?P<head>[^:(]+?)\s*(?:\((?P<kinds>[^)]*)\))?\s*:\s*(?P<others>.+)")


@dataclass(frozen=True)
class Group:
    """Words that may stand for each other; of an attribute also the kinds of value that it has."""

    members: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    def said(self, rng: random.Random) -> str:
        """Return the word that a passage uses."""
        return rng.choice(self.members)

    def asked(self, rng: random.Random, said: str) -> str:
        """Return the word that a question uses where the passage says `said`."""
        return said if rng.random() < SAME else rng.choice([word for word in self.members if word != said])


@lru_cache
def groups(language: str, section: str) -> tuple[Group, ...]:
    """Read the groups of 'things', 'roles', 'adjectives', 'verbs' or 'measures'."""
    found = []
    for line in (FOLDER / "thesaurus" / f"{section}.{language}.txt").read_text(encoding="utf-8").splitlines():
        parts = _LINE.fullmatch(line)
        members = (parts["head"], *re.split(r",\s*", parts["others"].strip()))
        found.append(Group(tuple(dict.fromkeys(members)), tuple((parts["kinds"] or "").split())))
    return tuple(found)


@lru_cache
def frames(language: str) -> dict:
    """Read the sentences with blanks that go around the words of the thesaurus."""
    return tomllib.loads((FOLDER / "thesaurus" / f"frames.{language}.toml").read_text(encoding="utf-8"))


def invent_thing(rng: random.Random, language: str) -> tuple[str, tuple[str, ...]]:
    """Return a thing as a passage calls it, article included, and the ways in which questions do."""
    nouns, adjectives = groups(language, "things"), groups(language, "adjectives")
    noun = rng.choice(nouns)
    adjective = rng.choice(adjectives) if rng.random() < 0.35 else None
    part = rng.choice(nouns) if rng.random() < 0.2 else None
    name = invent_name(rng) if rng.random() < 0.2 else ""
    words = [noun.said(rng), adjective and adjective.said(rng), part and part.said(rng)]
    asked = []
    for _ in range(ASKED):
        others = [group and group.asked(rng, word) for group, word in zip((noun, adjective, part), words, strict=True)]
        asked.append(noun_phrase(language, *others, name if rng.random() < 0.8 or not adjective else ""))
    return noun_phrase(language, *words, name), tuple(asked)


def related_attribute(rng: random.Random, language: str) -> Attribute:
    """Return an attribute, or a deed, that passages and questions put into different words."""
    return (_deed if rng.random() < 0.5 else _measure)(rng, language)


def _deed(rng, language) -> Attribute:
    group = rng.choice(groups(language, "verbs"))
    kind = rng.choice(list(frames(language)["deeds"]))
    said = group.said(rng)

    def put(template: str, verb: str) -> str:
        past, participle = forms(verb)
        words = {"{d}": participle, "{p}": past, "{s}": aside(rng, language)}
        for slot, word in words.items():
            template = template.replace(slot, word)
        return template

    frame = frames(language)["deeds"][kind]
    return Attribute(
        f"deed {group.members[0]} {kind}", (), kind, forms(said)[1].capitalize(),
        tuple(put(template, said) for template in frame["statements"]),
        tuple(put(template, said) for template in frame["followups"]),
        tuple(put(rng.choice(frame["questions"]), group.asked(rng, said)) for _ in range(ASKED)),
    )  # fmt: skip


def _measure(rng, language) -> Attribute:
    group = rng.choice(groups(language, "measures"))
    adjective = rng.choice(groups(language, "adjectives")) if rng.random() < 0.3 else None
    role = rng.choice(groups(language, "roles")) if rng.random() < 0.15 else None
    kind = rng.choice(group.kinds)
    words = [group.said(rng), adjective and adjective.said(rng), role and role.said(rng)]

    def put(template: str, noun: str, adjective: str | None, role: str | None) -> str:
        phrase = noun_phrase(language, noun, adjective)
        phrase += f" {'for the' if language == 'en' else 'para'} {role}" if role else ""
        slots = {"{m}": phrase, "{b}": without_article(phrase), "{s}": aside(rng, language)}
        for slot, word in slots.items():
            template = template.replace(slot, word)
        return template

    def other() -> list[str | None]:
        parts = zip((group, adjective, role), words, strict=True)
        return [part and part.asked(rng, word) for part, word in parts]

    frame = frames(language)["measures"]
    questions = frame["questions"] + ([frame["special"][kind]] if kind in frame["special"] else [])
    label = put("{b}", *words)
    return Attribute(
        " ".join(part.members[0] for part in (group, adjective, role) if part), (), kind, label[0].upper() + label[1:],
        tuple(put(template, *words) for template in frame["statements"]),
        tuple(put(template, *words) for template in frame["followups"]),
        tuple(put(rng.choice(questions), *other()) for _ in range(ASKED)),
    )  # fmt: skip


def forms(verb: str) -> tuple[str, str]:
    """Return the simple past and the participle of an English verb: 'took/taken away' has two, 'tested' one."""
    found = re.fullmatch(r"([^/]+)/(\S+)(.*)", verb)
    return (found[1] + found[3], found[2] + found[3]) if found else (verb, verb)


def without_article(phrase: str) -> str:
    """Return a phrase without the definite article it begins with."""
    return re.sub(r"^(the|el|la|los|las) ", "", phrase)


def aside(rng: random.Random, language: str) -> str:
    """Return a remark that stands between commas and tells nothing."""
    return rng.choice(frames(language)["asides"])


def noun_phrase(language: str, noun: str, adjective: str | None = None, part: str | None = None, name: str = "") -> str:
    """Return a noun with its article, adjective, the thing it is part of and its name."""
    name = f" {name}" if name else ""
    if language == "en":
        return f"the {adjective + ' ' if adjective else ''}{noun}{name}{f' of the {part}' if part else ''}"
    if adjective:
        masculine, _, feminine = adjective.partition("/")
        adjective = feminine if feminine and noun.startswith("la ") else masculine
    return f"{noun}{f' {adjective}' if adjective else ''}{name}{f' de {part}' if part else ''}"
