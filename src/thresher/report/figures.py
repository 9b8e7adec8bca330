"""Charts as inline SVG; the same numbers give the same bytes."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thresher.report.facts import Clusters, Histogram
from thresher.runtime.format import percent
from thresher.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT = "#2f7391"
DROPPED = "#e8a35c"
INK = "#2b3138"
FAINT = "#8a939c"
GRID = "#e6e9ec"
_WIDTH = 5.5  # inches, about half a page, so that text is readable on a phone
_MANY = 1_500  # with more points, a scatter plot is drawn as pixels
_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Drawing:
    """A chart that can be drawn into a figure; the height is in inches."""

    name: str
    description: str
    draw: Callable[[Figure], None]
    height: float = 2.7

    def svg(self) -> str:
        """Return it as an ``<svg>`` element."""
        return svg(self.name, self.description, self.draw, self.height)

    def figure(self) -> Figure:
        """Return it as a figure that pyplot does not know, on white, which notebooks show as an image."""
        from matplotlib import style
        from matplotlib.figure import Figure

        class Chart(Figure):
            def _repr_png_(self) -> bytes:
                out = io.BytesIO()
                self.savefig(out, format="png", dpi=100)
                return out.getvalue()

        with style.context(["default", {**_STYLE, "figure.facecolor": "white", "axes.facecolor": "white"}]):
            figure = Chart(figsize=(_WIDTH, self.height), layout="constrained")
            self.draw(figure)
        return figure


def funnel(selection: Selection) -> str:
    """Return a chart of the size of the pool, and the rows that every step kept and dropped."""
    return funnel_drawing(selection).svg()


def funnel_drawing(selection: Selection) -> Drawing:
    """Draw the size of the pool, and the rows that every step kept and dropped."""
    steps, total = selection.steps, selection.total

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        names = ["pool", *(f"{i}. {step.method}" for i, step in enumerate(steps, 1))]
        kept = np.array([total, *(step.rows_out for step in steps)], np.float64)
        dropped = np.array([0, *(step.rows_in - step.rows_out for step in steps)], np.float64)
        y = np.arange(len(names))
        axes.barh(y, kept, color=KEPT, height=0.62)
        axes.barh(y, dropped, left=kept, color=DROPPED, height=0.62)
        for i in y.tolist():
            text = f"{int(kept[i]):,}"
            if i:
                text += f" \u00b7 {percent(float(kept[i]), total)}"
            x = float(kept[i] + dropped[i])
            axes.annotate(text, (x, i), (5, 0), textcoords="offset points", va="center", fontweight="bold")
        axes.set_yticks(y, names)
        axes.invert_yaxis()
        axes.set_xlim(0, max(total, 1) * 1.36)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)

    text = f"Rows kept by each of {len(steps)} steps, from {total:,} to {len(selection):,}"
    return Drawing("funnel", text, draw, height=0.55 + 0.42 * (len(steps) + 1))


def scores(
    name: str, histogram: Histogram, label: str, cut: float | None, named: tuple[str, str] = ("kept", "dropped")
) -> str:
    """Return a histogram of a step's scores as :func:`scores_drawing` draws it."""
    return scores_drawing(name, histogram, label, cut, named).svg()


