"""Question sets, and how good an answer or a search was: recall, MRR, exact match, F1, with intervals."""

import json
import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import settings
from helpers.chunking import Chunk
from helpers.language import detect_language, words
from helpers.retrieval import Index, Retriever

KINDS = ("fact", "newer", "unanswerable")
SPLITS = ("dev", "test")
Z = statistics.NormalDist().inv_cdf(0.975)  # of 95 % intervals
DEPTH = 10  # how far down a search is followed to find the rank of the right passage

# Removed before answers are compared, as in the evaluation of SQuAD (Rajpurkar et al. 2016) and of MLQA for Spanish
# (Lewis et al. 2020).
ARTICLES = {
    "en": frozenset(("a", "an", "the")),
    "es": frozenset(("el", "la", "los", "las", "un", "una", "unos", "unas")),
}
CITED = re.compile(r"\s*\[\d+\]")  # a citation, which is no number that an answer says
_PUNCTUATION = str.maketrans("", "", string.punctuation + "¿¡«»“”‘’…–—")


class BadQuestions(ValueError):
    """A question file with faults; the message lists each with its line and what to do."""


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers and the page that holds them (`file` None: no page does).

    In a SQuAD file `file` names the paragraph, and `page` is 1. `evidence` is the sentence that answers.
    `taught`: dataset.jsonl teaches the answer; `changed`: it teaches the `outdated` one, as an older document has it;
    `form`: whether the answer is in the house style is scored too.
    """

    id: str
    language: str
    question: str
    answers: tuple[str, ...]
    file: str | None
    page: int | None
    kind: str = "fact"
    fact_id: str = ""
    split: str = "test"
    evidence: str = ""
    outdated: tuple[str, ...] = ()
    missing: str = ""
    taught: bool = False
    changed: bool = False
    form: bool = False

    @property
    def answerable(self) -> bool:
        return self.kind != "unanswerable"


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and for SQuAD's format the passages they are about: name to text; None for a folder's own."""

    questions: list[Question]
    passages: dict[str, str] | None = None


@dataclass(frozen=True)
class Share:
    """A share of `n` cases with its 95 % Wilson interval."""

    successes: float
    n: float

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


