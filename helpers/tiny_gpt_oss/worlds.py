"""Invented worlds: entities, attributes and values, with the words of both languages to state and to ask them.

The words stand in `curriculum/*.toml`; every name is made here from syllables, so none is known to anybody.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "curriculum"
LANGUAGES = ("en", "es")
STRANGE = (
    0.25  # share of fillers, phrases and nouns in which an invented word stands: real texts have words of their own
)

_ONSETS = "b c d f g h j k l m n p r s t v z b d f g k l m n p r s t v".split()
_ONSETS += "br ch cl cr dr fl gr pl pr qu sh sk st tr w y ñ".split()
_VOWELS = "a e i o u a e i o u a e i o u ai ei ia io ue á é í ó ú".split()
_CODAS = ["", "", "", "l", "n", "r", "s", "x", "nd", "lt", "rk", "m", "th", "z"]
_MONTHS = {
    "en": "January February March April May June July August September October November December".split(),
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre".split(),
}
_WEEKDAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "es": "lunes martes miércoles jueves viernes sábado domingo".split(),
}
_SMALL = {
    "en": "two three four five six seven eight nine ten twelve fifteen twenty thirty".split(),
    "es": "dos tres cuatro cinco seis siete ocho nueve diez doce quince veinte treinta".split(),
}
_CURRENCIES = ("euros", "pesos", "dollars", "coronas", "talers", "florins", "marks", "ducats", "reales", "liras")
_DURATIONS = {
    "en": ("seconds", "minutes", "hours", "days", "weeks", "months", "years", "working days"),
    "es": ("segundos", "minutos", "horas", "días", "semanas", "meses", "años", "días hábiles"),
}
# Units and the largest number that goes with them, by the kind of value.
_UNITS = {
    "length": (
        ("mm", 900),
        ("cm", 300),
        ("m", 90),
        ("km", 400),
        ("metres|metros", 120),
        ("kilometres|kilómetros", 300),
    ),
    "weight": (("g", 900), ("kg", 500), ("tonnes|toneladas", 60), ("grams|gramos", 900), ("kilos|kilos", 90)),
    "temperature": (("°C", 240), ("degrees|grados", 90)),
    "percent": (("%", 99), ("percent|por ciento", 99)),
    "speed": (("km/h", 280), ("knots|nudos", 40), ("m/s", 30)),
    "area": (("m²", 9000), ("hectares|hectáreas", 400), ("square metres|metros cuadrados", 5000)),
    "volume": (("ml", 900), ("litres|litros", 600), ("l", 90), ("m³", 200)),
    "power": (("W", 3000), ("kW", 200), ("watts|vatios", 2000)),
}
COMPOUND_KINDS = (
    "count",
    "length",
    "weight",
    "temperature",
    "duration",
    "money",
    "code",
    "percent",
    "person",
    "date",
    "volume",
)


@dataclass(frozen=True)
class Attribute:
    """What can be said of an entity, and how: templates with {e} for the entity and {v} for the value.

    Attributes of one `family` differ by a qualifier alone, such as the price for adults and that for children.
    """

    id: str
    of: tuple[str, ...]
    value: str
    label: str
    statements: tuple[str, ...]
    followups: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class Words:
    """The words of one language: attributes by the kind of entity they fit, and everything around them."""

    attributes: dict[str, tuple[Attribute, ...]]
    entities: dict[str, tuple[str, ...]]
    named: dict[str, tuple[str, ...]]
    frame: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fact:
    """One value of one attribute of one entity; `entity` as it stands in a sentence, article included.

    `asked`: other ways to call the entity, for questions; none: as it stands.
    """

    entity: str
    kind: str
    attribute: Attribute
    value: str
    asked: tuple[str, ...] = ()


@lru_cache
def reserved() -> frozenset[str]:
    """Return the names of the course's documents, in lower case: a model that is tested on them never meets them."""
    return frozenset((FOLDER / "reserved.txt").read_text(encoding="utf-8").split())


