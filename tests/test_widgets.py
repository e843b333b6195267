"""The panels of the notebooks, worked as a person works them: by setting the values of their fields."""

from dataclasses import dataclass, replace

import pytest

from helpers.chunking import Document
from helpers.comparison import Arm, Corpus
from helpers.generation import answer
from helpers.llms import LLM, PromptTooLong
from helpers.ollama import NoServer
from helpers.plots import COLORS
from helpers.results import ARMS, BASE, BOTH, RAG, TUNED
from helpers.retrieval import Index, Retriever
from helpers.widgets import arms_html, arms_panel, ask_box, chunk_explorer, loss_panel

TEXTS = [
    "The goat of Corvejón is called Almirante. The keeper <b>Anselmo Grieve</b> feeds it at dawn.",
    "El faro de Cabo Lirón mide 21 metros. Lo pintaron de blanco en 1902.",
]


@dataclass(frozen=True)
class Says(LLM):
    """A model that says given pieces and notes in `shown` what the panel showed before each; it may fail."""

    pieces: tuple[str, ...] = ()
    shown: tuple = ()
    failure: Exception | None = None

    def stream(self, messages):
        for piece in self.pieces:
            yield piece
            for note in self.shown:
                note()
        if self.failure:
            raise self.failure


@pytest.fixture(scope="module")
def retriever(embedder):
    files = [{"file": f"<i>{n}</i>.txt", "page": n + 1, "page_label": ["iv", ""][n]} for n in range(2)]
    return Retriever(Index.from_texts(TEXTS, files, embedder))


def says(*pieces, **more):
    return Says("fake <model>", object(), 4096, 20, pieces=pieces, **more)


def test_an_answer_streams_into_the_box_and_ends_with_its_places(retriever):
    seen = []
    box = ask_box(retriever, says("Anselmo", " Grieve", " [1].", shown=(lambda: seen.append(view.value),)))
    field, view = box.children
    field.value = "Who feeds the goat of Corvejón?"
    assert [("Anselmo" in html, "Grieve" in html, "[1]" in html) for html in seen] == [
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]
    assert "page iv" in view.value and "feeds it at dawn." in view.value and " s</p>" in view.value.replace("ms", "s")


def test_what_was_invented_or_left_out_is_said_below_the_answer(retriever):
    field, view = ask_box(retriever, says("Anselmo Grieve [1][7].")).children
    field.value = "Who feeds the goat of Corvejón?"
    assert "<p>Cited, and not among the passages: [7]</p>" in view.value and "Left out" not in view.value
    given = answer("¿Cuánto mide el faro de Cabo Lirón?", retriever, says("21 metros [1]."))
    left = replace(given, hits=given.hits[:1], dropped=given.hits[1:])
    html = arms_html("¿Cuánto mide el faro de Cabo Lirón?", {RAG: left})
    assert "<p>Omitido, no cabe: &lt;i&gt;0&lt;/i&gt;.txt, 1</p>" in html


def test_nothing_that_was_written_becomes_markup(retriever):
    box = ask_box(retriever, says("Anselmo Grieve <script>alert(1)</script> [1] <img src=x>"))
    field, view = box.children
    field.value = "Who feeds the <u>goat</u> of Corvejón?"
    for tag in ("<script", "<img", "<u>", "<i>", "<b>Anselmo", "<model"):
        assert tag not in view.value
    assert "&lt;script&gt;" in view.value and "&lt;b&gt;Anselmo Grieve" in view.value


def test_a_question_in_spanish_gets_its_places_in_spanish(retriever):
    field, view = (box := ask_box(retriever, says("21 metros [1]."))).children
    field.value = "¿Cuánto mide el faro de Cabo Lirón?"
    assert "página 2" in view.value and len(box.children) == 2


@pytest.mark.parametrize(
    "failure",
    [NoServer("No Ollama answers: start it."), PromptTooLong("The prompt is <long>."), OSError("The disk is full.")],
)
def test_a_question_that_fails_says_why_and_the_next_one_is_answered(retriever, failure):
    field, view = ask_box(retriever, says("Half", failure=failure)).children
    field.value = "Who feeds the goat?"
    assert view.value == f"<p>{str(failure).replace('<', '&lt;').replace('>', '&gt;')}</p>"
    field, view = ask_box(retriever, "quotes").children
    field.value = "Who feeds the goat of Corvejón?"
    assert "feeds it at dawn" in view.value


def test_an_empty_field_asks_nothing(retriever):
    field, view = ask_box(retriever, says("never")).children
    field.value = "  "
    assert view.value == ""


def test_sliders_draw_the_page_anew_and_impossible_sizes_say_why():
    page = Document("one <b>two</b> three " * 20, "a<i>.txt", 1, "", "")
    size, overlap, view = chunk_explorer(page, 100, 20).children
    assert "<b>two" not in view.value and "<i>" not in view.value
    before, size.value = view.value, 200
    assert view.value != before
    overlap.value = 300
    assert "<div" not in view.value and "overlap" in view.value


def test_every_arm_gets_a_column_with_its_places_its_seconds_and_what_it_read(retriever):
    corpus = Corpus(retriever=retriever)
    arms = [
        Arm(BASE, says("<u>Nobody</u> knows.")),
        Arm(RAG, says("Anselmo Grieve [1] <img src=x>."), "passages", corpus=corpus),
        Arm(TUNED, says(failure=PromptTooLong("The prompt is <long>."))),
        Arm(BOTH, says("Anselmo [2]."), "passages", corpus=corpus),
    ]
    field, view = arms_panel(arms, ["Who feeds the goat of Corvejón?"]).children
    assert view.value == "" and field.options == ("Who feeds the goat of Corvejón?",)
    field.value = "Who feeds the <s>goat</s> of Corvejón?"
    columns = view.value.split("<td")[1:]
    assert [f">{arm.name}</b>" in column for arm, column in zip(arms, columns, strict=True)] == [True] * 4
    assert [COLORS[arm.name] in column for arm, column in zip(arms, columns, strict=True)] == [True] * 4
    assert "page iv" in columns[1] and "passages read: 2" in columns[1] and "feeds it at dawn" in columns[3]
    assert "passages read" not in columns[0] and "The prompt is &lt;long&gt;." in columns[2]
    assert all(" s</p>" in column.replace("ms", "s") for column in columns)
    for tag in ("<u>", "<img", "<s>", "<i>", "<b>Anselmo"):
        assert tag not in view.value
    field.value = " "
    assert view.value.count("<td") == 4  # an empty field asks nothing


def test_every_arm_has_a_colour_of_its_own():
    colors = [COLORS[name] for name in ARMS]
    assert len(set(colors)) == len(ARMS)


def test_losses_are_drawn_as_they_come_and_not_each_of_many():
    panel, watch = loss_panel()
    losses, shown = [{"step": 0, "epoch": 0, "eval_loss": 4.0}], []
    for step in range(1, 401):
        watch(losses, step - 1, 400)
        shown.append(panel.value)
        losses.append({"step": step, "epoch": step / 400, "loss": 2.0})
    assert len(set(shown)) == 100 and "step 396 of 400: evaluation loss 4.000, training loss 2.000" in panel.value
    evaluated, steps = (part.split('"')[0].split() for part in panel.value.split('points="')[:0:-1])
    assert evaluated == ["0,0"] and steps[0] == "1,100" and len(steps) == 396
