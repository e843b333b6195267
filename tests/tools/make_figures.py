"""Draw the figures that no notebook computes into notebooks/figures/.

python tests/tools/make_figures.py
"""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from helpers import settings
from helpers.plots import COLORS

FIGURES = settings.ROOT / "notebooks" / "figures"
INK, PALE, PAPER = "#333333", "#F4F4F4", "white"
RAG, TUNED = COLORS["rag"], COLORS["fine-tuned"]
CHUNK, QUERY, ANSWER = COLORS["chunk"], COLORS["query"], COLORS["answer"]

COLUMNS = (2.55, 5.05, 7.55, 10.05)  # the centres of the pictures, in the units of the map
ROWS = (6.2, 3.75, 0.85)


def course_map() -> plt.Figure:
    """Draw the way from documents to a cited answer, and below it the way through training."""
    figure, axes = plt.subplots(figsize=(11, 7.16), dpi=150)
    axes.set(xlim=(0, 11.6), ylim=(-0.35, 7.2), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)

    _band(axes, 2.55, 7.15, RAG, "RAG", "the model reads\nyour pages")
    _band(axes, -0.3, 2.15, TUNED, "fine-tuning", "the model learns\nfrom examples")
    axes.text(1.25, ROWS[0] + 0.62, "once", color=INK, style="italic", fontsize=10)
    axes.text(1.25, ROWS[1] + 0.84, "at each question", color=INK, style="italic", fontsize=10)

    above, middle, below = ROWS
    for draw, column, row, label in (
        (_documents, 0, above, "documents"),
        (_chunks, 1, above, "chunks"),
        (_vectors, 2, above, "vectors"),
        (_index, 3, above, "index"),
        (_question, 0, middle, "question"),
        (_passages, 1, middle, "passages"),
        (_model, 2, middle, "LLM, or quotes"),
        (_cited_answer, 3, middle, "answer and page"),
        (_examples, 0, below, "examples"),
        (_training, 1, below, "training"),
        (_tuned_model, 2, below, "changed LLM"),
        (_plain_answer, 3, below, "answer, no page"),
    ):
        draw(axes, COLUMNS[column], row)
        axes.text(COLUMNS[column], row - 0.78, label, ha="center", va="top", color=INK, fontsize=11.5)

    for row, column, notebook in (
        (above, 0, "01"),
        (above, 1, "02"),
        (above, 2, "03"),
        (middle, 1, "04"),
        (middle, 2, ""),
        (below, 0, "05"),
        (below, 1, ""),
        (below, 2, ""),
    ):
        _arrow(axes, (COLUMNS[column] + 0.78, row), (COLUMNS[column + 1] - 0.78, row), notebook)
    _arrow(axes, (COLUMNS[0] + 0.78, middle), (COLUMNS[1] - 0.78, middle), "03")
    axes.text(COLUMNS[2], below + 0.98, "?", ha="center", va="center", color=QUERY, weight="bold", fontsize=15)
    _arrow(axes, (COLUMNS[2], below + 0.84), (COLUMNS[2], below + 0.5))
    # The question searches the index: the way back from the index to the passages.
    turn = (above + middle) / 2 - 0.1
    path = [(COLUMNS[3], above - 1.12), (COLUMNS[3], turn), (COLUMNS[1], turn)]
    axes.plot(*zip(*path, strict=True), color=INK, linewidth=1.4, solid_joinstyle="round")
    _arrow(axes, (COLUMNS[1], turn), (COLUMNS[1], middle + 0.72))

    right = COLUMNS[3] + 0.98
    axes.plot([right, right + 0.2, right + 0.2, right], [middle, middle, below, below], color=INK, linewidth=1.4)
    axes.text(right + 0.27, (middle + below) / 2, "06", va="center", color=INK, weight="bold", fontsize=10.5)
    return figure


def _band(axes: Axes, bottom: float, top: float, color: str, name: str, saying: str) -> None:
    box = FancyBboxPatch((0.1, bottom + 0.05), 11.4, top - bottom - 0.1, boxstyle="round,pad=0,rounding_size=0.15")
    box.set(facecolor=color, alpha=0.07, edgecolor="none", zorder=0)
    axes.add_patch(box)
    middle = (bottom + top) / 2
    axes.text(0.42, middle, name, color=color, weight="bold", fontsize=14, rotation=90, ha="center", va="center")
    axes.text(0.86, middle, saying, color=INK, fontsize=9.5, rotation=90, ha="center", va="center")


