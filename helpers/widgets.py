"""The panels of the notebooks: faces only. The work is done by the functions that they call."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from helpers import settings
from helpers.chunking import Document, Span, check_sizes, split_text
from helpers.comparison import Arm, reply
from helpers.generation import Answer, answer, passages_of
from helpers.language import detect_language
from helpers.llms import LLM
from helpers.plots import COLORS
from helpers.retrieval import Retriever
from helpers.storage import IndexRefused

FAILURES = (OSError, ValueError, RuntimeError, IndexRefused)  # an Ollama that fails is a RuntimeError
COLUMN = "vertical-align:top;text-align:left;padding:8px;white-space:normal"  # a cell of a table of answers


def chunk_html(text: str, spans: Sequence[Span]) -> str:
    """Return HTML that shows `text` with its chunks, `spans` being the (start, end) of each.

    Chunks are pale blue and stronger blue by turns and open with their number; what two of them share is
    orange and underlined; what is in none is grey.
    """
    edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
    parts = []
    for start, end in pairwise(edges):
        owners = [number for number, span in enumerate(spans, start=1) if span[0] <= start and end <= span[1]]
        if not owners:
            style = f"color:{COLORS['muted']}"
        elif len(owners) > 1:
            style = f"background:{COLORS['overlap']}99;text-decoration:underline"
        else:
            style = f"background:{COLORS['chunk']}{'22' if owners[0] % 2 else '55'}"
        opened = "".join(f"<b>[{number}]</b> " for number in owners if spans[number - 1][0] == start)
        parts.append(f'{opened}<span style="{style}">{escape(text[start:end])}</span>')
    box = "background:white;color:black;padding:8px;white-space:pre-wrap;line-height:1.5;font-family:monospace"
    return f'<div style="{box}">{"".join(parts)}</div>'


def chunk_explorer(document: Document, chunk_size: int = settings.CHUNK_SIZE, overlap: int = settings.CHUNK_OVERLAP):
    """Return a panel with two sliders and a page below them, its chunks in colour (see `chunk_html`).

    `chunk_size` and `overlap`, in characters, are where the sliders stand first. Sizes that can't work show
    the sentence of the ValueError instead of the page. The panel's children are the two sliders and the view.
    """
    import ipywidgets

    look = {"style": {"description_width": "7em"}, "layout": {"width": "32em"}}
    size = ipywidgets.IntSlider(chunk_size, 50, max(2000, chunk_size), 10, description="chunk size", **look)
    shared = ipywidgets.IntSlider(overlap, 0, max(500, overlap), 10, description="overlap", **look)
    view = ipywidgets.HTML()

    def draw(_change=None) -> None:
        try:
            check_sizes(size.value, shared.value)
        except ValueError as error:
            view.value = escape(str(error))
            return
        spans = split_text(document.text, size.value, shared.value)
        title = f"{document.file}, page {document.page}: {len(spans)} chunks"
        view.value = f"<p>{escape(title)}</p>{chunk_html(document.text, spans)}"

    for slider in (size, shared):
        slider.observe(draw, names="value")
    draw()
    return ipywidgets.VBox([size, shared, view])


def answer_html(question: str, text: str, given: Answer | None = None) -> str:
    """Return HTML of an answer: the text so far and, when it is `given` in full, its citations, notes and seconds.

    Nothing that a document, a model or a person wrote becomes markup.
    """
    lines = [f'<p style="color:{COLORS["answer"]}">{escape(text) or "…"}</p>']
    if given:
        lines += _below(given, detect_language(question))
        took = settings.format_seconds(given.timings["retrieve"] + given.timings["answer"])
        lines.append(f'<p style="color:{COLORS["base"]}">{escape(given.model)}, {took}</p>')
    return "".join(lines)


def _below(given: Answer, language: str) -> list[str]:
    """Return HTML of an answer's citations, and of what was wrong or left out."""
    lines = []
    for cited in given.citations:
        place = escape(f"[{cited.number}] {cited.place(language)}")
        lines.append(f'<p><b style="color:{COLORS["chunk"]}">{place}</b>: {escape(cited.quote)}</p>')
    return lines + [f"<p>{escape(note)}</p>" for note in given.notes(language)]


