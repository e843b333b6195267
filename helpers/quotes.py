"""The sentences of the passages that answer best, quoted with their places: an answer without a model.

A question that the passages don't answer is refused: `confidence` says how sure the quotes are.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from helpers import settings
from helpers.evaluation import AnswerScores, QuestionSet, score_answers
from helpers.language import detect_language, fold, sentences, stems, words
from helpers.retrieval import Hit, Index, Retriever

QUOTES = 2
QUOTE_CHARACTERS = 588  # of all quotes together: with their numbers they stay under 600

# How a sentence is scored: the share of the question's words it holds, plus a part of the cosine of the windows it
# stands in, plus a little for holding the kind of thing that is asked for, less a little for standing in a passage that
# scored lower, and for its length. Fitted by conditional logit on 612 English and 612 Spanish questions of XQuAD and
# divided by the first weight; the length counts more than fitted, so that two quotes stay short.
MEANING_WEIGHT = 0.4
KIND_WEIGHT = 0.14
GAP_WEIGHT = 0.22
LENGTH_WEIGHT = 0.12

# For the confidence in an answer: see `confidence`.
FEW_CHUNKS = 30
MIDDLING_LEAD = 4.0

_MONTHS = (
    "january|february|march|april|may|june|july|august|september|october|november|december|enero|febrero|marzo|abril|"
    "mayo|junio|julio|agosto|septiembre|octubre|noviembre|diciembre"
)
_NUMBER_WORDS = frozenset(
    "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty sixty hundred "
    "thousand million dozen half third quarter twice dos tres cuatro cinco seis siete ocho nueve diez once doce "
    "quince veinte treinta cuarenta cincuenta sesenta cien ciento mil millon millones tercio mitad docena".split()
)
_DATE = re.compile(
    rf"\b(?:1\d{{3}}|20\d{{2}})s?\b|\b(?:{_MONTHS}|siglo|century|monday|tuesday|wednesday|thursday|friday|saturday|sunday|"
    r"lunes|martes|miércoles|jueves|viernes|sábado|domingo)\b",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<=[\w,;:)] )[A-ZÁÉÍÓÚÑ]\w+")
# A name of one word or more ('Night of Lanterns'); not the first word of a question, which is always capitalised.
_NAMES = re.compile(
    r"(?<=[\w,;:] )[A-ZÁÉÍÓÚÑ][\w'-]*(?: (?:(?:de|del|la|las|los|el|of|the|and|y) )*[A-ZÁÉÍÓÚÑ][\w'-]*)*"
)
_CAPITALISED = re.compile(r"\b[A-ZÁÉÍÓÚÑ]\w+")
_PROPER = (
    "city|country|person|team|state|university|company|river|island|ship|king|queen|president|town|place|group|church|"
    "ciudad|pais|persona|equipo|estado|universidad|empresa|rio|isla|barco|rey|reina|presidente|pueblo|lugar|grupo|iglesia"
)
_ASKED = (
    (
        "date",
        r"\bwhen\b|\b(?:what|which) (?:year|day|month|date|century)\b|\bcuando\b|\bque (?:ano|fecha|dia|mes|siglo)\b",
    ),
    (
        "number",
        r"\bhow (?:many|much|long|old|far|tall|often|high|big|large|fast|heavy|deep|wide)\b"
        r"|\bwhat (?:percentage|percent|number|age|size|amount|price)\b"
        r"|\bcuant[oa]s?\b|\bque (?:porcentaje|numero|edad|precio|cantidad|tamano)\b",
    ),
    (
        "name",
        r"\b(?:who|whom|whose|where)\b|\b(?:quien|quienes|donde|adonde)\b"
        rf"|\b(?:what|which|que|cual) (?:\w+ )?(?:{_PROPER})s?\b",
    ),
)


@dataclass(frozen=True)
class Citation:
    """A sentence of a passage and where it stands; `number` is the passage's, counted from 1."""

    number: int
    file: str
    page: int
    page_label: str
    quote: str

    def place(self, language: str = "en") -> str:
        """Return where the quote stands, as a person would look it up: 'file.pdf, page iv'."""
        page = self.page_label or str(self.page)
        return f"{self.file}, {'página' if language == 'es' else 'page'} {page}"


@dataclass(frozen=True)
class Sentence:
    """A sentence of the hit number `hit` (from 0): its score, and two parts of it, each about 0 to 1."""

    text: str
    hit: int
    score: float
    coverage: float
    meaning: float