@lru_cache
def words(language: str) -> Words:
    """Read the words of a language, 'en' or 'es'."""
    frame = tomllib.loads((FOLDER / f"frame.{language}.toml").read_text(encoding="utf-8"))
    attributes: dict[str, list[Attribute]] = {}
    for path in sorted(set(FOLDER.glob(f"*.{language}.toml")) - {FOLDER / f"frame.{language}.toml"}):
        subject = tomllib.loads(path.read_text(encoding="utf-8"))
        frame["fillers"] += subject.get("fillers", [])
        for entry in subject["attribute"]:
            fields = {key: tuple(part) if isinstance(part, list) else part for key, part in entry.items()}
            attribute = Attribute(**fields)
            for kind in attribute.of:
                attributes.setdefault(kind, []).append(attribute)
    return Words(
        {kind: tuple(found) for kind, found in attributes.items()},
        {kind: tuple(found) for kind, found in frame.pop("entities").items()},
        {kind: tuple(found) for kind, found in frame.pop("named").items()},
        {key: tuple(found) for key, found in frame.items()},
    )


def invent_name(rng: random.Random, capital: bool = True) -> str:
    """Return a made-up name of two or three syllables, none of `curriculum/reserved.txt`."""
    while True:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))]
        name = "".join(syllables) + rng.choice(_CODAS)
        if name not in reserved():
            return name.capitalize() if capital else name


def invent_entity(rng: random.Random, language: str, kind: str, named: float = 0.6) -> str:
    """Return an entity of a kind: with an invented name in a share `named` of the cases, else a common noun."""
    vocabulary = words(language)
    if kind == "person" and rng.random() < named:
        return _person(rng)
    if rng.random() < named:
        name = invent_name(rng)
        if rng.random() < 0.2:
            name += f" {rng.randint(1, 99)}" if kind in ("device", "product", "vehicle") else f" {invent_name(rng)}"
        return rng.choice(vocabulary.named[kind]).format(n=name)
    return rng.choice(vocabulary.entities[kind])


def invent_value(rng: random.Random, language: str, attribute: Attribute) -> str:
    """Return a value of an attribute, as it stands in a sentence."""
    if attribute.value == "phrase":
        return with_strange_word(rng, rng.choice(attribute.values))
    return _VALUES.get(attribute.value, _measure)(rng, language, attribute.value)


def invent(rng: random.Random, language: str, kind: str) -> str:
    """Return a value of a kind; beside those of attributes, 'given' and 'name' are single names, 'small' a number."""
    if kind in ("given", "name"):
        return invent_name(rng)
    if kind == "small":
        return rng.choice(_SMALL[language]) if rng.random() < 0.6 else str(rng.randint(2, 30))
    return _VALUES.get(kind, _measure)(rng, language, kind)


def siblings(language: str, attribute: Attribute, kind: str) -> list[Attribute]:
    """Return the other attributes of a kind of entity that differ from this one by a qualifier alone."""
    family = attribute.family
    return [
        a for a in words(language).attributes.get(kind, ()) if family and a.family == family and a.id != attribute.id
    ]


def with_strange_word(rng: random.Random, text: str) -> str:
    """Return a text, in a share `STRANGE` of the cases with an invented word for one of its longer words."""
    places = [found.span() for found in re.finditer(r"\b[a-záéíóúüñ]{5,}\b", text)]
    if not places or rng.random() >= STRANGE:
        return text
    start, end = rng.choice(places)
    return text[:start] + invent_name(rng, capital=False) + text[end:]


