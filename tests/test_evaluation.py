"""Question files and measures: what is read, what is refused line by line, and numbers checked by hand."""

import json

import pytest
from scipy.stats import binomtest

from helpers.chunking import Document
from helpers.evaluation import (
    BadQuestions,
    check_against_pages,
    contains_answer,
    evaluate_retrieval,
    exact_match,
    load_questions,
    mean_reciprocal_rank,
    normalize_answer,
    recall_at,
    score_answers,
    share,
    token_f1,
    wilson,
)
from helpers.retrieval import Index

GOOD = {
    "id": "a",
    "language": "en",
    "question": "How many?",
    "answers": ["twelve"],
    "file": "x.txt",
    "page": 1,
    "kind": "fact",
}


def lines(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_question_file_is_read(tmp_path):
    path = lines(tmp_path, GOOD, "", GOOD | {"id": "b", "split": "dev"})
    assert [question.id for question in load_questions(path).questions] == ["a", "b"]
    assert [question.id for question in load_questions(path, "dev").questions] == ["b"]
    assert load_questions(path).questions[0].answers == ("twelve",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "guess"}, "kind is 'guess'"),
        ({"language": "fr"}, "language is 'fr'"),
        ({"answers": []}, "needs answers"),
        ({"answers": "twelve"}, "answers must be a list"),
        ({"question": " "}, "question must be a text"),
        ({"page": None}, "needs answers, a file and a page"),
        ({"split": "train"}, "split is 'train'"),
        ({"kind": "unanswerable"}, "an unanswerable question has no answers"),
    ],
)
def test_a_wrong_field_is_refused_with_its_line(tmp_path, change, said):
    with pytest.raises(BadQuestions, match="line 2: ") as error:
        load_questions(lines(tmp_path, GOOD, GOOD | {"id": "b"} | change))
    assert said in str(error.value)


def test_all_faults_are_listed_at_once(tmp_path):
    without = {name: value for name, value in GOOD.items() if name != "file"}
    with pytest.raises(BadQuestions) as error:
        load_questions(lines(tmp_path, GOOD, "{", without, GOOD, "[1]"))
    said = str(error.value)
    for part in ("4 faulty lines", "line 2: no valid JSON", "line 3: the field file is missing", "stands in line 1"):
        assert part in said
    assert "line 5: it is no JSON object" in said


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no question file"):
        load_questions(tmp_path / "nothing.jsonl")
    with pytest.raises(BadQuestions, match="holds no question"):
        load_questions(lines(tmp_path, ""))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes("¿Cuánto?".encode("latin-1"))
    with pytest.raises(BadQuestions, match="not UTF-8"):
        load_questions(latin)


def squad(tmp_path, text="El faro tiene 14 metros de alto y es blanco."):
    answers = [{"text": "14 metros", "answer_start": 14}]
    entry = {"id": "q1", "question": "¿Qué altura tiene el faro?", "answers": answers}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": text, "qas": [entry]}]}]}), encoding="utf-8")
    return path


def test_squad_keeps_each_paragraph_whole(tmp_path):
    text = "El faro tiene 14 metros de alto y es blanco. " * 60
    found = load_questions(squad(tmp_path, text))
    assert found.passages == {"passage-0001": text}
    assert (found.questions[0].file, found.questions[0].language) == ("passage-0001", "es")


def test_a_broken_squad_file_is_refused(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"qas": []}]}]}))
    with pytest.raises(BadQuestions, match="not in SQuAD's format"):
        load_questions(path)


def test_retrieval_is_measured(tmp_path, embedder):
    questions = load_questions(squad(tmp_path))
    index = Index.from_texts(
        ["El gato duerme.", *questions.passages.values()], [{"file": "z"}, {"file": "passage-0001"}], embedder
    )
    rows = evaluate_retrieval(index, questions)
    assert [(row.mode, row.language) for row in rows] == [("hybrid", "es"), ("dense", "es"), ("bm25", "es")]
    assert all(row.recall[1].value == 1.0 and row.mrr == 1.0 for row in rows)


def test_answers_are_checked_against_their_pages(tmp_path):
    rows = [GOOD, GOOD | {"id": "b", "page": 2}, GOOD | {"id": "c", "answers": ["thirteen"]}]
    questions = load_questions(lines(tmp_path, *rows)).questions
    faults = check_against_pages(questions, [Document("There are twelve.", "x.txt", 1, "", "0")])
    assert faults == ["b: there is no page 2 of x.txt", "c: no accepted answer stands on page 1 of x.txt"]