def quote(question: str, hits: Sequence[Hit], ranked: Sequence[Sentence]) -> tuple[Citation, ...]:
    """Return the best sentences as citations, the longer shortened to the stretch that fits the question."""
    best = ranked[:QUOTES]
    half = QUOTE_CHARACTERS // QUOTES
    citations = []
    for number, sentence in enumerate(best):
        # What the other quotes leave free of their halves goes to this one.
        others = sum(min(len(other.text), half) for place, other in enumerate(best) if place != number)
        text = shorten(sentence.text, question, QUOTE_CHARACTERS - others)
        chunk = hits[sentence.hit].chunk
        citations.append(Citation(sentence.hit + 1, chunk.file, chunk.page, chunk.page_label, text))
    return tuple(citations)


def confidence(question: str, retriever: Retriever, hits: Sequence[Hit], ranked: Sequence[Sentence]) -> float:
    """Return a score that is the higher the likelier the hits answer `question`; about 0.5 to 1.8, 0 for no sentence.

    Five signs: how near the nearest window is in meaning; how much of the question the documents know at all, rare
    words counting more; whether the names it names stand in the hits; how well the best sentence fits; how far the best
    hit stands out from all chunks. The weights come from a logistic regression on the development questions, as they
    are and with each one's answer taken out of the hits.
    """
    if not ranked:
        return 0.0
    index = retriever.index
    language = index.question_language(question)
    weights = {stem: index.rarity(stem) for stem in stems(question, language)}
    known = _coverage(weights, frozenset(stem for stem in weights if stem in index.bm25.vocab_dict), exact=True)
    # Where only words were searched there are no cosines: a middling one stands in.
    meaning = max((cosine for hit in hits for _, _, cosine in hit.windows), default=0.5)
    # In a handful of chunks none can stand out by several standard deviations: again a middling value.
    lead = hits[0].score if len(index.chunks) >= FEW_CHUNKS else MIDDLING_LEAD
    fit = ranked[0].score
    return 0.3 * meaning + 0.3 * known + 0.1 * _names_found(question, hits) + 0.3 * fit + 0.12 * lead


def _names_found(question: str, hits: Sequence[Hit]) -> float:
    """Return the share of the names in a question that stand in the hits; 1 where it names none."""
    names = [fold(name) for name in _NAMES.findall(question)]
    texts = [fold(" ".join(hit.chunk.text.split())) for hit in hits]
    return sum(any(name in text for text in texts) for name in names) / len(names) if names else 1.0


def rank_sentences(question: str, hits: Sequence[Hit]) -> list[Sentence]:
    """Return the sentences of the hits, the one that answers `question` best first."""
    language = detect_language(question)
    candidates = _sentences_of(hits)
    stemmed = [frozenset(stems(text, language)) for _, text, _ in candidates]
    holding = Counter(stem for sentence in stemmed for stem in sentence)
    asked = dict.fromkeys(stems(question, language))
    weights = {stem: math.log(1 + (len(candidates) - holding[stem] + 0.5) / (holding[stem] + 0.5)) for stem in asked}
    kind = asked_kind(question)
    ranked = []
    for (number, text, meaning), sentence in zip(candidates, stemmed, strict=True):
        if sentence <= asked.keys():  # a heading that only names what was asked for answers nothing
            continue
        coverage = _coverage(weights, sentence)
        kind_held = (1 if holds_kind(kind, text, question) else -1) if kind else 0
        gap = hits[0].score - hits[number].score
        score = coverage + MEANING_WEIGHT * meaning + KIND_WEIGHT * kind_held
        score -= GAP_WEIGHT * gap + LENGTH_WEIGHT * math.log(1 + len(text))
        ranked.append(Sentence(text, number, score, coverage, meaning))
    return sorted(ranked, key=lambda sentence: -round(sentence.score, 5))


def excerpts(hits: Sequence[Hit], ranked: Sequence[Sentence], count: int) -> list[Hit]:
    """Return the hits that hold one of the `count` best sentences, each with those of its own as its excerpt.

    This is contextual compression: a weak reader finds the answer sooner in little text. Sentences keep their order.
    """
    best = {(sentence.hit, sentence.text) for sentence in ranked[:count]}
    kept: dict[int, list[str]] = {}
    for number, text, _ in _sentences_of(hits):
        if (number, text) in best:
            kept.setdefault(number, []).append(text)
    return [replace(hits[number], excerpt=tuple(texts)) for number, texts in kept.items()]


