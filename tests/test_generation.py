"""Quotes and refusals."""

import pytest

from helpers.chunking import Chunk
from helpers.generation import (
    REFUSALS,
    answer,
    asked_kind,
    holds_kind,
    rank_sentences,
    shorten,
)
from helpers.retrieval import Hit, Index, Retriever

TEXTS = [
    "The goat of Corvejón is called Almirante. It was born in 2019. The keeper Anselmo Grieve feeds it at dawn.",
    "Ferry tickets cost 14.50 nebrales. They are sold on board by Wendeline Prask, who accepts no cheques.",
    "El faro de Cabo Lirón mide 21 metros. Lo pintaron de blanco en 1902. La linterna la fabricó Cosme Arrábide.",
]


@pytest.fixture(scope="module")
def retriever(embedder):
    files = [{"file": f"{n}.txt", "page": n + 1, "page_label": ["iv", "", "2"][n]} for n in range(3)]
    return Retriever(Index.from_texts(TEXTS, files, embedder))


@pytest.mark.parametrize(
    ("question", "sentence", "place"),
    [
        ("Who feeds the goat of Corvejón?", "The keeper Anselmo Grieve feeds it at dawn.", "0.txt, page iv"),
        ("How much do ferry tickets cost?", "Ferry tickets cost 14.50 nebrales.", "1.txt, page 2"),
        ("¿Cuánto mide el faro de Cabo Lirón?", "El faro de Cabo Lirón mide 21 metros.", "2.txt, página 2"),
        ("¿Quién fabricó la linterna del faro?", "La linterna la fabricó Cosme Arrábide.", "2.txt, página 2"),
    ],
)
def test_the_sentence_that_answers_is_quoted_with_its_place(retriever, question, sentence, place):
    given = answer(question, retriever)
    assert not given.refused
    assert sentence in [citation.quote for citation in given.citations]
    first = next(citation for citation in given.citations if citation.quote == sentence)
    assert first.place("es" if question.startswith("¿") else "en") == place
    assert f"{sentence} [{first.number}]" in given.text
    assert given.hits[first.number - 1].chunk.file == first.file


@pytest.mark.parametrize(
    ("question", "language"),
    [
        ("What is the boiling point of tungsten in a vacuum furnace?", "en"),
        ("¿Qué impuesto de sociedades pagan las empresas suizas?", "es"),
        ("What did Hipólita Strandberg say to the parliament?", "en"),
    ],
)
def test_what_the_documents_do_not_hold_is_refused_in_the_language_of_the_question(retriever, question, language):
    given = answer(question, retriever)
    assert given.refused and given.text == REFUSALS[language] and given.citations == ()
    assert len(given.hits) == 3


@pytest.mark.parametrize("question", ["", "  ", "\x00\x01", "???"])
def test_nothing_asked_is_refused(retriever, question):
    assert answer(question, retriever).refused


def test_a_very_long_question_is_answered_or_refused(retriever):
    given = answer("Who feeds the goat of Corvejón? " * 300, retriever)
    assert given.refused or given.citations


@pytest.mark.parametrize("mode", ["dense", "bm25"])
def test_every_mode_answers(retriever, mode):
    given = answer("Who feeds the goat of Corvejón?", Retriever(retriever.index, mode))
    assert not given.refused and given.citations[0].file == "0.txt"


def test_another_llm_is_refused_by_name(retriever):
    with pytest.raises(ValueError, match="llm is 'gpt'"):
        answer("Who?", retriever, llm="gpt")


def test_timings_are_seconds(retriever):
    timings = answer("Who feeds the goat?", retriever).timings
    assert set(timings) == {"retrieve", "answer"} and all(0 < seconds < 60 for seconds in timings.values())


def test_two_quotes_are_never_longer_than_600_characters(embedder):
    endless = "The goat " + "walks along the shore and looks at the sea and " * 40 + "eats the logbook of the keeper"
    index = Index.from_texts([endless + ".", endless.replace("goat", "goat and the dog") + "!"], None, embedder)
    given = answer("What does the goat eat of the keeper?", Retriever(index))
    assert not given.refused and len(given.text) <= 600
    assert "logbook" in given.text


def test_shorten_keeps_the_stretch_that_fits_the_question():
    text = "word " * 100 + "the goat eats the logbook " + "more " * 100
    short = shorten(text, "What does the goat eat?", 290)
    assert len(short) <= 290 and "goat eats" in short
    assert short.startswith("… ") and short.endswith(" …")
    assert shorten("short", "What?", 100) == "short"
    assert len(shorten("x" * 5000, "What?", 100)) <= 100


def hit(text, score=1.0):
    return Hit(Chunk(text, "f.txt", 1, 0, len(text), text[:16]), score, score, score)


def test_a_sentence_in_two_overlapping_chunks_counts_once():
    both = [hit("First thing. The goat sleeps at noon."), hit("The goat sleeps at noon. Last thing.", 0.5)]
    ranked = rank_sentences("When does the goat sleep?", both)
    assert [sentence.text for sentence in ranked].count("The goat sleeps at noon.") == 1
    assert ranked[0].text == "The goat sleeps at noon." and ranked[0].hit == 0


def test_a_heading_that_only_repeats_the_question_is_no_answer():
    ranked = rank_sentences("What is the Lumbrera lamp?", [hit("Lumbrera Lamp\n\nThe Lumbrera lamp burns oil.")])
    assert [sentence.text for sentence in ranked] == ["The Lumbrera lamp burns oil."]


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("When was it built?", "date"),
        ("¿En qué año se construyó?", "date"),
        ("How many goats are there?", "number"),
        ("¿Cuánto cuesta el billete?", "number"),
        ("Who keeps the light?", "name"),
        ("¿Dónde vive el farero?", "name"),
        ("Which island has the oldest lamp?", "name"),
        ("Why is the lamp red?", ""),
    ],
)
def test_what_is_asked_for(question, kind):
    assert asked_kind(question) == kind


def test_the_kind_must_be_new_in_the_sentence():
    assert holds_kind("number", "There are 12 goats.", "How many goats in 2019?")
    assert not holds_kind("number", "In 2019 there were goats.", "How many goats in 2019?")
    assert holds_kind("name", "They asked Anselmo.", "Who was asked?")
    assert not holds_kind("name", "They asked Anselmo.", "Who asked Anselmo?")