def _arrow(axes: Axes, start: tuple, end: tuple, notebook: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.4))
    if notebook:
        centre = (start[0] + end[0]) / 2 - 0.05
        axes.text(centre, start[1] + 0.14, notebook, ha="center", color=INK, weight="bold", fontsize=10.5)


def _page(axes: Axes, x: float, y: float, layer: float) -> None:
    """A sheet with a folded corner, `x`, `y` its centre."""
    corners = [(-0.36, -0.5), (0.36, -0.5), (0.36, 0.32), (0.18, 0.5), (-0.36, 0.5)]
    style = {"edgecolor": INK, "linewidth": 1.3, "zorder": layer}
    axes.add_patch(Polygon([(x + a, y + b) for a, b in corners], facecolor=PAPER, **style))
    fold = [(0.18, 0.5), (0.18, 0.32), (0.36, 0.32)]
    axes.add_patch(Polygon([(x + a, y + b) for a, b in fold], facecolor=PALE, **style))
    _lines(axes, x, y, INK, (0.2, 0.05, -0.1, -0.25, -0.4), layer=layer)


def _lines(axes: Axes, x: float, y: float, color: str, heights: tuple, half: float = 0.25, layer: float = 2) -> None:
    """Lines of writing, the last one shorter."""
    for number, height in enumerate(heights):
        short = 0.16 if number == len(heights) - 1 else 0.0
        ends = [x - half, x + half - short]
        axes.plot(ends, [y + height] * 2, color=color, linewidth=1.6, alpha=0.75, zorder=layer + 0.1)


def _documents(axes: Axes, x: float, y: float) -> None:
    for layer, shift in enumerate((-0.24, 0.0, 0.24), start=1):
        _page(axes, x + shift, y - shift / 3, layer)


def _chunk(axes: Axes, x: float, y: float, color: str = CHUNK, width: float = 0.9) -> None:
    box = FancyBboxPatch((x - width / 2, y - 0.13), width, 0.26, boxstyle="round,pad=0,rounding_size=0.06")
    box.set(facecolor=color, alpha=0.22, edgecolor="none")
    axes.add_patch(box)
    box = FancyBboxPatch((x - width / 2, y - 0.13), width, 0.26, boxstyle="round,pad=0,rounding_size=0.06")
    box.set(facecolor="none", edgecolor=color, linewidth=1.3)
    axes.add_patch(box)
    _lines(axes, x, y, color, (0.045, -0.05), width / 2 - 0.1)


def _chunks(axes: Axes, x: float, y: float) -> None:
    for height in (0.39, 0.0, -0.39):
        _chunk(axes, x, y + height)


def _vectors(axes: Axes, x: float, y: float) -> None:
    shades = ((0.9, 0.2, 0.6, 0.35, 0.75), (0.15, 0.8, 0.4, 0.95, 0.25), (0.55, 0.3, 0.9, 0.1, 0.7))
    for row, numbers in enumerate(shades):
        for column, shade in enumerate(numbers):
            corner = (x - 0.55 + 0.22 * column, y + 0.26 - 0.39 * row)
            axes.add_patch(Rectangle(corner, 0.22, 0.26, facecolor=CHUNK, alpha=shade, edgecolor="none"))
        axes.add_patch(Rectangle((x - 0.55, y + 0.26 - 0.39 * row), 1.1, 0.26, fill=False, edgecolor=CHUNK))


NEAR = ((0.32, -0.02), (0.16, -0.26), (0.42, -0.29))
FAR = ((-0.45, 0.3), (-0.28, 0.4), (-0.36, 0.12), (-0.3, -0.38), (0.1, 0.34))


def _index(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Rectangle((x - 0.65, y - 0.55), 1.3, 1.1, facecolor=PAPER, edgecolor=INK, linewidth=1.3))
    for points, alpha in ((NEAR, 1.0), (FAR, 0.45)):
        for a, b in points:
            axes.add_patch(Circle((x + a, y + b), 0.06, color=CHUNK, alpha=alpha))
    axes.add_patch(Circle((x + 0.3, y - 0.2), 0.29, fill=False, edgecolor=QUERY, linewidth=1.2, linestyle=(0, (3, 2))))
    axes.plot(x + 0.3, y - 0.2, marker="*", color=QUERY, markersize=9)


