"""Languages, words, stems and sentences."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import language, settings
from helpers.chunking import load_documents, split_documents
from helpers.language import detect_language, fold, sentences, stems, stop_words, words

SPANISH_FILES = {
    "acta_asamblea_2025.txt",
    "el_farolero_otono_2025.pdf",
    "guia_del_visitante.txt",
    "manual_lumbrera_9.pdf",
    "memoria_historica.pdf",
    "recetario_de_la_cantina.txt",
    "reglamento_personal_2021.pdf",
    "reglamento_personal_2025.pdf",
    "tarifas_amarre_2023.txt",
    "tarifas_amarre_2025.pdf",
}


@pytest.fixture(scope="module")
def documents():
    return load_documents()[0]


def cut(text):
    return [text[start:end] for start, end in sentences(text)]


# --- Words and stems -----------------------------------------------------------------------------------------------


def test_fold():
    assert fold("Señal ÚLTIMA Café Ü") == "senal ultima cafe u"
    assert fold("sen\u0303al") == fold("señal") == "senal"
    assert fold("") == ""


def test_words_are_lower_case_and_numbers_stay_whole():
    assert words("The Lamp, at 14.50 nebrales: 1,234 (08:30)!") == [
        *("the", "lamp", "at", "14.50", "nebrales", "1,234", "08:30")
    ]
    assert words("¿Qué señal?") == ["qué", "señal"]
    assert words("snake_case it's BX-1174") == ["snake", "case", "it", "s", "bx", "1174"]
    assert words("") == words("¡…! — ") == []


def test_stems_join_the_forms_of_a_word():
    assert stems("lighthouse lighthouses", "en") == ["lighthous"] * 2
    assert len(set(stems("run running runs", "en"))) == 1
    assert len(set(stems("farol faroles", "es"))) == 1
    assert len(set(stems("encendido encendida encendidas", "es"))) == 1


def test_stems_have_no_accents_so_that_a_question_without_them_matches():
    assert stems("La señal eléctrica del muelle", "es") == stems("la senal electrica del muelle", "es")
    assert stems("¿Cuándo abre?", "es") == stems("cuando abre", "es")


def test_stems_keep_order_and_drop_stop_words():
    assert stems("Which of the keepers climbed the tower?", "en") == ["keeper", "climb", "tower"]
    assert stems("¿Quién subió a la torre?", "es") == ["sub", "torr"]
    assert stems("the of and", "en") == stems("", "en") == stems("de la que", "es") == []


def test_stop_words_hold_what_asks_and_points():
    assert {"what", "which", "the", "of"} <= stop_words("en")
    assert {"que", "cuando", "donde", "el", "la", "de"} <= stop_words("es")
    assert all(word == fold(word) for language in ("en", "es") for word in stop_words(language))
    assert not {"lighthouse", "ferry", "faro", "barco"} & (stop_words("en") | stop_words("es"))


@pytest.mark.parametrize("function", [stop_words, lambda language: stems("a word", language)])
def test_another_language_is_an_error(function):
    with pytest.raises(KeyError):
        function("fr")


# --- Which language ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("When does the lighthouse open?", "en"),
        ("¿Cuándo abre el faro?", "es"),
        ("cuando abre el faro", "es"),
        ("WHAT DOES IT COST?", "en"),
        ("¿PRECIO?", "es"),
        ("Niño", "es"),
    ],
)
def test_detect_language(text, language):
    assert detect_language(text) == language
    assert detect_language(text, default="es") == detect_language(text, default="en")


@pytest.mark.parametrize("text", ["", "1174", "no me", "Almirante", "\0\0", "灯台", "Łódź"])
def test_where_the_text_does_not_tell_the_default_does(text):
    assert detect_language(text, default="en") == "en"
    assert detect_language(text, default="es") == "es"


def test_the_language_of_every_sample_page_is_found(documents):
    assert {document.file for document in documents} > SPANISH_FILES
    for document in documents:
        assert detect_language(document.text) == ("es" if document.file in SPANISH_FILES else "en"), document.file


def test_the_language_of_nearly_every_question_is_found():
    questions = [json.loads(line) for line in settings.QUESTIONS.read_text(encoding="utf-8").splitlines() if line]
    right = [detect_language(question["question"]) == question["language"] for question in questions]
    assert len(right) >= 200 and sum(right) / len(right) >= 0.99


# --- Sentences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ("«Niebla.» Después calló. ¿Por qué? ¡Nadie!", ["«Niebla.»", "Después calló.", "¿Por qué?", "¡Nadie!"]),
        ('He said "stop." She did.', ['He said "stop."', "She did."]),
        ("It costs 14.50 nebrales. Bring 2.", ["It costs 14.50 nebrales.", "Bring 2."]),
        ("Dr. Ríos and Mrs. Prask spoke. All slept.", ["Dr. Ríos and Mrs. Prask spoke.", "All slept."]),
        ("La Sra. Vela vio la pág. 12 del libro. Rió.", ["La Sra. Vela vio la pág. 12 del libro.", "Rió."]),
        ("J. R. Keddle rowed. He won.", ["J. R. Keddle rowed.", "He won."]),
        ("wait... no, go on. then stop", ["wait... no, go on. then stop"]),
        ("Really?! Yes.", ["Really?!", "Yes."]),
        ("", []),
        (" \n ", []),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text, expected):
    assert cut(text) == expected


def test_a_sentence_goes_on_over_a_line_end_but_not_over_a_blank_line():
    wrapped = "The keeper of the northern light climbed\nthe stairs before the evening fog arrived\nand rang twice."
    assert cut(wrapped) == [wrapped]
    assert cut(wrapped + "\n\nand a new paragraph") == [wrapped, "and a new paragraph"]


def test_headings_and_items_stand_alone():
    text = (
        "Opening hours\nThe lighthouse opens at nine and closes when the keeper\nis tired of visitors.\n- tea\n- soup"
    )
    assert cut(text) == [
        "Opening hours",
        "The lighthouse opens at nine and closes when the keeper\nis tired of visitors.",
        "- tea",
        "- soup",
    ]


def test_the_sentences_of_the_samples_are_in_order_and_lose_nothing(documents):
    for text in [document.text for document in documents] + [chunk.text for chunk in split_documents(documents)]:
        spans = sentences(text)
        assert all(start < end and text[start:end] == text[start:end].strip() for start, end in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        covered = sum(end - start for start, end in spans)
        gaps = "".join(
            text[end:start] for (_, end), (start, _) in itertools.pairwise([(0, 0), *spans, (len(text),) * 2])
        )
        assert not gaps.strip() and covered + len(gaps) == len(text)
    assert len(sentences(documents[0].text)) > 10


HOSTILE = {
    "dots": "." * 100_000,
    "dots and a word": "." * 100_000 + " A",
    "dots and spaces": ". " * 50_000,
    "a dot and spaces": "." + " " * 100_000,
    "quotes": "." + '"' * 100_000,
    "dots and quotes": '."' * 50_000,
    "line ends": "\n" * 100_000,
    "items": "\n -" * 33_000,
    "control characters": "\0\x1b" * 50_000,
    "one long word": "a" * 100_000,
    "endings": "ationalizing" * 8_000,
    "one long number": "1." * 50_000,
    "accents": "e" + "\u0301" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_texts_of_100_000_characters_take_seconds_at_most(name):
    started = time.perf_counter()
    sentences(HOSTILE[name])
    for spoken in ("en", "es"):
        stems(HOSTILE[name], spoken)
    detect_language(HOSTILE[name])
    assert time.perf_counter() - started < 5


def test_threads_stem_as_one_does():
    """A stemmer keeps the word it is at; LangChain asks a retriever from many threads."""
    every = [f"{stem}{end}" for stem in "light ship paint farm hunt wait".split() for end in ("ing", "ed", "s", "ers")]
    every += [f"{start}{word}" for start in "abcdefghijklmnopqrstuvwxyz" for word in every]
    alone = [stems(word, "en") for word in every]
    for _ in range(5):
        language._stem.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda word: stems(word, "en"), every)) == alone