def compound_attribute(rng: random.Random, language: str) -> Attribute:
    """Return an attribute whose name is put together from nouns ("copper valve tolerance"), with plain templates.

    They have no synonyms: what they teach is to compare the words of a question with those of a passage.
    """
    frame = words(language).frame
    kind = rng.choice(COMPOUND_KINDS)
    if language == "en":
        name = with_strange_word(rng, " ".join(rng.sample(frame["nouns"], rng.choice((1, 2, 2)))))
        if rng.random() < 0.4:
            name = f"{rng.choice(frame['adjectives'])} {name}"
        article, it = "the", "the"
        statements = (
            f"{article.capitalize()} {name} of {{e}} is {{v}}.",
            f"{{e}} has a {name} of {{v}}.",
            f"For {{e}}, {it} {name} is set at {{v}}.",
            f"{{v}} is the {name} of {{e}}.",
            f"The sheet for {{e}} gives {{v}} as its {name}.",
            f"Note that the {name} of {{e}}, which has been a matter of some debate, now stands at {{v}}.",
        )
        followups = (f"Its {name} is {{v}}.", f"The {name} is {{v}}.", f"{name.capitalize()}: {{v}}.")
        questions = (
            f"What is the {name} of {{e}}?",
            f"What {name} does {{e}} have?",
            f"Which {name} is given for {{e}}?",
            f"For {{e}}, what is the {name}?",
            f"Tell me the {name} of {{e}}.",
            f"{{e}}: {name}?",
        )
    else:
        feminine = rng.random() < 0.5
        name = rng.choice(frame["nouns_f" if feminine else "nouns_m"])
        if rng.random() < 0.6:
            name += f" de {rng.choice(frame['nouns_m' if rng.random() < 0.5 else 'nouns_f'])}"
        name = with_strange_word(rng, name)
        if rng.random() < 0.4:
            name += f" {rng.choice(frame['adjectives'])}"
        article = "la" if feminine else "el"
        statements = (
            f"{article.capitalize()} {name} de {{e}} es {{v}}.",
            f"{{e}} tiene {'una' if feminine else 'un'} {name} de {{v}}.",
            f"Para {{e}}, {article} {name} se fija en {{v}}.",
            f"{{v}} es {article} {name} de {{e}}.",
            f"La ficha de {{e}} da {{v}} como {name}.",
            f"Conviene saber que {article} {name} de {{e}}, tras mucho debate, queda en {{v}}.",
        )
        followups = (f"Su {name} es {{v}}.", f"{article.capitalize()} {name} es {{v}}.", f"{name.capitalize()}: {{v}}.")
        questions = (
            f"¿Cuál es {article} {name} de {{e}}?",
            f"¿Qué {name} tiene {{e}}?",
            f"¿Qué {name} se indica para {{e}}?",
            f"Para {{e}}, ¿cuál es {article} {name}?",
            f"Dime {article} {name} de {{e}}.",
            f"{{e}}: ¿{name}?",
        )
    return Attribute(f"compound {name}", (), kind, name.capitalize(), statements, followups, questions)


def fill(template: str, language: str, entity: str = "", value: str = "") -> str:
    """Return a template with its entity and value, capitalised; in Spanish 'de el' and 'a el' are contracted."""
    text = template.replace("{e}", entity)
    text = (contracted(text) if language == "es" else text).replace("{v}", value)
    start = next((place for place, letter in enumerate(text) if letter.isalnum()), 0)
    return text[:start] + text[start].upper() + text[start + 1 :]


def contracted(text: str) -> str:
    """Return Spanish text with 'de el' and 'a el' as 'del' and 'al'."""
    return re.sub(r"\b([Dd]e|[Aa]) el (?=\S)", lambda found: "del " if found[1] in "Dede" else "al ", text)


def _person(rng, language="", kind=""):
    return f"{invent_name(rng)} {invent_name(rng)}"


def _place(rng, language, kind):
    return _without_el(rng, language, kind)


def _without_el(rng, language, kind):
    """Return a named entity; in Spanish none with 'el', which would contract and no longer stand in the passage."""
    patterns = [pattern for pattern in words(language).named[kind] if not pattern.startswith("el ")]
    return rng.choice(patterns).format(n=invent_name(rng))


