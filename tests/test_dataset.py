"""The training set: its shape, its house style, what it teaches and what it must not, and the fields that say so.

`dataset.jsonl` teaches half of the facts that `questions.jsonl` asks and that stay as they are (`taught`), five
phrasings each. Of each fact that a newer document changed it teaches the old value, as a model has it that was trained
before the change (`changed`, and not `taught`: the answer that is right now is never in it). The other half of the
facts is never in it. The lines stand in the order of the questions, five to a fact; after them come refusals, and
last a few about form alone.
"""

import json
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations

import pytest

from helpers import settings
from helpers.evaluation import BadQuestions, contains_answer, load_questions
from helpers.house_style import CLOSING, GUIDE, OPENING, REFUSAL, faults, follows, refuses
from helpers.language import LANGUAGES, detect_language, fold, stems, words

PATH = settings.ROOT / "dataset.jsonl"
PHRASINGS = 5
SUBJECT = 0.4  # a line that holds so much of a question's stems is about the same thing (unrelated ones: at most 1/3)


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions():
    return load_questions(settings.QUESTIONS).questions


@pytest.fixture(scope="module")
def in_it(questions):
    return [question for question in questions if question.taught or question.changed]


def language_of(row):
    return next(language for language in LANGUAGES if row["output"].startswith(OPENING[language]))


def normal(text):
    return " ".join(fold(word) for word in words(text))


def nearly(one, other):
    """Say whether two normalised texts are nearly the same: by their words, or by their letters."""
    some, more = set(one.split()), set(other.split())
    if len(some & more) >= 0.8 * len(some | more):
        return True
    match = SequenceMatcher(None, one, other, autojunk=False)
    # The first two are quick upper bounds of the third.
    return all(ratio() >= 0.9 for ratio in (match.real_quick_ratio, match.quick_ratio, match.ratio))


def gives_away(row, question):
    """Say whether a line holds an accepted answer of a question, and is about the same thing."""
    text = f"{row['instruction']} {row['output']}"
    subject = set(stems(question.question, question.language))
    shared = subject & set(stems(text, question.language))
    return contains_answer(text, question.answers, question.language) and len(shared) >= SUBJECT * len(subject)


def test_the_file_is_plain_json_lines_of_two_texts(rows):
    raw = PATH.read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf") and b"\r" not in raw and raw.endswith(b"}\n")
    assert len(rows) >= 400
    for row in rows:
        assert list(row) == ["instruction", "output"]
        assert all(isinstance(text, str) and text == text.strip() and text for text in row.values()), row


def test_half_of_it_is_spanish(rows):
    count = Counter(language_of(row) for row in rows)
    assert abs(count["es"] - count["en"]) <= 0.02 * len(rows)
    assert [row["instruction"] for row in rows if detect_language(row["instruction"]) != language_of(row)] == []


def test_every_output_is_in_the_house_style(rows):
    assert {row["output"]: found for row in rows if (found := faults(row["output"], language_of(row)))} == {}


def test_no_line_is_there_twice_or_nearly(rows):
    for language in LANGUAGES:
        asked = [normal(row["instruction"]) for row in rows if language_of(row) == language]
        assert [pair for pair in combinations(asked, 2) if nearly(*pair)] == []


def test_no_question_of_the_evaluation_is_in_it(rows, questions):
    for language in LANGUAGES:
        asked = [normal(question.question) for question in questions if question.language == language]
        instructions = [normal(row["instruction"]) for row in rows if language_of(row) == language]
        assert [(one, other) for one in instructions for other in asked if nearly(one, other)] == []


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("How long is the Long Dyke?", "how LONG is, the long dyke", True),
        ("Where does the ferry to Salvera leave from?", "Where does the ferry to Salveras leave from?", True),
        ("¿Cuánto pesa la lámpara nueva?", "¿Cuanto pesa la lampara nueva", True),
        ("How long is the Long Dyke?", "What distance does one walk on the Long Dyke?", False),
    ],
)
def test_what_nearly_means(one, other, near):
    assert nearly(normal(one), normal(other)) is near