def _sentences_of(hits: Sequence[Hit]) -> list[tuple[int, str, float]]:
    """Return (hit, text, meaning) of each sentence of the hits; one that stands in two hits counts for the better.

    `meaning` is the mean cosine of the windows that a sentence stands in, by the characters they share.
    """
    found: dict[str, tuple[int, str, float]] = {}
    for number, hit in enumerate(hits):
        for start, end in sentences(hit.chunk.text):
            text = " ".join(hit.chunk.text[start:end].split())
            if len(words(text)) < 2:  # a cell of a table, a page number
                continue
            shared = [(max(0, min(end, last) - max(start, first)), cosine) for first, last, cosine in hit.windows]
            total = sum(length for length, _ in shared)
            meaning = sum(length * cosine for length, cosine in shared) / total if total else 0.0
            found.setdefault(text, (number, text, meaning))
    return list(found.values())


def _coverage(weights: dict[str, float], text: frozenset[str], exact: bool = False) -> float:
    """Return the share, by weight, of the question's stems that a text holds; a similar one counts in part."""
    total = sum(weights.values())
    held = sum(w * (stem in text if exact else _likeness(stem, text)) for stem, w in weights.items())
    return held / total if total else 0.0


def _likeness(stem: str, text: frozenset[str]) -> float:
    """Return 1 if the stem is in the text, else the best overlap of three-letter parts (Jaccard), squared."""
    if stem in text:
        return 1.0
    parts = _parts(stem)
    return max((len(parts & other) / len(parts | other) for other in map(_parts, text)), default=0.0) ** 2


@lru_cache(maxsize=100_000)
def _parts(stem: str) -> frozenset[str]:
    padded = f"_{stem}"
    return frozenset(padded[i : i + 3] for i in range(max(1, len(padded) - 2)))


def asked_kind(question: str) -> str:
    """Return what kind of thing a question asks for: 'date', 'number', 'name', or '' where it doesn't tell."""
    folded = fold(question)
    return next((kind for kind, pattern in _ASKED if re.search(pattern, folded)), "")


def holds_kind(kind: str, text: str, question: str) -> bool:
    """Say whether `text` holds a date, number or name that the question doesn't hold already."""
    return bool(_things(kind, text, _NAME) - _things(kind, question, _CAPITALISED))


def _things(kind: str, text: str, name: re.Pattern) -> set[str]:
    if kind == "date":
        return {match.lower() for match in _DATE.findall(text)}
    if kind == "number":
        return {word for word in words(text) if word[0].isdigit() or fold(word) in _NUMBER_WORDS}
    return set(name.findall(text))


def shorten(text: str, question: str, limit: int) -> str:
    """Return at most `limit` characters of `text`: the stretch of whole words that holds most of the question's."""
    if len(text) <= limit:
        return text
    language = detect_language(question)
    asked = set(stems(question, language))
    room = limit - 4  # an ellipsis and a space on either side
    starts = [0] + [match.end() for match in re.finditer(r"\s+", text)]

    def held(start: int) -> int:
        return len(asked & set(stems(text[start : start + room], language)))

    start = max((s for s in starts if s < max(1, len(text) - room // 2)), key=held)
    piece = text[start : start + room]
    if start + room < len(text):
        piece = piece.rsplit(None, 1)[0] if " " in piece else piece
        piece += " …"
    return ("… " if start else "") + piece


def evaluate_quotes(index: Index, questions: QuestionSet) -> dict[str, AnswerScores]:
    """Answer every question with quotes from the top `settings.TOP_K` hits; return the scores of each language."""
    retriever = Retriever(index)
    scores = {}
    for language in sorted({question.language for question in questions.questions}):
        asked = [question for question in questions.questions if question.language == language]
        texts, refused = [], []
        for question, hits in zip(asked, retriever.search_many([q.question for q in asked]), strict=True):
            ranked = rank_sentences(question.question, hits)
            texts.append(" ".join(cited.quote for cited in quote(question.question, hits, ranked)))
            sure = confidence(question.question, retriever, hits, ranked)
            refused.append(sure < settings.QUOTES_THRESHOLD)
        scores[language] = score_answers(asked, texts, refused)
    return scores
