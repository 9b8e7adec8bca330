"""Charts of a training run, epoch by epoch, as inline SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from thresher.report.epochs import Curve, Epochs, settled
from thresher.report.figures import DROPPED, FAINT, GRID, INK, KEPT, counts, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REDUNDANT, ILL_MATCHED = "#7d9a4f", "#b4573f"
_LINES = (KEPT, DROPPED, "#7d9a4f", "#b4573f", "#7b6aa8", "#4f5b66", "#c9a227", "#3f9b93")
_ON_ALL = ("everything", "warm-up", "preparation")
_DASHED = (0, (4, 3))
_POINTS = 100  # epochs from which on each has no dot of its own
_CELLS = 2_000  # cells of a heat map from which on it is drawn as pixels


def charts(found: Epochs, promised: float | None) -> dict[str, str]:
    """Return the charts that the log has numbers for, by name."""
    made = {"kept": _kept(found), "pruned": _pruned(found, promised)}
    if found.search_E.any():
        made["candidates"] = _candidates(found)
    if np.isfinite(found["overlap"]).any():
        made["overlap"] = _overlap(found)
    if np.isfinite(found["loss"]).any():
        made["loss"] = _loss(found)
    if found.counts_EB.size:
        made["histogram"] = _histogram(found)
    if np.isfinite(found["seconds"]).any():
        made["seconds"] = _seconds(found)
    if np.isfinite(found["samples_per_second"]).any():
        made["speed"] = _speed(found)
    return made


def evaluation(name: str, of: str, curves: tuple[Curve, ...]) -> str:
    """Draw the metrics of an evaluation set that are shares; "" where there are none."""
    drawn = [c for c in curves if not settled(c.metric) and -0.001 <= min(c.values) and max(c.values) <= 1.001]
    if not drawn:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, curve in enumerate(drawn):
            style = "-" if i < len(_LINES) else _DASHED
            colour = _LINES[i % len(_LINES)]
            axes.plot(
                curve.epochs, curve.values, color=colour, linestyle=style, marker=_dot(len(curve.epochs)),
                markersize=3.5, label=_words(curve.metric), clip_on=False,
            )  # fmt: skip
        axes.set_ylim(0, max(0.05, *(max(curve.values) for curve in drawn)) * 1.08)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _epochs(axes)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)

    return svg(name, f"Metrics on {of} by epoch", draw, height=2.7 + 0.2 * ((len(drawn) + 1) // 2))


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _kept(found: Epochs) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        edges = _edges(found)
        axes.stairs(found["total"], edges, fill=True, color=DROPPED, label="left out")
        axes.stairs(found["rows"], edges, fill=True, color=KEPT, label="trained on")
        axes.set_ylim(0, float(np.nanmax([found["total"], found["rows"]])) * 1.05)
        _epochs(axes, found)
        axes.set_ylabel("rows")
        counts(axes)
        _legend(figure, axes)

    return svg("run-kept", "Rows trained on and left out, by epoch", draw)


def _pruned(found: Epochs, promised: float | None) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = found["pruned_so_far"]
        axes.plot(found.number_E, values, color=KEPT, marker=_dot(len(found)), markersize=3.5, clip_on=False)
        if promised is not None:
            axes.axhline(promised, color=INK, linewidth=1, linestyle=_DASHED)
            axes.annotate(
                f"promised over the run: {promised:.1%}", (0, promised), (4, 4),
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
        top = float(np.nanmax([*values, promised or 0, 0.05]))
        axes.set_ylim(min(0.0, float(np.nanmin(values))), top * 1.18)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _epochs(axes, found)
        axes.set_ylabel("samples left out so far")
        axes.grid(axis="y", color=GRID, linewidth=0.7)

    return svg("run-pruned", "Share of the samples left out so far, by epoch", draw)


def _candidates(found: Epochs) -> str:
    at = np.flatnonzero(found.search_E)
    sides = {"redundant": REDUNDANT, "ill_matched": ILL_MATCHED}
    told = any(np.nansum(found[side][at]) for side in sides)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.8 * float(np.diff(found.number_E[at]).min(initial=1))
        if told:
            for i, (side, colour) in enumerate(sides.items()):
                place = found.number_E[at] + (i - 0.5) * width / 2
                axes.bar(place, found[side][at], width / 2, color=colour, label=side.replace("_", "-"))
            _legend(figure, axes)
        else:
            axes.bar(found.number_E[at], found["candidates"][at], width, color=DROPPED)
        _epochs(axes, found)
        axes.set_ylabel("rows")
        counts(axes)

    return svg("run-candidates", "Candidates for pruning, by the epoch that found them", draw)


def _overlap(found: Epochs) -> str:
    at = np.flatnonzero(np.isfinite(found["overlap"]))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        number = found.number_E[at]
        axes.plot(
            number, found["overlap"][at], color=KEPT, marker="o", markersize=4, label="found again", clip_on=False
        )
        axes.plot(
            number, found.chance_E[at], color=INK, linestyle=_DASHED, linewidth=1, marker=".", label="by chance",
            clip_on=False,
        )  # fmt: skip
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _epochs(axes, found)
        axes.set_ylabel("of the candidates")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        _legend(figure, axes)

    return svg("run-overlap", "Candidates that the search before had found as well", draw)


def _loss(found: Epochs) -> str:
    everything = np.array([phase in _ON_ALL for phase in found.phases])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(found.number_E, found["loss"], color=FAINT, linewidth=1)
        for label, chosen, fill in (("on everything", everything, KEPT), ("on a part", ~everything, "white")):
            if chosen.any():
                axes.plot(
                    found.number_E[chosen], found["loss"][chosen], linestyle="none", marker="o", markersize=5,
                    markerfacecolor=fill, markeredgecolor=KEPT, label=label, clip_on=False,
                    rasterized=len(found) > _POINTS,
                )  # fmt: skip
        axes.set_ylim(min(0.0, float(np.nanmin(found["loss"]))), None)
        _epochs(axes, found)
        axes.set_ylabel("mean loss")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        _legend(figure, axes)

    return svg("run-loss", "Mean loss by epoch", draw)


def _histogram(found: Epochs) -> str:
    def draw(figure: Figure) -> None:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        axes = figure.add_subplot()
        share_BE = (found.counts_EB / np.maximum(found.counts_EB.sum(axis=1, keepdims=True), 1)).T
        edges = found.edges.copy()
        if edges[0] == 0:  # the axis is logarithmic: the lowest bin is drawn as wide as the next
            edges[0] = edges[1] / 1.25
        colours = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9cc3d3", KEPT, "#123a4d"])
        # By the root of the share: an epoch whose losses are all alike would leave the others pale.
        scale = PowerNorm(0.5, vmin=0, vmax=max(float(share_BE.max()), 1e-9))
        pixels = share_BE.size > _CELLS
        mesh = axes.pcolormesh(_edges(found), edges, share_BE, cmap=colours, norm=scale, rasterized=pixels)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        _epochs(axes, found)
        axes.set_ylabel("loss")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return svg("run-histogram", "Losses of the rows trained on, by epoch: share of the rows by size of the loss", draw)


def _seconds(found: Epochs) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.stairs(np.nan_to_num(found["seconds"]), _edges(found), fill=True, color=KEPT)
        axes.set_ylim(0, None)
        _epochs(axes, found)
        axes.set_ylabel("seconds of training")
        axes.grid(axis="y", color=GRID, linewidth=0.7)

    return svg("run-seconds", "Seconds of training by epoch", draw)


def _speed(found: Epochs) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        speed = found["samples_per_second"]
        axes.plot(found.number_E, speed, color=KEPT, marker=_dot(len(found)), markersize=3.5, clip_on=False)
        axes.set_ylim(0, float(np.nanmax(found["samples_per_second"])) * 1.15)
        _epochs(axes, found)
        axes.set_ylabel("samples a second")
        counts(axes)

    return svg("run-speed", "Samples a second by epoch", draw)


def _dot(points: int) -> str:
    return "o" if points <= _POINTS else ""


def _edges(found: Epochs) -> np.ndarray:
    return np.append(found.number_E - 0.5, found.number_E[-1] + 0.5)


def _epochs(axes: Axes, found: Epochs | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    if found is not None:
        edges = _edges(found)
        axes.set_xlim(edges[0], edges[-1])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=2, handlelength=1)