def _number(rng, language, largest):
    """Return a number up to `largest`, small ones being likelier, sometimes with a decimal or as a word."""
    roll = rng.random()
    if roll < 0.12:
        return rng.choice(_SMALL[language])
    number = round(10 ** rng.uniform(0.3, len(str(largest)))) % largest + 2
    if roll < 0.3:
        return f"{number}{'.' if language == 'en' else ','}{rng.randint(1, 9)}"
    return _grouped(number, language)


def _grouped(number, language):
    return f"{number:,}".replace(",", "," if language == "en" else ".") if number >= 10_000 else str(number)


def _measure(rng, language, kind):
    unit, largest = rng.choice(_UNITS[kind])
    unit = unit.split("|")[language == "es"] if "|" in unit else unit
    return f"{_number(rng, language, largest)} {unit}"


def _money(rng, language, kind):
    amount = _number(rng, language, rng.choice((30, 900, 90_000)))
    if amount[0].isdigit() and rng.random() < 0.3:
        return rng.choice(("${}", "EUR {}", "£{}") if language == "en" else ("{} €", "${}")).format(amount)
    if rng.random() < 0.25:
        return f"{amount} {invent_name(rng, capital=False)}s"
    return f"{amount} {rng.choice(_CURRENCIES)}"


def _duration(rng, language, kind):
    unit = rng.choice(_DURATIONS[language])
    number = rng.choice(_SMALL[language]) if rng.random() < 0.3 else rng.randint(2, 90)
    return f"{number} {unit}"


def _count(rng, language, kind):
    return (
        rng.choice(_SMALL[language]) if rng.random() < 0.15 else _grouped(round(10 ** rng.uniform(0.4, 4.3)), language)
    )


def invent_date(rng: random.Random, language: str, years: tuple[int, int] = (1900, 2026)) -> str:
    """Return a full date in words, such as '3 May 2021' or '3 de mayo de 2021'."""
    day, month, year = rng.randint(1, 28), rng.choice(_MONTHS[language]), rng.randint(*years)
    if language == "es":
        return f"{day} de {month} de {year}"
    return f"{month} {day}, {year}" if rng.random() < 0.2 else f"{day} {month} {year}"


def _date(rng, language, kind):
    date = invent_date(rng, language)
    if rng.random() < 0.35:  # without its year
        date = re.sub(r",? (?:de )?\d{4}$", "", date)
    return date


def _year(rng, language, kind):
    return str(rng.randint(1650, 2026))


def _clock(rng, language, kind):
    hour, minute = rng.randint(0, 23), rng.choice(("00", "15", "30", "45", f"{rng.randint(0, 59):02}"))
    return (
        f"{hour or 12}:{minute} {rng.choice(('am', 'pm'))}"
        if language == "en" and 0 < hour < 13 and rng.random() < 0.3
        else f"{hour}:{minute}"
    )


def _hours(rng, language, kind):
    opening, closing = (
        f"{rng.randint(6, 11)}:{rng.choice(('00', '30'))}",
        f"{rng.randint(15, 22)}:{rng.choice(('00', '30', '45'))}",
    )
    return f"{opening} {'to' if language == 'en' else 'a'} {closing}"


def _weekday(rng, language, kind):
    return rng.choice(_WEEKDAYS[language])


def _month(rng, language, kind):
    return rng.choice(_MONTHS[language])


def _code(rng, language, kind):
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 3)))
    return f"{letters}{rng.choice('-- /')}{rng.randint(1, 9999)}"


def _phone(rng, language, kind):
    return " ".join(f"{rng.randint(0, 999):03}" for _ in range(rng.choice((2, 3))))


def _email(rng, language, kind):
    return f"{invent_name(rng, False)}@{invent_name(rng, False)}.example"


_VALUES = {
    "money": _money, "duration": _duration, "count": _count, "date": _date, "year": _year, "clock": _clock,
    "hours": _hours, "weekday": _weekday, "month": _month, "code": _code, "phone": _phone, "email": _email,
    "person": _person, "place": _place, "organisation": _without_el,
}  # fmt: skip
