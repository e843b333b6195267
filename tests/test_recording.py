"""Recorded answers: written row by row, taken up where a run was stopped, and what the embedded model's rows say."""

import json
import re

import pytest
import stand_in_model

from helpers import recording, settings
from helpers.evaluation import contains_answer, load_questions, share
from helpers.llms import check_weights
from helpers.recording import record, recorded
from helpers.retrieval import Index, Retriever

TEXTS = [
    "The goat of Corvejón is called Almirante. The keeper Anselmo Grieve feeds it at dawn.",
    "El faro de Cabo Lirón mide 21 metros. Lo pintaron de blanco en 1902.",
]
ASKED = ("Who feeds the goat of Corvejón?", "¿Cuánto mide el faro de Cabo Lirón?", "What is the goat called?")


@pytest.fixture(scope="module")
def retriever(embedder):
    files = [{"file": f"{n}.txt", "page": n + 1} for n in range(2)]
    return Retriever(Index.from_texts(TEXTS, files, embedder))


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "id": str(n),
            "language": "en",
            "question": asked,
            "answers": ["x"],
            "file": "0.txt",
            "page": 1,
            "kind": "fact",
        }
        for n, asked in enumerate(ASKED)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_record_says_with_what_it_was_made_and_holds_a_row_a_question(retriever, questions, tmp_path):
    done = []
    path = record("quotes", retriever, tmp_path, questions, progress=lambda n, of: done.append((n, of)))
    assert path == tmp_path / "answers_quotes.jsonl" and done == [(1, 3), (2, 3), (3, 3)]
    head, rows = recorded(tmp_path)["quotes"]
    assert head["command"] == "python -m helpers record --llm quotes" and len(head["date"]) == 10
    assert {"digest", "machine", "versions"} <= head.keys() and [row["id"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["cited"][0][1:] == ["0.txt", 1] and "Anselmo Grieve" in rows[0]["text"]
    assert rows[0]["refusal"] is None  # quotes have no probabilities
    assert list(tmp_path.glob("*.partial")) == []


def test_the_probability_of_a_refusal_is_recorded_where_it_can_be_seen(retriever, questions, tmp_path):
    folder = stand_in_model.make(tmp_path / "model", max_position_embeddings=1024)
    path = record(f"hf:{folder}", retriever, tmp_path, questions)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][1:]
    assert len(rows) == 3 and all(0 <= row["refusal"] < 1 for row in rows)


def test_a_run_that_was_stopped_goes_on_where_it_was(retriever, questions, tmp_path, monkeypatch):
    answer, answered = recording.answer, []

    def stopping(question, *rest):
        answered.append(question)
        if len(answered) == 2:
            raise KeyboardInterrupt
        return answer(question, *rest)

    monkeypatch.setattr(recording, "answer", stopping)
    with pytest.raises(KeyboardInterrupt):
        record("quotes", retriever, tmp_path, questions)
    partial = tmp_path / "answers_quotes.partial"
    assert len(partial.read_text(encoding="utf-8").splitlines()) == 2 and recorded(tmp_path) == {}
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"id": "1", "te')  # as a kill leaves it
    record("quotes", retriever, tmp_path, questions)
    assert answered == [ASKED[0], ASKED[1], ASKED[1], ASKED[2]]
    assert [row["id"] for row in recorded(tmp_path)["quotes"][1]] == ["0", "1", "2"]


def test_what_was_begun_with_another_model_is_begun_anew(retriever, questions, tmp_path):
    partial = tmp_path / "answers_quotes.partial"
    partial.write_text('{"model": "quotes", "digest": "other"}\n{"id": "0", "text": "old"}\n', encoding="utf-8")
    record("quotes", retriever, tmp_path, questions)
    assert "old" not in [row["text"] for row in recorded(tmp_path)["quotes"][1]]


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "answers_broken.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"answers_broken\.jsonl is no record of answers: delete it"):
        recorded(tmp_path)


TINY = settings.RESULTS / "answers_tiny.jsonl"
needs_record = pytest.mark.skipif(not TINY.exists(), reason="the embedded model's answers are not recorded")


@needs_record
def test_the_record_of_the_embedded_model_is_of_these_weights_and_all_test_questions():
    head, rows = recorded()["tiny"]
    again = "run `python -m helpers record --llm tiny`"
    assert head["digest"] == check_weights(settings.TINY_GPT_OSS), f"recorded with other weights: {again}"
    asked = [question.id for question in load_questions(split="test").questions]
    assert [row["id"] for row in rows] == asked, f"recorded with other questions: {again}"
    assert all(0 <= row["refusal"] <= 1 for row in rows)


def shares_of_the_record():
    """Return the shares right, cited among the right, and refused among the unanswerable, of the embedded model."""
    answers, asked = {row["id"]: row for row in recorded()["tiny"][1]}, load_questions(split="test").questions
    plain = {name: re.sub(r"\[\d+\]", "", row["text"]) for name, row in answers.items()}
    answerable = [question for question in asked if question.answerable]
    right = [
        question
        for question in answerable
        if not answers[question.id]["refused"]
        and contains_answer(plain[question.id], question.answers, question.language)
    ]
    cited = share(
        [question.file, question.page] in [place[1:] for place in answers[question.id]["cited"]] for question in right
    )
    refused = share(answers[question.id]["refused"] for question in asked if not question.answerable)
    return {"right": len(right) / len(answerable), "cited": cited.value, "refused": refused.value}


@needs_record
@pytest.mark.parametrize(
    ("what", "goal"),
    [
        pytest.param("right", 0.70, marks=pytest.mark.xfail(reason="the first weights read real documents badly")),
        pytest.param("cited", 0.9),
        pytest.param("refused", 0.75, marks=pytest.mark.xfail(reason="the first weights read real documents badly")),
    ],
)
def test_the_embedded_model_reaches_its_goal_on_the_test_questions(what, goal):
    assert shares_of_the_record()[what] >= goal
