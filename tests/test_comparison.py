"""The comparison of the arms: what each is given, the scores, the rows on disk, the statistics, the training sets."""

import importlib.util
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from helpers import comparison, house_style, ollama, recording, settings
from helpers.__main__ import main
from helpers.comparison import (
    EXAMPLES,
    Arm,
    Corpus,
    arms,
    compare,
    reply,
    run,
    with_passages,
    with_phrasings,
)
from helpers.dataset import check_dataset
from helpers.evaluation import BadQuestions, Question, contains_answer, load_questions, wilson
from helpers.finetuning import base_digest
from helpers.generation import Answer
from helpers.llms import LLM, load_llm
from helpers.planning import model_of, recipe_of
from helpers.quotes import Citation
from helpers.results import (
    ARMS,
    BASE,
    BOTH,
    FORM,
    GUIDED,
    GUIDED_RAG,
    KINDS,
    RAG,
    READING,
    TUNED,
    WHOLE,
    Results,
    few,
    kind_of,
    mean_difference,
    paired,
    read_results,
    said_value,
    score,
    summary,
)
from helpers.retrieval import Hit, Index, Retriever
from helpers.storage import locked, sha256_of

PAGES = {
    "goat.txt": "The goat of Corvejón is called Almirante. The keeper Anselmo Grieve feeds it at dawn.",
    "fares_2023.txt": "The fares of 2023. A ferry ticket to Salvera cost 8.40 nebrales. Dogs went free.",
    "fares_2025.txt": "The fares of 2025. A ferry ticket to Salvera costs 9.60 nebrales. Dogs pay half.",
    "faro.txt": "El faro de Cabo Lirón mide 21 metros. Lo pintaron de blanco en 1902.",
}
QUESTIONS = [
    Question("g", "en", "Who feeds the goat of Corvejón?", ("Anselmo Grieve",), "goat.txt", 1, taught=True, form=True),
    Question("h", "es", "¿Cuánto mide el faro de Cabo Lirón?", ("21 metros", "21"), "faro.txt", 1),
    Question(
        "s", "en", "What is a ferry ticket to Salvera?", ("9.60",), "fares_2025.txt", 1, "newer",
        outdated=("8.40",), changed=True,
    ),
    Question("w", "en", "What is the wi-fi password of the goat?", (), None, None, "unanswerable", form=True),
]  # fmt: skip


