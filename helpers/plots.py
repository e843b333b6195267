"""One look for every figure of the course, and one colour for each idea."""

from collections.abc import Mapping, Sequence

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart. One colour an idea, in every notebook.
COLORS = {
    "chunk": "#0072B2",
    "overlap": "#E69F00",
    "query": "#D55E00",
    "answer": "#009E73",
    "dense": "#56B4E9",
    "bm25": "#F0C808",
    "hybrid": "#009E73",
    "base": "#999999",
    "rag": "#0072B2",
    "fine-tuned": "#CC79A7",
    # Between blue and pink, and told apart by how light they are too.
    "fine-tuned + rag": "#913EDB",
    "fine-tuned on passages + rag": "#C69ADE",
    "base + guide": "#4A4A4A",
    "rag + guide": "#80E9F9",
    "whole document": "#E69F00",
    "en": "#0072B2",
    "es": "#D55E00",
    "muted": "#BBBBBB",
}


def use_style() -> None:
    """Set the course's look for all figures that follow."""
    import matplotlib

    matplotlib.rcParams.update(
        {
            "figure.figsize": (8, 3.6),
            "figure.dpi": 85,  # sharp enough, and a notebook of a dozen figures stays under 500 KB
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "font.size": 10.5,
            "legend.frameon": False,
        }
    )


def bars_with_intervals(axes, groups: Sequence[str], series: Mapping[str, Sequence], labels: Mapping[str, str]) -> None:
    """Draw shares as grouped bars with their 95 % intervals.

    `series` maps a key of `COLORS` to one `evaluation.Share` a group; `labels` gives each series its name.
    """
    width = 0.8 / len(series)
    for number, (key, shares) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        values = [share.value for share in shares]
        below = [share.value - share.interval[0] for share in shares]
        above = [share.interval[1] - share.value for share in shares]
        axes.bar(places, values, width * 0.9, color=COLORS[key], label=labels[key])
        axes.errorbar(places, values, yerr=[below, above], fmt="none", ecolor="#333333", capsize=3, linewidth=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