def _bubble(axes: Axes, x: float, y: float, color: str, left: bool) -> None:
    box = FancyBboxPatch((x - 0.6, y - 0.36), 1.2, 0.82, boxstyle="round,pad=0,rounding_size=0.14")
    box.set(facecolor=PAPER, edgecolor=color, linewidth=1.5)
    axes.add_patch(box)
    side = -1 if left else 1
    tail = [(x + side * 0.32, y - 0.36), (x + side * 0.5, y - 0.58), (x + side * 0.1, y - 0.36)]
    axes.add_patch(Polygon(tail, facecolor=PAPER, edgecolor=PAPER, linewidth=2.5))
    axes.plot(*zip(*tail, strict=True), color=color, linewidth=1.5)


def _question(axes: Axes, x: float, y: float) -> None:
    _bubble(axes, x, y, QUERY, left=True)
    axes.text(x, y + 0.03, "?", ha="center", va="center", fontsize=22, weight="bold", color=QUERY)


def _passages(axes: Axes, x: float, y: float) -> None:
    for number, height in enumerate((0.39, 0.0, -0.39), start=1):
        _chunk(axes, x + 0.12, y + height)
        axes.text(x - 0.42, y + height, str(number), ha="right", va="center", color=CHUNK, weight="bold", fontsize=11)


def _network(axes: Axes, x: float, y: float, color: str, changed: bool = False) -> None:
    """Three layers of a network; where it is `changed`, some of its lines are in colour."""
    layers = ((-0.5, (-0.28, 0.28)), (0.0, (-0.42, 0.0, 0.42)), (0.5, (-0.28, 0.28)))
    for (a, firsts), (b, seconds) in pairwise(layers):
        for i, first in enumerate(firsts):
            for j, second in enumerate(seconds):
                learnt = changed and (i + j) % 2 == 0
                style = {"color": TUNED, "linewidth": 2.4} if learnt else {"color": "#AAAAAA", "linewidth": 1.0}
                axes.plot([x + a, x + b], [y + first, y + second], zorder=1, **style)
    for a, heights in layers:
        for height in heights:
            node = Circle((x + a, y + height), 0.11, facecolor=PAPER, edgecolor=color, linewidth=1.5, zorder=2)
            axes.add_patch(node)


def _model(axes: Axes, x: float, y: float) -> None:
    _network(axes, x, y, COLORS["base"])


def _tuned_model(axes: Axes, x: float, y: float) -> None:
    _network(axes, x, y, TUNED, changed=True)


def _cited_answer(axes: Axes, x: float, y: float) -> None:
    _bubble(axes, x, y, ANSWER, left=False)
    _lines(axes, x - 0.1, y, ANSWER, (0.28, 0.12, -0.04), 0.36)
    axes.text(x + 0.37, y - 0.19, "[1]", ha="center", va="center", color=CHUNK, weight="bold", fontsize=10.5)


def _plain_answer(axes: Axes, x: float, y: float) -> None:
    _bubble(axes, x, y, ANSWER, left=False)
    _lines(axes, x, y, ANSWER, (0.28, 0.12, -0.04), 0.42)


def _examples(axes: Axes, x: float, y: float) -> None:
    for height in (0.36, 0.0, -0.36):
        axes.text(x - 0.55, y + height, "?", ha="center", va="center", color=QUERY, weight="bold", fontsize=12)
        axes.plot([x - 0.4, x - 0.08], [y + height] * 2, color=QUERY, linewidth=2)
        axes.text(x + 0.06, y + height, "→", ha="center", va="center", color=INK, fontsize=10)
        axes.plot([x + 0.22, x + 0.62], [y + height] * 2, color=ANSWER, linewidth=2)


def _training(axes: Axes, x: float, y: float) -> None:
    """A falling loss curve."""
    axes.plot([x - 0.55, x - 0.55, x + 0.6], [y + 0.5, y - 0.45, y - 0.45], color=INK, linewidth=1.3)
    steps = [number / 20 for number in range(21)]
    axes.plot(
        [x - 0.48 + 1.02 * step for step in steps],
        [y - 0.36 + 0.78 * (1 - step) ** 3 for step in steps],
        color=TUNED,
        linewidth=2.4,
    )


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    figure = course_map()
    path: Path = FIGURES / "course_map.png"
    # No date and no version in the file: the same drawing gives the same bytes.
    figure.savefig(path, metadata={"Software": None})
    print(path.relative_to(settings.ROOT))


if __name__ == "__main__":
    main()