def scores_drawing(
    name: str, histogram: Histogram, label: str, cut: float | None, named: tuple[str, str] = ("kept", "dropped")
) -> Drawing:
    """Draw a histogram of a step's scores, kept and dropped rows stacked, with the cut; ``named`` are the labels."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        both = histogram.kept + histogram.dropped
        axes.stairs(both, histogram.edges, fill=True, color=DROPPED, label=named[1])
        axes.stairs(histogram.kept, histogram.edges, fill=True, color=KEPT, label=named[0])
        axes.set_xlim(histogram.edges[0], histogram.edges[-1])
        axes.set_ylim(0, max(int(both.max()), 1) * 1.16)
        if cut is not None and histogram.edges[0] <= cut <= histogram.edges[-1]:
            axes.axvline(cut, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            right = cut < (histogram.edges[0] + histogram.edges[-1]) / 2
            axes.annotate(
                f"cut {cut:.4g}",
                (cut, 1),
                (4 if right else -4, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="left" if right else "right",
                va="top",
            )
        if np.array_equal(histogram.edges % 1, np.full(len(histogram.edges), 0.5)):  # a bin for each integer
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(label)
        axes.set_ylabel("rows")
        counts(axes)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=2, handlelength=1)

    return Drawing(name, f"Histogram of the {label}: {named[0]} and {named[1]} rows", draw)


def shares(name: str, clusters: Clusters) -> str:
    """Draw the share kept of each cluster against its complexity; dot areas show cluster sizes."""
    x, y = np.asarray(clusters.more[clusters.difficulty], np.float64), clusters.share_K
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        return ""
    label = {"complexity": "complexity (d_inter \u00d7 d_intra)", "d_intra": "mean distance to the centroid (d_intra)"}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        size = clusters.size_K[good]
        many = len(size) > _MANY
        # Few clusters get large dots and many get small ones, for about the same total area.
        area = 8 + size / size.max() * np.clip(9_000 / len(size), 24, 320)
        order = np.argsort(-size, kind="stable")
        axes.scatter(
            x[good][order],
            y[good][order],
            s=area[order],
            color=KEPT,
            alpha=0.3 if many else 0.55,
            edgecolor="none" if many else "white",
            linewidth=0.5,
            rasterized=many,
            clip_on=False,
        )
        overall = float(clusters.kept_K.sum() / clusters.size_K.sum())
        axes.axhline(overall, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"all: {percent(overall, 1)}",
            (1, overall),
            (0, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
        low, high = float(y[good].min()), float(y[good].max())
        pad = max(0.06 * (high - low), 0.02)
        axes.set_ylim(max(low - pad, -0.02), min(high + pad, 1.02))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if high - low > 0.05 else f"{value:.1%}")
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_xlabel(label[clusters.difficulty])
        axes.set_ylabel("share kept")

    return svg(name, f"Share kept of every cluster, by {clusters.difficulty}", draw)


def sizes(name: str, clusters: Clusters) -> str:
    """Draw the sizes of the clusters before and after, each sorted."""
    before, after = -np.sort(-clusters.size_K), -np.sort(-clusters.kept_K)
    # More points than pixels would only make the page larger.
    ranks = np.unique(np.linspace(0, len(before) - 1, min(len(before), 400)).round().astype(np.int64))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        edges = np.append(ranks, len(before)).astype(np.float64)
        axes.stairs(before[ranks], edges, fill=True, color=DROPPED, label="before")
        axes.stairs(after[ranks], edges, fill=True, color=KEPT, label="after")
        axes.set_xlim(0, len(before))
        if before[0] > 40 * max(float(np.median(before)), 1):
            axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, None)
        axes.set_xlabel("clusters, largest first")
        axes.set_ylabel("rows")
        counts(axes)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else "")
        figure.legend(loc="outside upper right", ncols=2, handlelength=1)

    return svg(name, f"Sizes of {len(before):,} clusters before and after, each sorted", draw)


def counts(axes: Axes) -> None:
    """Label the vertical axis with integers, and draw grid lines."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else "")
    axes.grid(axis="y", color=GRID, linewidth=0.7)


def svg(name: str, description: str, draw: Any, height: float = 2.7) -> str:
    """Draw a figure and return it as an ``<svg>`` element that can share a page with others."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", dpi=144, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(_LEFT_OUT, "", text)
    # Make ids unique within the page, and let the page set the fonts.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text).replace("xlink:href", "href")
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"\N{MINUS SIGN}(0\.?0*)<", r"\1<", text)  # a tick at -0.0
    text = re.sub(r"font: (?:(\d+|bold) )?([\d.]+px) [^;\"]+", lambda m: _font(m[1], m[2]), text)
    text = re.sub(r" font-family: [^;\"]+;", "", text)
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg role="img" aria-label="{html.escape(description)}" {box[0] if box else ""}>'
    text = re.sub(r"^<svg[^>]*>", lambda _: head, text)
    return re.sub(r"\n\s*", "\n", text).strip()


def _font(weight: str | None, size: str) -> str:
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")