def ask_box(retriever: Retriever, llm: LLM | str):
    """Return a panel to ask in: a field and, below it, the answer as it comes, its citations and the seconds it took.

    Enter asks, and so does leaving the field with another text in it. `llm` is as in `generation.answer`; a question
    that fails shows the sentence that says why. The panel's children are the field and the view.
    """
    import ipywidgets

    hint = "Ask in English or Spanish / Pregunte en español o inglés"
    field = ipywidgets.Text(placeholder=hint, continuous_update=False, layout={"width": "44em"})
    view = ipywidgets.HTML()

    def ask(_change=None) -> None:
        question, pieces = field.value.strip(), []

        def show(piece: str) -> None:
            pieces.append(piece)
            view.value = answer_html(question, "".join(pieces))

        if not question:
            return
        show("")
        try:
            given = answer(question, retriever, llm, stream=show)
            view.value = answer_html(question, given.text, given)
        except FAILURES as error:
            view.value = f"<p>{escape(str(error))}</p>"

    field.observe(ask, names="value")
    return ipywidgets.VBox([field, view])


def losses_svg(losses: Sequence[Mapping], step: int, steps: int) -> str:
    """Return HTML that draws losses as `finetuning.train` passes them on: each step grey, evaluations in colour."""
    size, top = (560, 200), max([entry.get("loss", entry.get("eval_loss")) for entry in losses], default=1.0)
    lines = []
    for kind, color, width in (("loss", COLORS["muted"], 1), ("eval_loss", COLORS["fine-tuned"], 3)):
        points = [(entry["step"] / steps, entry[kind] / top) for entry in losses if kind in entry]
        places = " ".join(f"{x * size[0]:.0f},{(1 - y) * size[1]:.0f}" for x, y in points)
        lines.append(f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width}"/>')
    last = {kind: entry[kind] for entry in losses for kind in ("loss", "eval_loss") if kind in entry}
    names = {"loss": "training loss", "eval_loss": "evaluation loss"}
    said = ", ".join(f"{names[kind]} {value:.3f}" for kind, value in last.items())
    box = f'<svg width="{size[0]}" height="{size[1]}" style="background:white;overflow:visible">'
    return f"<p>step {step} of {steps}: {said}</p>{box}{''.join(lines)}</svg>"


def loss_panel():
    """Return (panel, watch): a panel that draws the losses of a training as they come, and what `train` is given."""
    import ipywidgets

    view = ipywidgets.HTML("The losses are drawn here while it trains.")

    def watch(losses: list[dict], step: int, steps: int) -> None:
        if "eval_loss" in losses[-1] or step % max(1, steps // 100) == 0:
            view.value = losses_svg(losses, step, steps)

    return view, watch


def arms_html(question: str, answers: Mapping[str, Answer]) -> str:
    """Return HTML of the answers to a question side by side: a column an arm, named as in `results.ARMS`.

    Below each text stand its citations and notes, the seconds it took and, folded up, the passages that were read.
    """
    language, columns = detect_language(question), []
    for name, given in answers.items():
        color = COLORS.get(name, COLORS["muted"])
        parts = [f'<b style="color:{color}">{escape(name)}</b>', f"<p>{escape(given.text) or '…'}</p>"]
        parts += _below(given, language)
        parts.append(f"<p>{settings.format_seconds(given.timings['retrieve'] + given.timings['answer'])}</p>")
        if given.hits:
            passages = enumerate(passages_of(given.hits), start=1)
            read = "".join(f"<p><b>[{n}] {escape(place)}</b><br>{escape(text)}</p>" for n, (place, text) in passages)
            parts.append(f"<details><summary>passages read: {len(given.hits)}</summary>{read}</details>")
        columns.append(f'<td style="{COLUMN};border-top:4px solid {color}">{"".join(parts)}</td>')
    return f'<p><b>{escape(question)}</b></p><table style="width:100%"><tr>{"".join(columns)}</tr></table>'


def arms_panel(arms: Sequence[Arm], questions: Sequence[str]):
    """Return a panel that puts one question to every arm: a field, with `questions` to choose from, and the answers.

    One arm after the other answers; one that fails shows the sentence that says why. The panel's children are the field
    and the view.
    """
    import ipywidgets

    field = ipywidgets.Combobox(
        options=tuple(questions), placeholder="Choose a question, or write one", continuous_update=False,
        layout={"width": "44em"},
    )  # fmt: skip
    view = ipywidgets.HTML()

    def ask(_change=None) -> None:
        question, answers = field.value.strip(), {}
        if not question:
            return
        for arm in arms:
            try:
                answers[arm.name] = reply(arm, question, detect_language(question))
            except FAILURES as error:
                answers[arm.name] = Answer(str(error), (), (), True, {"retrieve": 0.0, "answer": 0.0})
            view.value = arms_html(question, answers)

    field.observe(ask, names="value")
    return ipywidgets.VBox([field, view])
