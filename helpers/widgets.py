"""The panels of the notebooks: faces only. The work is done by the functions that they call."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from helpers import settings
from helpers.chunking import Document, Span, check_sizes, split_text
from helpers.plots import COLORS


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