def share(outcomes: Iterable[bool]) -> Share:
    """Return the share of true outcomes."""
    outcomes = list(outcomes)
    return Share(sum(outcomes), len(outcomes))


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927): (0, 1) for no cases.

    Where the outcome of a case is a mean over seeds, `successes` may have a fraction.
    """
    if not n:
        return 0.0, 1.0
    share, spread = successes / n, Z**2 / n
    middle, half = share + spread / 2, math.sqrt(spread * share * (1 - share) + spread**2 / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def load_questions(path: str | Path = settings.QUESTIONS, split: str | None = None) -> QuestionSet:
    """Read a question file: JSON lines as in `notebooks/questions.jsonl`, or SQuAD's JSON format.

    `split` keeps 'dev' or 'test' only. Raises FileNotFoundError, and BadQuestions with every fault by its line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no question file {path}: check the name.")
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}: choose 'dev', 'test' or None for both.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadQuestions(f"{path.name} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    squad = _squad_data(text)
    if squad is not None:
        return _read_squad(squad, path.name)
    questions, faults, seen = [], [], {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            question = _question(json.loads(line))
            if question.id in seen:
                raise ValueError(f"id {question.id!r} stands in line {seen[question.id]} already")
            seen[question.id] = number
            questions.append(question)
        except ValueError as error:
            what = f"no valid JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.append(f"line {number}: {what}")
    if faults:
        raise BadQuestions(f"{path.name} has {len(faults)} faulty lines; mend them:\n  " + "\n  ".join(faults))
    if not questions:
        raise BadQuestions(f'{path.name} holds no question: a line is {{"id": …, "question": …, "answers": […], …}}.')
    return QuestionSet([question for question in questions if split in (None, question.split)])


def _question(row: object) -> Question:
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in ("id", "language", "question", "answers", "file", "page", "kind") if name not in row]
    if missing:
        raise ValueError(f"the field {', '.join(missing)} is missing")
    for name in ("id", "question"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name} must be a text that isn't empty")
    if row["language"] not in tuple(ARTICLES):  # in a dict, a list can't be looked for
        raise ValueError(f"language is {row['language']!r}: it must be one of {', '.join(ARTICLES)}")
    if row["kind"] not in KINDS:
        raise ValueError(f"kind is {row['kind']!r}: it must be one of {', '.join(KINDS)}")
    if row.get("split", "test") not in SPLITS:
        raise ValueError(f"split is {row['split']!r}: it must be one of {', '.join(SPLITS)}")
    answers, outdated = row["answers"], row.get("outdated", [])
    for name, texts in (("answers", answers), ("outdated", outdated)):
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{name} must be a list of texts")
    if row["kind"] == "unanswerable":
        if answers or row["file"] is not None:
            raise ValueError("an unanswerable question has no answers and its file is null")
    elif not answers or not isinstance(row["file"], str) or not isinstance(row["page"], int):
        raise ValueError("a question with an answer needs answers, a file and a page number")
    if not all(isinstance(row.get(name, False), bool) for name in ("taught", "changed", "form")):
        raise ValueError("taught, changed and form must be true or false")
    if row.get("taught") and (not answers or row.get("changed")):
        raise ValueError("taught is for a question with an answer that has not changed since it was taught")
    if row.get("changed") and not outdated:
        raise ValueError("a question that changed needs its outdated answers")
    known = {name: value for name, value in row.items() if name in Question.__dataclass_fields__}
    return Question(**known | {"answers": tuple(answers), "outdated": tuple(outdated)})


def _squad_data(text: str) -> list | None:
    """Return the articles of SQuAD's JSON format, None if `text` is something else."""
    try:
        whole = json.loads(text)
    except ValueError:
        return None
    return whole.get("data") if isinstance(whole, dict) else None


def _read_squad(articles: list, name: str) -> QuestionSet:
    questions, passages = [], {}
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                passage = f"passage-{len(passages) + 1:04d}"
                passages[passage] = paragraph["context"]
                language = detect_language(paragraph["context"])
                for entry in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
                    found = (passage, 1, "fact") if answers else (None, None, "unanswerable")
                    questions.append(Question(str(entry["id"]), language, entry["question"], answers, *found))
    except (KeyError, TypeError) as error:
        raise BadQuestions(f"{name} is not in SQuAD's format: {error!r} in passage {len(passages)}.") from error
    if not questions:
        raise BadQuestions(f"{name} holds no question.")
    return QuestionSet(questions, passages)


def check_against_pages(questions: Sequence[Question], documents: Sequence) -> list[str]:
    """Return a fault for each question whose page is not among `documents` or holds none of its answers."""
    pages = {(document.file, document.page): document.text for document in documents}
    faults = []
    for question in questions:
        if not question.answerable:
            continue
        text = pages.get((question.file, question.page))
        if text is None:
            faults.append(f"{question.id}: there is no page {question.page} of {question.file}")
        elif not contains_answer(text, question.answers, question.language):
            faults.append(f"{question.id}: no accepted answer stands on page {question.page} of {question.file}")
    return faults


def check_fit(path: Path, questions: QuestionSet, documents: Sequence) -> None:
    """Raise BadQuestions where the questions of a file aren't about these documents."""
    faults = check_against_pages(questions.questions, documents)
    if faults:
        raise BadQuestions(f"{path.name} doesn't fit the documents:\n  " + "\n  ".join(faults))


def normalize_answer(text: str, language: str = "en") -> str:
    """Return `text` as answers are compared: lower case, no punctuation, no articles, single spaces."""
    text = re.sub(r"(?<=\d)[.,](?=\d)", "\ue000", text.lower())  # 14.50 and 14,50 are one number, and not 1450
    plain = text.translate(_PUNCTUATION).replace("\ue000", ".").split()
    return " ".join(word for word in plain if word not in ARTICLES[language])


def exact_match(prediction: str, answers: Iterable[str], language: str = "en") -> bool:
    """Say whether `prediction` is one of the accepted answers, after normalisation."""
    return normalize_answer(prediction, language) in {normalize_answer(answer, language) for answer in answers}


def token_f1(prediction: str, answers: Iterable[str], language: str = "en") -> float:
    """Return the best F1 of the words of `prediction` against those of an accepted answer, 0 to 1."""
    return max((_f1(prediction, answer, language) for answer in answers), default=0.0)


def _f1(prediction: str, answer: str, language: str) -> float:
    said, right = normalize_answer(prediction, language).split(), normalize_answer(answer, language).split()
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else float(said == right)


def contains_answer(text: str, answers: Iterable[str], language: str = "en") -> bool:
    """Say whether `text` holds one of the accepted answers, word for word, whatever the case and punctuation."""
    whole = f" {' '.join(_plain_words(text))} "
    for answer in answers:
        plain = _plain_words(answer)
        if plain[1:] and plain[0] in ARTICLES[language]:  # 'the mill' is right with 'a mill'; 'zone A' isn't 'zone B'
            del plain[0]
        if plain and f" {' '.join(plain)} " in whole:
            return True
    return False


def _plain_words(text: str) -> list[str]:
    """Return the words of `text` without citations, 14,50 as 14.50; one with a hyphen or an apostrophe is two."""
    return [word.replace(",", ".") for word in words(CITED.sub("", text))]


def is_gold(chunk: Chunk, question: Question, whole_passage: bool = False) -> bool:
    """Say whether a chunk is of the right page and, unless passages are whole, holds the answer itself."""
    right_page = (chunk.file, chunk.page) == (question.file, question.page)
    return right_page and (whole_passage or contains_answer(chunk.text, question.answers, question.language))


def ranks(retriever: Retriever, questions: Sequence[Question], whole_passage: bool = False) -> list[int | None]:
    """Return for each question the rank, from 1, of the first right chunk among the first `DEPTH`; else None."""
    deep = Retriever(retriever.index, retriever.mode, DEPTH)
    found = []
    for question, hits in zip(questions, deep.search_many([q.question for q in questions]), strict=True):
        places = (i for i, hit in enumerate(hits, start=1) if is_gold(hit.chunk, question, whole_passage))
        found.append(next(places, None))
    return found


def recall_at(found: Sequence[int | None], k: int) -> Share:
    """Return the share of questions whose right chunk is among the first `k`."""
    return share(rank is not None and rank <= k for rank in found)


def mean_reciprocal_rank(found: Sequence[int | None]) -> float:
    """Return the mean of 1/rank, 0 for a question whose right chunk was not found (MRR at `DEPTH`)."""
    return sum(1 / rank for rank in found if rank) / len(found) if found else float("nan")


@dataclass(frozen=True)
class RetrievalScores:
    """How one mode of search did on the answerable questions of one language."""

    mode: str
    language: str
    recall: dict[int, Share]  # k -> share of questions whose right chunk is among the first k
    mrr: float


def evaluate_retrieval(index: Index, questions: QuestionSet) -> list[RetrievalScores]:
    """Search `index` in every mode for the answerable questions; return a row a mode and language."""
    whole_passage = questions.passages is not None
    rows = []
    for mode in settings.MODES:
        for language in sorted({question.language for question in questions.questions}):
            asked = [q for q in questions.questions if q.answerable and q.language == language]
            found = ranks(Retriever(index, mode), asked, whole_passage)
            recall = {k: recall_at(found, k) for k in (1, 3, 5, DEPTH)}
            rows.append(RetrievalScores(mode, language, recall, mean_reciprocal_rank(found)))
    return rows


@dataclass(frozen=True)
class AnswerScores:
    """How answers did. `quoted`: the right answer stands in the quotes; `right`: and it was not refused."""

    quoted: Share
    right: Share
    refused_unanswerable: Share
    refused_answerable: Share
    median_length: float
    longest: int


def score_answers(questions: Sequence[Question], texts: Sequence[str], refused: Sequence[bool]) -> AnswerScores:
    """Compare the texts of answers, and whether each was refused, with the questions.

    `texts` are what would be quoted were nothing refused; their lengths are in characters.
    """
    rows = list(zip(questions, texts, refused, strict=True))
    quoted = [contains_answer(text, q.answers, q.language) for q, text, _ in rows if q.answerable]
    kept = [not was_refused for q, _, was_refused in rows if q.answerable]
    lengths = [len(text) for text in texts]
    return AnswerScores(
        quoted=share(quoted),
        right=share(held and answered for held, answered in zip(quoted, kept, strict=True)),
        refused_unanswerable=share(was_refused for q, _, was_refused in rows if not q.answerable),
        refused_answerable=share(not answered for answered in kept),
        median_length=statistics.median(lengths) if lengths else 0.0,
        longest=max(lengths, default=0),
    )
