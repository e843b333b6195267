"""Which language a text is in, its words and stems, and its sentences.

English and Spanish are the languages of the course. A text in any other is treated as whichever of the
two it resembles more: search by meaning is untouched by that, search by words loses only the stems.
"""

import re
import threading
import unicodedata
from functools import lru_cache
from itertools import pairwise

LANGUAGES = ("en", "es")
SNOWBALL = {"en": "english", "es": "spanish"}

# Words that ask, and words that point, carry no subject. The published lists leave some of them in.
QUESTION_WORDS = {
    "en": "what which who whom whose when where why how many much long often does did do is are was were can could may "
    "must should would has have had there any kind name called".split(),
    "es": "qué cuál cuáles quién quiénes cuándo dónde adónde cómo cuánto cuánta cuántos cuántas por para hay es son "
    "fue era fueron está están tiene tienen debe deben puede pueden ha han llama tipo".split(),
}

_WORD = re.compile(r"[^\W_]+(?:[.,:][0-9]+)*", re.UNICODE)
# A sentence ends at . ! ? or … (with a closing quote or bracket), before a space and a beginning. The look behind
# starts a match only where a run of dots starts: else a long run is read anew from each of its dots.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’»)\]]*(?=\s+[\"'“‘«(\[¿¡]*[A-ZÁÉÍÓÚÜÑ0-9])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|no|vol|pp?|fig|approx|vs|jr|sr|sra|srta|dra|ud|uds|d|dña|núm|art|cap|pág"
    r"|págs|aprox|av|avda|ee|uu|gral|ing|lic)|\b[A-ZÁÉÍÓÚÑ]|\be\.g|\bi\.e|\bp\. ?ej)\.$",
    re.IGNORECASE,
)


@lru_cache
def stop_words(language: str) -> frozenset[str]:
    """Return the words of `language` that carry no subject ('en' or 'es'), accents folded."""
    from bm25s.stopwords import STOPWORDS_EN_PLUS, STOPWORDS_SPANISH

    published = {"en": STOPWORDS_EN_PLUS, "es": STOPWORDS_SPANISH}[language]
    return frozenset(fold(word) for word in (*published, *QUESTION_WORDS[language]))


_STEMMING = threading.Lock()  # a stemmer holds the word it is at: two threads would mix theirs


@lru_cache
def _stemmer(language: str):
    import snowballstemmer

    return snowballstemmer.stemmer(SNOWBALL[language])


@lru_cache(maxsize=200_000)
def _stem(word: str, language: str) -> str | None:
    """Return the stem of a word in lower case; None for a stop word."""
    if fold(word) in stop_words(language):
        return None
    with _STEMMING:
        return fold(_stemmer(language).stemWord(word))


def fold(text: str) -> str:
    """Lower-case `text` and strip its accents: 'Señal' becomes 'senal'."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def words(text: str) -> list[str]:
    """Return the words and numbers of `text` in order, lower-cased; '14.50' stays one word."""
    return _WORD.findall(text.lower())


def stems(text: str, language: str) -> list[str]:
    """Return the Snowball stems of the words of `text`, in order, without stop words and accents."""
    return [stem for word in words(text) if (stem := _stem(word, language)) is not None]


def detect_language(text: str, default: str = "en") -> str:
    """Return 'en' or 'es', whichever has more of its stop words in `text`; `default` on a tie.

    Only the first 20,000 characters are read. Letters that only Spanish has count like a stop word.
    """
    sample = [fold(word) for word in words(text[:20_000])]
    spanish_letters = sum(text[:20_000].lower().count(letter) for letter in "ñ¿¡")
    counts = {lang: sum(word in _telling(lang) for word in sample) for lang in LANGUAGES}
    counts["es"] += spanish_letters
    if counts["en"] == counts["es"]:
        return default
    return max(counts, key=counts.get)


@lru_cache
def _telling(language: str) -> frozenset[str]:
    """Stop words of this language that are none in the other ('a', 'no' and 'me' tell nothing)."""
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    return stop_words(language) - stop_words(other)


def sentences(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) of each sentence of `text`, in order, white space trimmed.

    A blank line ends a sentence, and so does a line that stops early before a new beginning: that is how a
    heading, a list item or a table row looks in the text of a PDF.
    """
    cuts = {0, len(text)}
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[max(0, match.end() - 12) : match.end()]):
            cuts.add(match.end())
    cuts.update(_line_cuts(text))
    ordered = sorted(cuts)
    spans = []
    for start, end in pairwise(ordered):
        piece = text[start:end]
        stripped = piece.strip()
        if stripped:
            start += len(piece) - len(piece.lstrip())
            spans.append((start, start + len(stripped)))
    return spans


def _line_cuts(text: str) -> list[int]:
    """Return the offsets of line ends that end a sentence."""
    lines = text.split("\n")
    if len(lines) == 1:
        return []
    lengths = sorted(len(line) for line in lines if line.strip())
    # The 90th percentile is the width of the column; a line under 0.7 of it stopped early.
    early = 0.7 * lengths[int(0.9 * (len(lengths) - 1))] if lengths else 0
    cuts, offset = [], 0
    for line, following in pairwise(lines):
        offset += len(line) + 1
        begins_anew = re.match(r"\s*(?:[-•*–·|]|[\"“«(¿¡]*[A-ZÁÉÍÓÚÑ0-9]|$)", following)
        if (
            not line.strip()
            or (begins_anew and len(line.rstrip()) < early)
            or following.lstrip().startswith(("•", "- "))
        ):
            cuts.append(offset - 1)
    return cuts