@pytest.mark.parametrize(
    ("text", "language", "normal"),
    [
        ("The  Lamp, at last!", "en", "lamp at last"),
        ("«El faro» y las boyas", "es", "faro y boyas"),
        ("¿La sirena?", "es", "sirena"),
        ("14,50 nebrales", "es", "14.50 nebrales"),
        ("1,200", "en", "1.200"),
        ("the", "es", "the"),
    ],
)
def test_answers_are_normalised(text, language, normal):
    assert normalize_answer(text, language) == normal


def test_exact_match_and_f1_by_hand():
    assert exact_match("The Garza Gris.", ["garza gris"], "en")
    assert not exact_match("Garza", ["garza gris"], "en")
    # 2 of 3 words said are right, 2 of 2 right words are said: F1 = 2 * (2/3 * 1) / (2/3 + 1) = 0.8
    assert token_f1("old Garza Gris", ["Garza Gris"], "en") == pytest.approx(0.8)
    assert token_f1("nothing", ["Garza Gris", "nothing at all"], "en") == pytest.approx(0.5)
    assert token_f1("x", ["y"], "en") == 0.0 and token_f1("x", [], "en") == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("It weighs 120 kilos.", "12", False),
        ("It weighs 12 kilos.", "12", True),
        ("The keeper's goat", "keeper", True),
        ("a six-time winner", "six", True),
        ("It costs 14,50 nebrales", "14,50 nebrales", True),
        ("anything", "the", False),
    ],
)
def test_an_answer_is_held_word_for_word(text, answer, held):
    assert contains_answer(text, [answer], "en") is held


def test_wilson_against_published_numbers():
    # Newcombe (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    for successes, n in ((0, 40), (1, 40), (39, 40), (40, 40), (250, 500)):
        theirs = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_recall_and_mrr_by_hand():
    found = [1, 3, None, 2]
    assert recall_at(found, 1).value == 0.25 and recall_at(found, 3).value == 0.75
    assert mean_reciprocal_rank(found) == pytest.approx((1 + 1 / 3 + 0 + 1 / 2) / 4)
    assert str(share([True, False])).startswith("0.500 [0.0")


def test_answers_are_scored_by_hand(tmp_path):
    unanswerable = GOOD | {"kind": "unanswerable", "answers": [], "file": None, "page": None}
    rows = [GOOD, GOOD | {"id": "b"}, GOOD | {"id": "c"}, unanswerable | {"id": "d"}, unanswerable | {"id": "e"}]
    questions = load_questions(lines(tmp_path, *rows)).questions
    texts = ["twelve goats", "twelve", "none", "", "what"]
    scores = score_answers(questions, texts, [False, True, False, True, False])
    assert (scores.quoted.successes, scores.quoted.n) == (2, 3)
    assert (scores.right.successes, scores.right.n) == (1, 3)
    assert (scores.refused_unanswerable.successes, scores.refused_unanswerable.n) == (1, 2)
    assert (scores.refused_answerable.successes, scores.refused_answerable.n) == (1, 3)
    assert (scores.median_length, scores.longest) == (4, 12)


def test_an_article_is_left_out_only_before_an_answer():
    assert not contains_answer("It is vitamin B", ["vitamin A"]) and contains_answer("vitamin A", ["vitamin A"])
    assert contains_answer("It lies in a mill.", ["the mill"]) and contains_answer("Pier A", ["A"])
    assert contains_answer("en la caseta del muelle", ["una caseta del muelle"], "es")


def test_a_number_is_the_same_with_a_point_and_a_comma():
    assert contains_answer("Cuesta 14,50 €.", ["14.50"], "es") and not contains_answer("1450", ["14.50"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outdated": "21 euros"}, "outdated must be a list of texts"),
        ({"outdated": None}, "outdated must be a list of texts"),
        ({"language": ["en"]}, r"language is \['en'\]"),
    ],
)
def test_a_field_of_another_kind_is_said_with_its_line(tmp_path, change, said):
    path, row = tmp_path / "questions.jsonl", {"id": "1", "language": "en", "question": "Who?", "answers": ["Ana"]}
    path.write_text(json.dumps(row | {"file": "a.txt", "page": 1, "kind": "fact"} | change), encoding="utf-8")
    with pytest.raises(BadQuestions, match=rf"line 1: {said}"):
        load_questions(path)
