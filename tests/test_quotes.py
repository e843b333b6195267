"""Quotes: which sentences, how long, and when none."""

import pytest

from helpers.chunking import Chunk
from helpers.generation import answer
from helpers.quotes import asked_kind, excerpts, holds_kind, rank_sentences, shorten
from helpers.retrieval import Hit, Index, Retriever


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


def test_excerpts_are_the_best_sentences_in_their_order_each_in_its_passage():
    hits = [
        hit("A goat eats grass. It was\nborn in May. The goat sleeps at noon in the shade."),
        hit("Ships come and go. Nothing else is known.", 0.4),
        hit("At noon the goat sleeps well. Tea is at four.", 0.5),
    ]
    question = "When does the goat sleep?"
    ranked = rank_sentences(question, hits)
    order = [(sentence.hit, sentence.text) for sentence in ranked]
    best = [(0, "The goat sleeps at noon in the shade."), (2, "At noon the goat sleeps well.")]
    assert sorted(order[:2]) == best
    assert [(cut.chunk, cut.excerpt) for cut in excerpts(hits, ranked, 2)] == [(hits[n].chunk, (t,)) for n, t in best]
    every = excerpts(hits, ranked, 100)
    assert every[0].excerpt == ("A goat eats grass.", "It was born in May.", "The goat sleeps at noon in the shade.")
    assert [cut.chunk.text for cut in every] == [one.chunk.text for one in hits]
    assert excerpts(hits, [], 6) == []


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