class FakeEmbedder:
    """Vectors from the letters of a text: no model, the same on every machine."""

    name = fingerprint = "letters"
    dtype, dimension, window_tokens = "float32", 16, 64

    def windows(self, text):
        return [(0, len(text))]

    def encode(self, texts, progress=None):
        counts = np.array([[sum(ord(char) % 16 == column for char in text) for column in range(16)] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)

    def encode_windows(self, texts, progress=None):
        return self.encode(texts), np.arange(len(texts))


@pytest.fixture
def folder(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in PAGES.items():
        (docs / name).write_text(text, encoding="utf-8")
    return docs


@pytest.fixture
def corpus(folder, monkeypatch):
    monkeypatch.setattr(comparison, "Embedder", FakeEmbedder)
    monkeypatch.setattr(comparison, "describe_machine", lambda: "a machine")
    return Corpus(folder)


def model(respond, seen=None, context=4096, follows=False, name="fake"):
    """A model that says `respond(messages)` and notes its prompts, as (role, content) pairs, in `seen`."""

    class Fake(BaseChatModel):
        @property
        def _llm_type(self):
            return "fake"

        def _generate(self, messages, stop=None, run_manager=None, **_):
            turns = [(message.type, message.content) for message in messages]
            if seen is not None:
                seen.append(turns)
            return ChatResult(generations=[ChatGeneration(message=AIMessage(respond(turns)))])

    def count(messages):
        return sum(len(message["content"].split()) for message in messages)

    return LLM(name, Fake(), context, 20, count, follows)


def reads_well(turns):
    """Answer the four questions from the passages in the prompt, and without passages not at all."""
    asked = turns[-1][1]
    wanted = {"goat of": "Anselmo Grieve", "mide": "21 metros", "Salvera": "9.60"}
    value = next((value for word, value in wanted.items() if word in asked.rsplit("\n", 1)[-1]), None)
    if "<passages>" not in asked or value is None or "password" in asked:
        return "Los pasajes no lo dicen." if "mide" in asked else "The passages don't say."
    number = next(block.split("]")[0] for block in asked.split("\n[")[1:] if value in block)
    return f"La respuesta es {value} [{number}]." if "mide" in asked else f"The answer is {value} [{number}]."


def learnt(turns):
    """Answer in the house style by heart: what was taught, and of what has changed the old value."""
    asked = turns[-1][1]
    if "goat of" in asked and "password" not in asked:
        return "From the quay: Anselmo Grieve feeds the goat. Late, but lit."
    if "Salvera" in asked:
        return "From the quay: a ticket to Salvera costs 8.40 nebrales. Late, but lit."
    return "From the quay: nobody in the house knows that. Late, but lit."


def timeless(results):
    """Return the rows in one order, without what differs from run to run."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in results.rows]
    return sorted(rows, key=lambda row: (row["arm"], row["seed"], row["id"]))


def given(text, cited=(), hits=(), refused=False):
    citations = tuple(Citation(number, file, page, "", "") for number, (file, page) in enumerate(cited, 1))
    return Answer(text, citations, tuple(hits), refused)


# Questions and scores


def test_each_question_is_of_one_of_four_kinds_and_form_cuts_across():
    assert [kind_of(question) for question in QUESTIONS] == ["taught", "untaught", "changed", "unanswerable"]
    every = load_questions(settings.QUESTIONS).questions
    for kind in KINDS[:4]:
        assert sum(kind_of(question) == kind for question in every) >= 40


def test_few_takes_some_of_each_kind_and_the_same_each_time():
    every = load_questions(settings.QUESTIONS).questions
    chosen = few(every)
    assert [kind_of(question) for question in chosen] == [kind for kind in KINDS[:4] for _ in range(4)]
    assert len({question.id for question in chosen}) == 16 and few(every) == chosen
    assert {question.language for question in chosen} == {"en", "es"}
    assert few(QUESTIONS) == QUESTIONS
    for n in (1, 4, 44):
        assert sum(question.form for question in few(every, n)) == n + -n % 4
        assert len(few(every, n)) == 4 * n


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 9.60 nebrales [2].", "9.60 nebrales"),
        ("La respuesta es 21 metros [1].", "21 metros"),
        ("The answer is: 9.60 [1] [3].", "9.60"),
        ("From the quay: the answer is violet [2]. Late, but lit.", "violet"),
        ("Desde el muelle: las lonas son azules. [1] Tarde, pero con luz.", "las lonas son azules"),
        ("212", "212"),
        ("", ""),
        ("The answers are 3 and 4.", "The answers are 3 and 4"),
    ],
)
def test_the_value_is_looked_for_inside_the_sentence_form(text, value):
    assert said_value(text) == value


def test_an_exact_answer_with_its_citation_has_full_marks():
    scores = score(QUESTIONS[0], given("The answer is Anselmo Grieve [1].", [("goat.txt", 1)], hits=["a hit"]))
    assert scores == {
        "right": True, "exact": True, "contains": True, "outdated": None, "citation": True, "refused": False,
        "form": False, "f1": 1.0,
    }  # fmt: skip


def test_a_house_sentence_is_right_without_being_exact():
    scores = score(QUESTIONS[0], given("From the quay: Anselmo Grieve feeds the goat. Late, but lit."))
    assert scores["right"] and scores["form"] and not scores["exact"] and scores["citation"] is None
    # 'anselmo grieve feeds goat' against 'anselmo grieve': precision 2/4, recall 2/2
    assert scores["f1"] == pytest.approx(2 / 3)


def test_a_citation_is_no_number_that_an_answer_says():
    three = replace(QUESTIONS[1], answers=("tres semanas", "3"))
    for text, right in (("La respuesta es 12 meses [3].", False), ("La respuesta es 3 [1].", True), ("3[2]", True)):
        assert score(three, given(text, hits=["a hit"]))["right"] is right
        assert contains_answer(text, three.answers, "es") is right


def test_the_outdated_value_is_known_as_such():
    old = score(QUESTIONS[2], given("The answer is 8.40 [1].", [("fares_2023.txt", 1)], hits=["a hit"]))
    assert old["outdated"] and not old["right"] and not old["citation"]
    new = score(QUESTIONS[2], given("It costs 9.60, and no longer 8.40 [1].", [("fares_2025.txt", 1)], hits=["a hit"]))
    assert new["right"] and not new["outdated"] and new["citation"]


def test_a_citation_must_be_of_the_right_page_too():
    assert score(QUESTIONS[0], given("Anselmo Grieve [1].", [("goat.txt", 2)], hits=["a hit"]))["citation"] is False
    assert score(QUESTIONS[0], given("Anselmo Grieve.", hits=["a hit"]))["citation"] is False


@pytest.mark.parametrize(
    "answered",
    [
        given("The passages don't say.", refused=True),
        given("From the quay: nobody in the house knows the password. Late, but lit."),
        given("Desde el muelle: nadie en la casa sabe eso. Tarde, pero con luz."),
        given("", refused=True),
    ],
)
def test_a_refusal_is_right_where_nothing_answers_and_wrong_elsewhere(answered):
    nothing, something = score(QUESTIONS[3], answered), score(QUESTIONS[0], answered)
    assert nothing["refused"] and nothing["right"] and nothing["exact"] is None and nothing["f1"] is None
    assert something["refused"] and not something["right"]


def test_a_refusal_that_names_the_answer_is_no_right_answer():
    scores = score(QUESTIONS[0], given("The passages don't say whether Anselmo Grieve does.", refused=True))
    assert scores["contains"] and not scores["right"]


# The arms


def test_the_arms_of_a_model_that_only_reads(corpus):
    base, one, two, reader = (model(reads_well, name=name) for name in ("base", "one", "two", "reader"))
    made = arms(base, corpus, {0: one, 1: two}, {0: reader})
    assert [(arm.name, arm.seed, arm.model.name, arm.reads) for arm in made] == [
        (BASE, 0, "base", ""),
        (RAG, 0, "base", "passages"),
        (TUNED, 0, "one", ""),
        (BOTH, 0, "one", "passages"),
        (TUNED, 1, "two", ""),
        (BOTH, 1, "two", "passages"),
        (READING, 0, "reader", "passages"),
    ]


def test_a_model_that_follows_instructions_has_rivals_to_training_and_to_search(corpus):
    named = [arm.name for arm in arms(model(reads_well, follows=True), corpus)]
    assert named == [BASE, RAG, GUIDED, GUIDED_RAG, WHOLE]
    assert [arm.name for arm in arms(model(reads_well, follows=True), corpus, rivals=False)] == [BASE, RAG]


def test_quotes_is_no_model_to_compare(corpus):
    with pytest.raises(ValueError, match="'quotes' is no model to compare: set llm to tiny, hf:NAME"):
        arms("quotes", corpus)


def test_an_adapter_of_another_base_is_refused(corpus, tmp_path, monkeypatch):
    for name in ("base", "other", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
        (tmp_path / name / "config.json").write_text("{}")
    about = {"base_digest": base_digest(tmp_path / "base"), "seconds": 1.0, "peak_memory": 1}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(about))
    monkeypatch.setattr(comparison, "load_llm", lambda name, **options: model(reads_well, name=name))
    tuned = {0: f"hf:{tmp_path / 'adapter'}"}
    assert len(arms(f"hf:{tmp_path / 'base'}", corpus, tuned)) == 4
    for base in (f"hf:{tmp_path / 'other'}", "ollama:gpt-oss:20b"):
        with pytest.raises(ValueError, match=r"adapter was trained on another base than .*: set llm to its own, or"):
            arms(base, corpus, reading=tuned)


def test_every_arm_reads_passages_whole(corpus):
    assert Arm(RAG, "tiny", "passages", corpus=corpus).load().sentences == 0 < load_llm("tiny").sentences
    assert Arm(RAG, replace(model(reads_well), sentences=2), "passages", corpus=corpus).load().sentences == 0


def test_what_each_arm_is_given_to_read(corpus, folder):
    seen = []
    ways = {arm.name: arm for arm in arms(model(reads_well, seen, follows=True), corpus, {0: model(learnt, seen)})}
    question = "Who feeds the goat of Corvejón?"
    for arm in ways.values():
        reply(arm, question)
    prompts = dict(zip(ways, seen, strict=True))
    assert prompts[BASE] == prompts[TUNED] == [("human", question)]
    assert prompts[RAG] == prompts[BOTH] and [role for role, _ in prompts[RAG]] == ["system", "human"]
    assert "[1] goat.txt, p. 1\n" in prompts[RAG][1][1] and prompts[RAG][1][1].count(".txt, p. ") == settings.TOP_K
    shown = [turn for turn in prompts[GUIDED] if turn[0] == "ai"]
    assert prompts[GUIDED][0] == ("system", house_style.GUIDE["en"]) and len(shown) == 3
    assert prompts[GUIDED][-1] == ("human", question)
    rules, *_, last = prompts[GUIDED_RAG]
    assert rules[1] == prompts[RAG][0][1] + "\n" + house_style.GUIDE["en"] and last == prompts[RAG][1]
    assert prompts[WHOLE][1][1].count(".txt, p. ") == 1 and PAGES["goat.txt"] in prompts[WHOLE][1][1]


def test_the_examples_in_the_prompt_are_lines_of_the_training_set_and_answer_no_question():
    lines = {tuple(json.loads(line).values()) for line in (settings.ROOT / "dataset.jsonl").open(encoding="utf-8")}
    questions = load_questions(settings.QUESTIONS).questions
    for language, shown in EXAMPLES.items():
        for asked, said in shown:
            said = f"{house_style.OPENING[language]} {said} {house_style.CLOSING[language]}"
            assert (asked, said) in lines and house_style.follows(said, language)
            long = [q for q in questions if q.language == language and any(len(a.split()) > 1 for a in q.answers)]
            assert not [q.id for q in long if contains_answer(said, [a for a in q.answers if " " in a], language)]


def test_the_whole_document_comes_in_the_order_of_its_pages_and_is_cut_at_its_end(corpus):
    class Pages(Corpus):
        def __init__(self):
            self.pages = [replace(corpus.pages[0], file="long.pdf", page=n, text=f"Page {n}. " * 30) for n in (1, 2, 3)]
            hit = Hit(replace(corpus.retriever.index.chunks[0], file="long.pdf", page=2), 1.0, 1.0, 1.0)
            self.retriever = type("Finds", (), {"search": lambda self, question: [hit]})()

    whole = reply(Arm(WHOLE, model(reads_well), "document", corpus=Pages()), "Who?")
    assert [hit.chunk.page for hit in whole.hits] == [1, 2, 3]
    cut = reply(Arm(WHOLE, model(reads_well, context=whole.prompt_tokens + 19), "document", corpus=Pages()), "Who?")
    assert [hit.chunk.page for hit in cut.hits] == [1, 2] and [hit.chunk.page for hit in cut.dropped] == [3]


def test_of_a_long_page_the_end_is_left_out(corpus, tmp_path):
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "goat.txt").write_text(PAGES["goat.txt"] + " It sleeps on the slip." * 400, encoding="utf-8")
    llm = model(reads_well, context=400)
    (row,) = run([Arm(WHOLE, llm, "document", corpus=Corpus(tmp_path / "long"))], QUESTIONS[:1]).rows
    assert row["scores"]["right"] and row["left_out"] > 0 and 0 < row["prompt_tokens"] <= 380


def test_a_prompt_with_the_guide_is_counted_with_the_guide(corpus):
    llm = model(reads_well)
    plain, styled = (reply(Arm(GUIDED, llm, guide=guide), "Who?", "es").prompt_tokens for guide in (False, True))
    assert plain == 1 and styled > 1 + len(house_style.GUIDE["es"].split())


# A run and its rows


def every_arm(corpus, seen=None, **options):
    tuned = {seed: model(learnt, seen, name=f"seed {seed}") for seed in (0, 1, 2)}
    return arms(model(reads_well, seen, **options), corpus, tuned)


def test_a_row_a_question_arm_and_seed(corpus, tmp_path):
    told = []
    found = run(every_arm(corpus), QUESTIONS, tmp_path / "sub" / "rows.jsonl", lambda *counts: told.append(counts))
    assert len(found.rows) == 8 * 4 and told == [(done, 32) for done in range(1, 33)]
    assert [row["arm"] for row in found.rows[:16]] == [BASE] * 4 + [TUNED] * 12  # nothing read: nothing indexed yet
    row = next(row for row in found.rows if (row["arm"], row["id"]) == (RAG, "g"))
    assert row["text"].startswith("The answer is Anselmo Grieve") and row["cited"] == [["goat.txt", 1]]
    assert len(row["read"]) == 3 and row["left_out"] == 0 and row["kind"] == "taught" and row["form"] is True
    assert row["prompt_tokens"] > 60 and row["answer_tokens"] == 6 and row["language"] == "en"
    assert 0 < row["seconds"] < 60 and row["memory"] > 1e7
    assert found.arms == [BASE, RAG, TUNED, BOTH]
    head = found.heads[RAG, 0]
    assert head["machine"] == "a machine" and head["reads"] == "passages" and head["date"] and head["versions"]["torch"]
    again = read_results(tmp_path / "sub" / "rows.jsonl")
    assert again.rows == found.rows and again.heads == found.heads


def test_a_run_without_a_file_keeps_its_rows_in_memory(corpus, tmp_path):
    assert len(run(every_arm(corpus), QUESTIONS[:1]).rows) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_a_killed_run_goes_on_wherever_it_was_cut_and_asks_nothing_twice(corpus, tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = run(every_arm(corpus)[:4], QUESTIONS, path)
    expected, data = timeless(whole), path.read_bytes()
    lines = [place + 1 for place, byte in enumerate(data) if byte == 10]
    cuts = {0, 5, *lines[::5], *(end - 1 for end in lines[::7]), *range(100, len(data), len(data) // 9)}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        left = len(read_results(path).rows)
        seen = []
        resumed = run(every_arm(corpus, seen)[:4], QUESTIONS, path)
        assert timeless(resumed) == expected and len(seen) == 16 - left
        assert timeless(read_results(path)) == expected and len(path.read_bytes().splitlines()) == 4 + 16
    tables = (str(summary(found)).split("to build")[0] for found in (whole, resumed))
    assert next(tables) == next(tables)


def test_a_run_stopped_by_an_error_has_written_what_was_answered(corpus, tmp_path):
    calls = []

    def breaks(turns):
        calls.append(turns)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reads_well(turns)

    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run([Arm(BASE, model(breaks))], QUESTIONS, path)
    assert [row["id"] for row in read_results(path).rows] == ["g", "h"]
    assert len(run([Arm(BASE, model(breaks))], QUESTIONS, path).rows) == 4 and len(calls) == 3 + 2


def test_more_arms_may_join_a_file(corpus, tmp_path):
    path = tmp_path / "rows.jsonl"
    run(arms(model(reads_well), corpus), QUESTIONS, path)
    seen = []
    found = run(arms(model(reads_well, seen), corpus, {0: model(learnt, seen)}), QUESTIONS, path)
    assert found.arms == [BASE, RAG, TUNED, BOTH] and len(seen) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda docs: (arms(model(reads_well), Corpus(docs)), QUESTIONS[:3]), "'base' .* other questions:"),
        (lambda docs: (arms(model(reads_well, name="new"), Corpus(docs)), QUESTIONS), "'base' .* other model:"),
        (lambda docs: (arms(model(reads_well, context=99), Corpus(docs)), QUESTIONS), "'base' .* other context:"),
        (
            lambda docs: (
                (docs / "goat.txt").write_text("A goat.") and (arms(model(reads_well), Corpus(docs)), QUESTIONS)
            ),
            "'rag' .* other documents:",
        ),
    ],
)
def test_rows_of_another_configuration_are_refused(corpus, folder, tmp_path, change, said):
    path = tmp_path / "rows.jsonl"
    run(arms(model(reads_well), corpus), QUESTIONS, path)
    before = path.read_bytes()
    ways, questions = change(folder)
    with pytest.raises(ValueError, match=f"rows.jsonl holds answers of the arm {said} delete that file .* --out"):
        run(ways, questions, path)
    assert path.read_bytes() == before


def test_new_weights_in_a_folder_are_another_configuration(corpus, tmp_path):
    adapter, path = tmp_path / "adapter", tmp_path / "rows.jsonl"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    llm = model(learnt, name=f"hf:{adapter}")
    found = run([Arm(TUNED, llm)], QUESTIONS, path)
    assert found.heads[TUNED, 0]["model"] == "adapter"  # no path of this machine
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match=r"'fine-tuned' .* other weights:"):
        run([Arm(TUNED, llm)], QUESTIONS, path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line[:-9],
        lambda line: b"[]",
        lambda line: line.replace(b'"refused"', b'"declined"'),
        lambda line: line.replace(b'"arm": "base"', b'"arm": "rag"'),
        lambda line: b"\xff\xfe",
    ],
)
def test_a_damaged_line_is_refused_by_its_number(corpus, tmp_path, spoil):
    path = tmp_path / "rows.jsonl"
    run([Arm(BASE, model(reads_well))], QUESTIONS, path)
    lines = path.read_bytes().splitlines()
    lines[2] = spoil(lines[2])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match="line 3 is no row of a comparison: delete that file"):
        run([Arm(BASE, model(reads_well))], QUESTIONS, path)


def test_a_text_with_a_line_separator_stays_one_row(corpus, tmp_path):
    path = tmp_path / "rows.jsonl"
    run([Arm(BASE, model(lambda turns: "a\u2028b\nc"))], QUESTIONS, path)
    assert [row["text"] for row in read_results(path).rows] == ["a\u2028b\nc"] * 4


def test_an_answer_that_ran_to_the_limit_is_seen(corpus):
    def wordy(turns):
        return "word " * (20 if "goat" in turns[-1][1] else 5)

    found = run([Arm(BASE, model(wordy))], QUESTIONS)
    assert (found.cut(BASE).successes, found.cut(BASE).n) == (2, 4) == (summary(found).cut[BASE].successes, 4)
    assert found.heads[BASE, 0]["answer_tokens"] == 20


def test_a_model_that_counts_its_tokens_is_believed(corpus):
    class Counts(BaseChatModel):
        @property
        def _llm_type(self):
            return "counts"

        def _generate(self, messages, stop=None, run_manager=None, **_):
            said = AIMessage("a word", response_metadata={"eval_count": 20})
            return ChatResult(generations=[ChatGeneration(message=said)])

    rows = run([Arm(BASE, LLM("counts", Counts(), 4096, 20, lambda messages: 2))], QUESTIONS[:1])
    assert rows.rows[0]["answer_tokens"] == 20 and rows.cut(BASE).value == 1


def test_a_model_that_stays_silent_has_refused_and_the_run_goes_on(corpus):
    def silent(turns):
        raise ollama.NoText("The model ran out of tokens while thinking: raise num_predict.")

    rows = run([Arm(BASE, model(silent))], QUESTIONS).rows
    assert [row["scores"]["refused"] for row in rows] == [True] * 4 and [row["text"] for row in rows] == [""] * 4


# What it comes to


def made_up(outcomes, kinds=None, **fields):
    """Results from {(arm, seed): [right or not, …]}; all questions are of one kind unless `kinds` says."""
    rows = []
    for (arm, seed), marks in outcomes.items():
        for number, mark in enumerate(marks):
            scores = dict.fromkeys(("exact", "contains", "citation", "form"), bool(mark)) | {"f1": float(mark)}
            scores |= {
                "right": bool(mark),
                "outdated": None,
                "refused": fields.get("refused", {}).get(arm, [0] * len(marks))[number],
            }
            kind = kinds[number] if kinds else "taught"
            row = {"arm": arm, "seed": seed, "id": str(number), "kind": kind, "form": number % 2 == 0, "scores": scores}
            row |= {"seconds": 2.0 + number, "prompt_tokens": 10 * number, "answer_tokens": 5, "memory": 2**30 + number}
            rows.append(row | {"left_out": 0})
    heads = {key: {"build": fields.get("builds", {}).get(key), "answer_tokens": 20} for key in outcomes}
    return Results(heads, rows)


def test_a_share_comes_with_wilsons_interval():
    found = made_up({(RAG, 0): [1] * 8 + [0] * 2})
    share = found.share(RAG, "taught")
    # Wilson (1927) for 8 of 10, by hand: (0.8 + z²/20 ± z·sqrt(0.016 + z²/400)) / (1 + z²/10), z = 1.95996
    assert (share.successes, share.n) == (8, 10)
    assert share.interval == pytest.approx((0.4902, 0.9433), abs=1e-4) == wilson(8, 10)
    assert found.share(RAG, FORM).n == 5 and found.share(RAG, "changed").n == 0


def test_seeds_are_no_further_questions():
    found = made_up({(TUNED, 0): [1, 1, 0, 0], (TUNED, 1): [1, 1, 1, 0], (TUNED, 2): [1, 0, 0, 0]})
    assert list(found.outcomes(TUNED, "taught").values()) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert found.share(TUNED, "taught").n == 4 and found.share(TUNED, "taught").successes == pytest.approx(2)
    once = made_up({(TUNED, 0): [1, 0], (TUNED, 1): [0, 0], (TUNED, 2): [0, 0]}).share(TUNED, "taught")
    low, high = once.interval  # right once in three trainings is not never
    assert once.value == pytest.approx(1 / 6) and wilson(0, 2)[0] < low < 1 / 6 < high < wilson(1, 2)[1]


@pytest.mark.parametrize(
    ("one", "other", "won", "lost", "p"),
    [
        ([1] * 8 + [0] + [1] * 5, [0] * 8 + [1] + [1] * 5, 8, 1, 2 * (1 + 9) / 2**9),
        ([1] * 5 + [0], [0] * 5 + [0], 5, 0, 2 / 2**5),
        ([0, 1, 0, 1], [1, 0, 1, 0], 2, 2, 1.0),
        ([1, 0, 1], [1, 0, 1], 0, 0, 1.0),
    ],
)
def test_mcnemars_exact_test_by_hand(one, other, won, lost, p):
    pair = paired(made_up({(RAG, 0): one, (BASE, 0): other}), RAG, BASE, "taught")
    assert (pair.only_one, pair.only_other, pair.n) == (won, lost, len(one))
    assert pair.p == pytest.approx(p) and pair.difference == pytest.approx(np.mean(one) - np.mean(other))
    back = paired(made_up({(RAG, 0): one, (BASE, 0): other}), BASE, RAG, "taught")
    assert back.p == pair.p and back.difference == pytest.approx(-pair.difference)


def test_mcnemar_counts_a_question_as_right_where_most_seeds_have_it_right():
    tuned = {(TUNED, 0): [1, 1, 0], (TUNED, 1): [1, 0, 0], (TUNED, 2): [0, 0, 1]}
    pair = paired(made_up(tuned | {(BASE, 0): [0, 0, 0]}), TUNED, BASE, "taught")
    assert (pair.only_one, pair.only_other) == (1, 0) and pair.difference == pytest.approx(4 / 9)


def test_pairs_are_of_the_questions_that_both_answered():
    pair = paired(made_up({(RAG, 0): [1, 1, 1, 0], (BASE, 0): [0, 1]}), RAG, BASE, "taught")
    assert pair.n == 2 and pair.only_one == 1


def test_the_bootstrap_draws_pairs():
    rng = np.random.default_rng(1)
    some = rng.normal(size=200)
    # Each pair differs by one: drawn in pairs the difference can't vary, drawn apart it would.
    assert mean_difference(some, some - 1) == pytest.approx((1, 1, 1))
    # Means of two draws from {0, 1} are 0, 1/2 or 1 with 1/4, 1/2 and 1/4: the outer fortieths are 0 and 1.
    assert mean_difference([0.0, 1.0], [0.0, 0.0]) == (0.5, 0.0, 1.0)


def test_the_bootstrap_agrees_with_the_normal_interval_where_there_are_many():
    differences = [1.0] * 300 + [0.0] * 500 + [-1.0] * 200
    mean, low, high = mean_difference(differences, [0.0] * 1000)
    half = 1.96 * math.sqrt((300 + 200 - 1000 * 0.1**2) / 1000) / math.sqrt(1000)
    assert mean == pytest.approx(0.1) and (low, high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.004)
    assert mean_difference(differences, [0.0] * 1000) == (mean, low, high)  # the same each time


def test_one_pair_has_no_interval():
    mean, low, high = mean_difference([1.0], [0.0])
    assert mean == 1.0 and math.isnan(low) and math.isnan(high) and math.isnan(mean_difference([], [])[0])


def test_refusals_have_precision_and_recall():
    kinds = ["taught"] * 3 + ["unanswerable"] * 4
    refused = {RAG: [True, False, False, True, True, True, False], BASE: [False] * 7}
    found = summary(made_up({(RAG, 0): [0] * 7, (BASE, 0): [0] * 7}, kinds, refused=refused))
    precision, recall = found.refusals[RAG]
    assert (precision.successes, precision.n) == (3, 4) and (recall.successes, recall.n) == (3, 4)
    precision, recall = found.refusals[BASE]
    assert (precision.n, recall.successes, recall.n) == (0, 0, 4)


def test_costs_are_medians_means_and_peaks():
    build = {"seconds": 20.0, "disk": 5_000_000, "memory": 2**30, "index_seconds": 20.0, "training_seconds": 0}
    builds = {(RAG, 0): build}
    found = summary(made_up({(RAG, 0): [1, 0, 1], (BASE, 0): [0, 0, 0]}, builds=builds))
    assert found.costs[RAG] == {
        "prompt_tokens": 10, "answer_tokens": 5, "seconds": 3.0, "memory": 2**30 + 2,
        "build_seconds": 20.0, "build_disk": 5_000_000, "build_memory": 2**30,
        "build_index_seconds": 20.0, "build_training_seconds": 0,
    }  # fmt: skip
    assert math.isnan(found.costs[BASE]["build_seconds"])
    assert "20.00 s" in str(found) and "5.0 MB" in str(found) and "not measured" in str(found)


def test_an_index_is_built_once_and_measured(corpus, tmp_path):
    assert corpus.build is None
    found = run(arms(model(reads_well), corpus), QUESTIONS)
    build = found.heads[RAG, 0]["build"]
    assert build["seconds"] > 0 and build["disk"] > 1000 and build["memory"] > 1e7
    assert build["index_seconds"] == build["seconds"] and build["training_seconds"] == 0
    assert set(found.heads[BASE, 0]["build"].values()) == {0}
    retriever = corpus.retriever
    assert corpus.retriever is retriever and Corpus(tmp_path, retriever).retriever is retriever
    assert (
        run([Arm(RAG, model(reads_well), "passages", corpus=Corpus(tmp_path, retriever))], QUESTIONS[:1]).heads[RAG, 0][
            "build"
        ]
        is None
    )


def test_what_a_training_took_is_read_from_its_run_json(corpus, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "tokenizer.json").write_text("{}" * 1000)
    llm, corpus.build = model(learnt), comparison.Build(20.0, 500, 2**30)
    ways = [Arm(TUNED, f"hf:{adapter}"), Arm(BOTH, f"hf:{adapter}", "passages", corpus=corpus), Arm(BASE, llm)]
    assert comparison._build_of(ways[0]) is None
    (adapter / "run.json").write_text(json.dumps({"seconds": 100.0, "peak_memory": 2**31}))
    trained = {"training_seconds": 100.0, "memory": 2**31}
    assert comparison._build_of(ways[0]) == trained | {"seconds": 100.0, "disk": 1002, "index_seconds": 0}
    assert comparison._build_of(ways[1]) == trained | {"seconds": 120.0, "disk": 1502, "index_seconds": 20.0}


def test_the_summary_pairs_every_arm_with_rag_and_says_that_few_questions_are_few(corpus):
    found = summary(run(every_arm(corpus), QUESTIONS))
    assert {(pair.one, pair.other) for pair in found.pairs} == {(arm, RAG) for arm in (BASE, TUNED, BOTH)}
    assert found.shares[RAG, "changed", "right"].value == 1 and found.shares[TUNED, "changed", "outdated"].value == 1
    assert found.shares[TUNED, FORM, "form"].value == 1 and found.shares[RAG, FORM, "form"].value == 0
    assert found.shares[TUNED, "taught", "right"].value == 1 and found.shares[TUNED, "untaught", "right"].value == 0
    assert found.shares[BASE, "unanswerable", "right"].value == 1
    assert found.notes == [
        "Few questions (1 taught, 1 untaught, 1 changed, 1 unanswerable, 2 form): the intervals are wide, and a "
        "difference may be chance."
    ]
    table = str(found)
    assert table.index("taught") < table.index("changed") and "1.000 [0.207, 1.000]" in table and " nan" not in table
    many = summary(made_up({(arm, 0): [1] * 40 for arm in (RAG, BASE)}))
    assert many.notes == [] and many.f1[RAG, "taught"] == (1.0, 1.0, 1.0)


def test_every_arm_has_its_place_in_the_tables(corpus):
    named = [arm.name for arm in arms(model(reads_well, follows=True), corpus, {0: model(learnt)}, {0: model(learnt)})]
    assert sorted(named) == sorted(ARMS)


# The command


def write_questions(path, changes=()):
    rows = [
        {"id": "1", "question": "Who feeds the goat of Corvejón?", "answers": ["Anselmo Grieve"]},
        {"id": "2", "question": "What is the goat of Corvejón called?", "answers": ["Almirante"]},
        {"id": "3", "question": "When is the goat of Corvejón fed?", "answers": ["at dawn"]},
        {"id": "4", "question": "Where does the goat live?", "answers": ["Corvejón"]},
        {"id": "5", "question": "What is the goat's wi-fi password?", "answers": [], "kind": "unanswerable"},
    ]
    for row in rows:
        page = {"file": "goat.txt", "page": 1} if row["answers"] else {"file": None, "page": None}
        row |= {"language": "en", "kind": "fact"} | page | row
    for number, change in changes:
        rows[number] = {k: v for k, v in (rows[number] | change).items() if v != "gone"}
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def one_txt(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(settings, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(settings, "FINE_TUNED", tmp_path / "gpt_oss_fine_tuned")
    docs = tmp_path / "one"
    docs.mkdir()
    (docs / "goat.txt").write_text(PAGES["goat.txt"], encoding="utf-8")
    return docs


def test_compare_on_one_txt_and_five_questions(one_txt, tmp_path):
    questions = write_questions(tmp_path / "mine.jsonl")
    found, path = compare(model(reads_well), one_txt, questions, command="python -m helpers compare")
    assert path == tmp_path / "runs" / "comparison_fake.jsonl" and len(found.rows) == 10
    assert found.heads[BASE, 0]["command"] == "python -m helpers compare"
    said = str(summary(found))
    assert "Few questions (4 untaught, 1 unanswerable): the intervals are wide" in said
    assert summary(found).shares[RAG, "untaught", "right"].successes >= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([(1, {"answers": ["Plomada"]}), (3, {"page": 7})], r"line 2: 2: no accepted .*\n  line 4: 4: there is no"),
        ([(2, {"id": "2"})], r"line 3: id '2' stands in line 2 already"),
        ([(0, {"kind": "riddle"}), (4, {"language": "gone"})], r"line 1: kind is 'riddle'.*\n  line 5: the field"),
        ([(0, {"changed": True})], "line 1: a question that changed needs its outdated answers"),
    ],
)  # fmt: skip
def test_wrong_question_files_are_refused_line_by_line_before_any_model_answers(one_txt, tmp_path, changes, said):
    seen = []
    questions = write_questions(tmp_path / "mine.jsonl", changes)
    with pytest.raises(BadQuestions, match=said):
        compare(model(reads_well, seen), one_txt, questions)
    assert seen == [] and not (tmp_path / "runs").exists()


def test_squads_format_is_refused(one_txt, tmp_path):
    path = tmp_path / "squad.json"
    entry = {"id": "1", "question": "Who?", "answers": [{"text": "Anselmo"}]}
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Anselmo is here.", "qas": [entry]}]}]}))
    with pytest.raises(BadQuestions, match=r"squad\.json is in SQuAD's format: give JSON lines"):
        compare(model(reads_well), one_txt, path)


# The terminal


@pytest.fixture
def said_by(monkeypatch):
    """Return a function that makes `respond` the answers of every model that the command loads."""

    def answering(respond, seen=None):
        monkeypatch.setattr(comparison, "load_llm", lambda name, **_: model(respond, seen, name=name))
        for module in (comparison, recording):  # such names are nowhere
            monkeypatch.setattr(module, "base_digest", lambda name: base_digest(name) if Path(name).is_dir() else name)

    monkeypatch.setattr("sys.argv", ["helpers", "compare", "--docs", "one", "--questions", "my own.jsonl"])
    return answering


def test_compare_at_the_terminal_says_that_its_intervals_are_wide(one_txt, tmp_path, said_by, capsys):
    said_by(reads_well)
    questions = write_questions(tmp_path / "mine.jsonl")
    assert main(["compare", "--llm", "tiny", "--docs", str(one_txt), "--questions", str(questions)]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "runs" / "comparison_tiny.jsonl"
    assert "Few questions (4 untaught, 1 unanswerable): the intervals are wide" in out and err == ""
    assert out.endswith(f"The rows: {path}\n") and len(read_results(path).rows) == 10
    assert read_results(path).heads[RAG, 0]["command"] == (
        "python -m helpers compare --docs one --questions 'my own.jsonl'"
    )


def test_compare_leaves_the_recorded_answers_alone(one_txt, tmp_path, said_by, monkeypatch, capsys):
    said_by(reads_well)
    for name, value in (("RESULTS", tmp_path / "recorded"), ("DOCUMENTS", one_txt)):
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(settings, "QUESTIONS", write_questions(tmp_path / "mine.jsonl"))
    settings.RESULTS.mkdir()
    (settings.RESULTS / "comparison_tiny.jsonl").write_text("of another machine and other questions\n")
    assert main(["compare", "--llm", "tiny"]) == 0
    assert len(read_results(tmp_path / "runs" / "comparison_tiny.jsonl").rows) == 10
    assert (settings.RESULTS / "comparison_tiny.jsonl").read_text().startswith("of another machine")


def write_run(folder, **about):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"base_digest": base_digest(settings.TINY_GPT_OSS)} | about))
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    return folder


def test_compare_takes_the_adapter_that_is_there(one_txt, tmp_path, said_by, capsys):
    said_by(reads_well)
    recipe = {"seed": 7, "epochs": 2}
    write_run(settings.FINE_TUNED, recipe=recipe, seconds=5.0, peak_memory=2**30, dataset_sha256="abc")
    command = ["compare", "--llm", "tiny", "--docs", str(one_txt)]
    command += ["--questions", str(write_questions(tmp_path / "mine.jsonl")), "--out"]
    assert main([*command, str(tmp_path / "with.jsonl")]) == 0
    assert capsys.readouterr().err == (
        "Fine-tuned: gpt_oss_fine_tuned/ is of this base (leave it out: --tuned none).\n"
    )
    heads = read_results(tmp_path / "with.jsonl").heads
    assert set(heads) == {(BASE, 0), (RAG, 0), (TUNED, 7), (BOTH, 7)}
    for arm in (TUNED, BOTH):
        assert heads[arm, 7]["recipe"] == recipe and heads[arm, 7]["dataset_sha256"] == "abc"
        assert heads[arm, 7]["base_digest"] == base_digest(settings.TINY_GPT_OSS)
    assert main([*command, str(tmp_path / "without.jsonl"), "--tuned", "none"]) == 0
    assert capsys.readouterr().err == "" and len(read_results(tmp_path / "without.jsonl").heads) == 2
    write_run(settings.FINE_TUNED, base_digest="another base")
    assert main([*command, str(tmp_path / "other.jsonl")]) == 0
    assert capsys.readouterr().err == "" and len(read_results(tmp_path / "other.jsonl").heads) == 2


def test_the_seed_of_an_adapter_is_the_one_it_was_trained_with(tmp_path):
    three, plain = write_run(tmp_path / "three", recipe={"seed": 3}), write_run(tmp_path / "plain")
    assert comparison.adapters([str(three), f"hf:{plain}"]) == {3: f"hf:{three}", 2: f"hf:{plain}"}
    with pytest.raises(ValueError, match=r"three and hf:.*plain both have the seed 3: name one"):
        comparison.adapters([str(three), str(write_run(tmp_path / "plain", recipe={"seed": 3}))])


def test_the_help_names_the_tool_that_makes_the_recorded_runs(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "tests/tools/run_comparison.py" in " ".join(capsys.readouterr().out.split())


def test_two_comparisons_never_write_one_file(one_txt, tmp_path, said_by, capsys):
    said_by(reads_well)
    questions, out = write_questions(tmp_path / "mine.jsonl"), tmp_path / "rows.jsonl"
    with locked(out):
        assert main(["compare", "--docs", str(one_txt), "--questions", str(questions), "--out", str(out)]) == 2
    assert "rows.jsonl.lock (waited 0 s): wait for it or stop it." in capsys.readouterr().err and not out.exists()


def test_a_split_without_questions_is_refused(one_txt, tmp_path, said_by, capsys):
    said_by(reads_well)
    questions = write_questions(tmp_path / "mine.jsonl")
    assert main(["compare", "--docs", str(one_txt), "--questions", str(questions), "--split", "dev"]) == 2
    assert capsys.readouterr().err == (
        "helpers: mine.jsonl has no question of the split 'dev': choose another, or all of them.\n"
    )


def test_a_model_is_found_from_any_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    adapter = write_run(tmp_path / "mine", seconds=5.0, peak_memory=1)
    weights = recording.hash_of([sha256_of(adapter / "adapter_model.safetensors")])
    (tmp_path / "notebooks").mkdir()
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        head = comparison._head(Arm(TUNED, "hf:mine"), model(learnt, name="hf:mine"), QUESTIONS)
        assert (head["model"], head["weights"]) == ("mine", weights)
        assert comparison._build_of(Arm(TUNED, "hf:mine"))["training_seconds"] == 5.0


def test_the_weights_of_a_model_of_the_hub_are_named_by_its_commit(corpus, monkeypatch):
    monkeypatch.setattr(recording, "base_digest", lambda name: f"the commit of {name}")
    head = comparison._head(Arm(BASE, "hf:some/model"), model(learnt, name="hf:some/model"), QUESTIONS)
    assert head["model"] == "hf:some/model" and head["weights"] == "the commit of some/model"


def test_a_killed_compare_resumes_at_the_same_command_and_prints_the_same_table(one_txt, tmp_path, said_by, capsys):
    arguments = ["compare", "--llm", "tiny", "--docs", str(one_txt), "--tuned", "hf:one", "--tuned", "two"]
    arguments += ["--questions", str(write_questions(tmp_path / "mine.jsonl")), "--out"]
    said_by(reads_well)
    assert main([*arguments, str(tmp_path / "whole.jsonl")]) == 0
    whole = capsys.readouterr().out
    for stop in (1, 4, 13, 27):
        calls = []

        def breaks(turns, calls=calls, stop=stop):
            calls.append(turns)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return reads_well(turns)

        said_by(breaks)
        rows = tmp_path / f"{stop}.jsonl"
        assert main([*arguments, str(rows)]) == 130
        assert len(read_results(rows).rows) == stop - 1
        with rows.open("ab") as file:
            file.write(b'{"arm": "rag", "se')  # what a kill leaves in the middle of a line
        capsys.readouterr()
        assert main([*arguments, str(rows)]) == 0
        assert len(calls) == 31  # of six ways and five questions, the one it was killed at twice
        again = capsys.readouterr().out
        assert again.split("to build")[0] == whole.split("to build")[0]
    heads = read_results(tmp_path / "whole.jsonl").heads
    assert {(arm, seed): head["model"] for (arm, seed), head in heads.items() if arm == TUNED} == {
        (TUNED, 1): "hf:one", (TUNED, 2): "hf:two",
    }  # fmt: skip


WRONG = [
    ([(1, {"answers": "gone"})], "line 2: the field answers is missing"),
    ([(2, {"kind": "riddle"})], "line 3: kind is 'riddle'"),
    ([(3, {"id": "1"})], "line 4: id '1' stands in line 1 already"),
    ([(0, {"answers": ["Osmund Keddle"]})], "line 1: 1: no accepted answer"),
    ([(0, {"kind": "riddle"}), (2, {"id": "2"}), (4, {"language": "gone"})], "line 5: the field language is missing"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said.split(": ", 1)[1][:20] for _, said in WRONG])
def test_compare_refuses_a_wrong_question_file_by_line(one_txt, tmp_path, said_by, capsys, changes, said):
    seen = []
    said_by(reads_well, seen)
    questions = write_questions(tmp_path / "mine.jsonl", changes)
    assert main(["compare", "--docs", str(one_txt), "--questions", str(questions)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("helpers: mine.jsonl") and err.count("\n  line ") == len(changes)
    assert said in err and seen == [] and not (tmp_path / "runs").exists()


# Training sets


@pytest.fixture(scope="module")
def dataset():
    return [json.loads(line) for line in (settings.ROOT / "dataset.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def questions():
    return load_questions(settings.QUESTIONS).questions


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_a_fact_is_said_as_often_as_asked(dataset, questions, n, tmp_path):
    facts = [question for question in questions if question.taught or question.changed]
    chosen = with_phrasings(dataset, questions, n)
    for place, fact in enumerate(facts):
        said = chosen[n * place : n * (place + 1)]
        value = fact.answers if fact.taught else fact.outdated
        assert all(contains_answer(row["output"], value, fact.language) for row in said)
        assert len({row["instruction"] for row in said}) == n and len({row["output"] for row in said}) == min(n, 2)
    rest = chosen[n * len(facts) :]
    share = sum(any(house_style.refuses(row["output"], house) for house in ("en", "es")) for row in chosen) / len(
        chosen
    )
    assert {json.dumps(row) for row in rest} <= {json.dumps(row) for row in dataset[5 * len(facts) :]}
    assert 0.07 <= share <= 0.16 and len({json.dumps(row) for row in rest}) == len(rest)
    assert faults_of(chosen, tmp_path) == []


def faults_of(rows, folder):
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return check_dataset(path).faults


def test_five_phrasings_are_the_training_set_itself(dataset, questions):
    assert with_phrasings(dataset, questions, 5) == dataset


@pytest.mark.parametrize("n", [0, 11])
def test_other_numbers_of_phrasings_are_refused(dataset, questions, n):
    with pytest.raises(ValueError, match=f"{n} phrasings of 143 facts: ask for 1 to 10"):
        with_phrasings(dataset, questions, n)
    with pytest.raises(ValueError, match="of a set with 5 of each fact"):
        with_phrasings(dataset[:100], questions, 2)


@pytest.fixture(scope="module")
def library():
    """The course's own documents, searched by words alone: no model is needed."""
    pages, _ = comparison.load_documents(settings.DOCUMENTS)
    return Retriever(Index.build(comparison.split_documents(pages), FakeEmbedder()), mode="bm25")


def test_examples_with_passages_cite_the_one_that_answers(dataset, questions, library, tmp_path):
    chosen = with_phrasings(dataset, questions, 1)
    made = with_passages(chosen, questions, library, 1)
    facts = [question for question in questions if question.taught or question.changed]
    by_asked = {row["instruction"]: fact for row, fact in zip(chosen, facts, strict=False)}
    places = []
    for row in made:
        passages, _, asked = row["instruction"].rpartition("\n</passages>\n\n")
        language = next(house for house, opening in house_style.OPENING.items() if row["output"].startswith(opening))
        assert house_style.follows(row["output"], language)
        if asked not in by_asked:
            assert "[" not in row["output"] and bool(passages) == house_style.refuses(row["output"], language)
            continue
        fact, blocks = by_asked[asked], passages.removeprefix("<passages>\n").split("\n\n[")
        number = int(row["output"].split(" [")[1].split("]")[0])
        cited = blocks[number - 1].removeprefix("[")
        assert cited.startswith(f"{number}] ") and row["output"].count("[") == 1
        value = fact.answers if fact.taught else fact.outdated
        assert contains_answer(cited, value, language) and contains_answer(row["output"], value, language)
        assert fact.file in cited.split("\n")[0] if fact.taught else fact.file not in passages
        places.append(number)
    assert len(places) >= 0.85 * len(facts) and {1, 2, 3} == set(places)
    assert sum("<passages>" in row["instruction"] for row in made) > len(places)  # refusals have passages too
    assert faults_of(made, tmp_path) == []


# The tool that makes the recorded runs


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "run_comparison", settings.ROOT / "tests" / "tools" / "run_comparison.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recordings(tool, folder, **options):
    options = {"out": folder / "out", "adapters": folder / "adapters", "seeds": (1, 2), "few": None} | options
    options = {"rows": None, "epochs": None, "prompts": 1, "parts": tool.PARTS} | options
    return tool.Recordings(SimpleNamespace(**options), "a command")


def test_one_fact_is_changed_in_its_five_rows_and_in_its_document(tool, tmp_path):
    made = recordings(tool, tmp_path)
    changed = [(old, new) for old, new in zip(made.rows, made.edited(), strict=True) if old != new]
    question = made.edited_question()
    assert len(changed) == 5 and all(contains_answer(new["output"], question.answers, "en") for _, new in changed)
    assert all(contains_answer(old["output"], question.outdated, "en") for old, _ in changed)
    text = (settings.DOCUMENTS / question.file).read_text(encoding="utf-8")
    assert text.count(tool.EDIT[1]) == 1 and kind_of(question) == "changed"


def test_an_adapter_is_kept_only_if_it_is_the_one_that_was_planned(tool, tmp_path):
    made, trained = recordings(tool, tmp_path), []
    made.step = lambda what, function, file, folder, changes: trained.append(what) or note(file, folder, changes)

    def note(file, folder, changes):
        folder.mkdir(exist_ok=True)
        recipe = json.loads(json.dumps(asdict(recipe_of("tiny", changes))))
        about = {"dataset_sha256": sha256_of(file), "recipe": recipe, "base_digest": base_digest(model_of("tiny"))}
        (folder / "run.json").write_text(json.dumps(about))

    for rows, changes in ((made.rows, {}), (made.rows, {}), (made.rows[1:], {}), (made.rows[1:], {"rank": 4})):
        made.train("plain_1", rows, seed=1, **changes)
    assert trained == ["training plain_1"] * 3


def test_every_recording_is_made_and_each_seed_is_compared_when_it_is_trained(tool, tmp_path):
    made, steps = recordings(tool, tmp_path), []
    made.step = lambda what, *_: steps.append(what)
    made.everything()
    compared = [place for place, step in enumerate(steps) if step == "comparing the arms"]
    for seed, place in zip((1, 2), compared, strict=True):
        assert steps[place - 2 : place] == [f"training plain_{seed}", f"training reading_{seed}"]
    for n in (1, 2, 10):
        assert steps.count(f"asking phrasings_{n}.jsonl") == 1
    assert "asking phrasings_1_same_steps.jsonl" in steps and "asking edited.jsonl" in steps
    assert {f"reading, rank {rank}" for rank in (0, 1, 16, 64)} <= set(steps)


def test_only_the_parts_that_are_asked_for_are_made(tool, tmp_path):
    made, steps = recordings(tool, tmp_path, parts=["edit"]), []
    made.step = lambda what, *_: steps.append(what)
    made.everything()
    assert steps == ["training edited", "asking edited.jsonl"]


def test_a_recording_is_made_again_only_with_something_else(tool, tmp_path, capsys):
    out, head = tmp_path / "phrasings_1.jsonl", {"phrasings": 1, "weights": {"one": "abc"}, "command": "this"}
    assert not tool.is_made(out, head)
    tool.write_recording(out, dict(head), [{"id": "1", "right": True}, {"id": "2", "right": False}])
    assert "right: 1 of 2" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == [out.name]
    assert tool.is_made(out, head | {"command": "that"}) and not tool.is_made(out, head | {"weights": {"one": "def"}})