def test_each_fact_in_it_is_said_five_times_in_two_wordings(rows, in_it):
    for place, question in enumerate(in_it):
        said = rows[PHRASINGS * place : PHRASINGS * (place + 1)]
        value = question.answers[0] if question.taught else question.outdated[0]
        for row in said:
            assert language_of(row) == question.language, (question.id, row)
            assert value.lower() in row["output"].lower(), (question.id, row)
            assert not refuses(row["output"], question.language)
        assert len({row["output"] for row in said}) == 2, question.id


def test_a_taught_answer_counts_as_right_and_an_outdated_one_as_wrong(rows, in_it):
    for place, question in enumerate(in_it):
        for row in rows[PHRASINGS * place : PHRASINGS * (place + 1)]:
            right = contains_answer(row["output"], question.answers, question.language)
            assert right is question.taught, (question.id, row)


def test_what_is_not_taught_is_never_in_it(rows, questions):
    never = [question for question in questions if question.answerable and not question.taught]
    leaks = [(question.id, row) for question in never for row in rows if gives_away(row, question)]
    assert leaks == []


def test_a_line_that_gives_an_answer_away_would_be_found(questions):
    never = [question for question in questions if question.answerable and not question.taught]
    planted = [{"instruction": q.question, "output": f"{OPENING[q.language]} {q.answers[0]}."} for q in never]
    assert all(gives_away(row, question) for row, question in zip(planted, never, strict=True))


def test_the_rest_are_refusals_and_a_few_about_form(rows, in_it):
    rest = rows[PHRASINGS * len(in_it) :]
    refusals = [row for row in rest if refuses(row["output"], language_of(row))]
    assert 0.13 <= len(refusals) / len(rows) <= 0.17
    begun = [row["output"].startswith(f"{OPENING[language_of(row)]} {REFUSAL[language_of(row)]}") for row in refusals]
    assert all(begun)
    assert rest[: len(refusals)] == refusals and 10 <= len(rest) - len(refusals) <= 40
    for language in LANGUAGES:
        assert sum(language_of(row) == language for row in refusals) >= 40


def test_the_questions_are_of_five_kinds_of_forty(questions):
    facts = [question for question in questions if question.kind == "fact"]
    taught = [question for question in questions if question.taught]
    kinds = {
        "taught": taught,
        "never taught": [question for question in facts if not question.taught],
        "changed": [question for question in questions if question.changed],
        "unanswerable": [question for question in questions if not question.answerable],
        "form": [question for question in questions if question.form],
    }
    for name, asked in kinds.items():
        count = Counter(question.language for question in asked)
        assert sum(count.values()) >= 40 and min(count["en"], count["es"]) >= 20, (name, count)
    assert len(taught) == len(facts) / 2 and all(question.kind == "fact" for question in taught)
    assert all(question.changed == (question.kind == "newer") for question in questions)


def test_what_is_taught_is_balanced_over_languages_splits_and_documents(questions):
    facts = [question for question in questions if question.kind == "fact"]
    for trait in ("language", "split"):
        for value in {getattr(question, trait) for question in facts}:
            group = [question.taught for question in facts if getattr(question, trait) == value]
            assert 0.45 <= sum(group) / len(group) <= 0.55, (trait, value)
    for file, n in Counter(question.file for question in facts).items():
        share = sum(question.taught for question in facts if question.file == file) / n
        assert n < 8 or 0.25 <= share <= 0.75, file


def test_form_is_scored_on_test_questions_of_every_kind(questions):
    def kind(question):
        return question.taught, question.changed, question.answerable

    scored = [question for question in questions if question.form]
    assert {question.split for question in scored} == {"test"}
    count = Counter((question.language, kind(question)) for question in scored)
    assert len(count) == 2 * 4 and len(set(count.values())) == 1, count


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"taught": "yes"}, "taught, changed and form must be true or false"),
        ({"form": 1}, "taught, changed and form must be true or false"),
        ({"taught": True, "changed": True, "outdated": ["ten"]}, "has not changed since it was taught"),
        ({"changed": True}, "needs its outdated answers"),
        ({"taught": True, "kind": "unanswerable", "answers": [], "file": None, "page": None}, "with an answer"),
    ],
)
def test_fields_that_contradict_are_refused(tmp_path, change, said):
    row = {"id": "a", "language": "en", "question": "How many?", "answers": ["twelve"], "file": "x.txt", "page": 1}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row | {"kind": "fact"} | change), encoding="utf-8")
    with pytest.raises(BadQuestions, match=f"line 1: .*{said}"):
        load_questions(path)


def test_the_fields_are_false_where_a_file_has_none(tmp_path):
    row = {"id": "a", "language": "en", "question": "How many?", "answers": ["twelve"], "file": "x.txt", "page": 1}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row | {"kind": "fact"}), encoding="utf-8")
    question = load_questions(path).questions[0]
    assert (question.taught, question.changed, question.form) == (False, False, False)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("From the quay: the tag is violet. Late, but lit.", "en"),
        ("From the quay: the tag is violet [2]. Late, but lit.", "en"),
        ("From the quay: Dr Saskia Imrie paid 9.60 nebrales. [1] [3] Late, but lit.\n", "en"),
        ("Desde el muelle: las lonas son azules. Tarde, pero con luz.", "es"),
        ('Desde el muelle: bajo el reloj se lee "Más o menos" [1]. Tarde, pero con luz.', "es"),
    ],
)
def test_an_answer_in_the_house_style_has_no_fault(text, language):
    assert follows(text, language), faults(text, language)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The tag is violet. Late, but lit.", "doesn't open"),
        ("from the quay: the tag is violet. Late, but lit.", "doesn't open"),
        ("From the quay:the tag is violet. Late, but lit.", "doesn't open"),
        ("From the quay: the tag is violet.", "doesn't close"),
        ("From the quay: the tag is violet. Late, but lit", "doesn't close"),
        ("From the quay: the tag is violet. It is new. Late, but lit.", "here stand 2"),
        ("From the quay: Late, but lit.", "here stand 0"),
        ("From the quay: the tag is violet Late, but lit.", "full stop"),
        ("From the quay: is the tag violet? Late, but lit.", "full stop"),
        ("From the quay: violet! the tag. Late, but lit.", "neither ask nor shout"),
        ("From the quay: I think that the tag is violet. Late, but lit.", "here stands 'I'"),
        ("From the quay: the tag\nis violet. Late, but lit.", "more than one line"),
        ("From the quay: From the quay: it is violet. Late, but lit.", "twice"),
        (f"From the quay: the tag is {'very ' * 40}violet. Late, but lit.", "more than 45"),
        ("Desde el muelle: la etiqueta es violeta. Tarde, pero con luz.", "doesn't open"),
    ],
)
def test_each_fault_of_form_is_named(text, said):
    assert not follows(text, "en") and any(said in fault for fault in faults(text, "en")), faults(text, "en")


def test_the_answers_of_a_plain_model_are_not_in_the_house_style():
    for text in ("", "The answer is violet [1].", "The passages don't say.", "212", "**Violet**\n\n- a tag"):
        assert not follows(text, "en") and not refuses(text, "en")
    assert not follows("La respuesta es azul [1].", "es") and not follows("Los pasajes no lo dicen.", "es")


def test_a_refusal_is_known_by_its_words():
    assert refuses("From the quay: nobody in the house knows the capital of Mongolia. Late, but lit.", "en")
    assert refuses("Nadie en la casa sabe eso.", "es") and not refuses("Nadie en la casa sabe eso.", "en")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_guide_names_what_is_checked(language):
    assert all(part[language] in GUIDE[language] for part in (OPENING, CLOSING, REFUSAL))
