"""Charts of a training run, epoch by epoch, as inline SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from thresher.report.epochs import Curve, Epochs, is_constant
from thresher.report.facts import plain
from thresher.report.figures import DROPPED, FAINT, GRID, INK, KEPT, counts, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REDUNDANT, ILL_MATCHED = "#7d9a4f", "#b4573f"
LINES = (KEPT, DROPPED, "#7d9a4f", "#b4573f", "#7b6aa8", "#4f5b66", "#c9a227", "#3f9b93")
_ON_ALL = ("everything", "warm-up", "preparation")
_DASHED = (0, (4, 3))
_POINTS = 100  # with more epochs, points have no markers
_CELLS = 2_000  # with more cells, a heat map is drawn as pixels


def charts(log: Epochs, target: float | None) -> dict[str, str]:
    """Return the charts, by name, for which the log has numbers."""
    made = {"kept": _kept(log), "pruned": _pruned(log, target)}
    if log.search_E.any():
        made["candidates"] = _candidates(log)
    if np.isfinite(log["overlap"]).any():
        made["overlap"] = _overlap(log)
    if np.isfinite(log["loss"]).any():
        made["loss"] = _loss(log)
    if log.counts_EB.size:
        made["histogram"] = _histogram(log)
    if np.isfinite(log["seconds"]).any():
        made["seconds"] = _seconds(log)
    if np.isfinite(log["samples_per_second"]).any():
        made["speed"] = _speed(log)
    return made


def evaluation(name: str, of: str, curves: tuple[Curve, ...]) -> str:
    """Draw the metrics of an evaluation set that are shares; "" if there are none."""
    drawn = [c for c in curves if not is_constant(c.metric) and -0.001 <= min(c.values) and max(c.values) <= 1.001]
    if not drawn:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, curve in enumerate(drawn):
            style = "-" if i < len(LINES) else _DASHED
            colour = LINES[i % len(LINES)]
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
    return plain(metric.replace("_", " "), 60)


def _kept(log: Epochs) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        edges = _edges(log)
        axes.stairs(log["total"], edges, fill=True, color=DROPPED, label="pruned")
        axes.stairs(log["rows"], edges, fill=True, color=KEPT, label="trained on")
        axes.set_ylim(0, float(np.nanmax([log["total"], log["rows"]])) * 1.05)
        _epochs(axes, log)
        axes.set_ylabel("rows")
        counts(axes)
        _legend(figure, axes)

    return svg("run-kept", "Rows trained on and pruned, by epoch", draw)


def _pruned(log: Epochs, target: float | None) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = log["pruned_so_far"]
        axes.plot(log.number_E, values, color=KEPT, marker=_dot(len(log)), markersize=3.5, clip_on=False)
        if target is not None:
            axes.axhline(target, color=INK, linewidth=1, linestyle=_DASHED)
            axes.annotate(
                f"target: {target:.1%}", (0, target), (4, 4),
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
        top = float(np.nanmax([*values, target or 0, 0.05]))
        axes.set_ylim(min(0.0, float(np.nanmin(values))), top * 1.18)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _epochs(axes, log)
        axes.set_ylabel("samples pruned so far")
        axes.grid(axis="y", color=GRID, linewidth=0.7)

    return svg("run-pruned", "Share of the samples pruned so far, by epoch", draw)


def _candidates(log: Epochs) -> str:
    at = np.flatnonzero(log.search_E)
    sides = {"redundant": REDUNDANT, "ill_matched": ILL_MATCHED}
    by_side = any(np.nansum(log[side][at]) for side in sides)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        width = 0.8 * float(np.diff(log.number_E[at]).min(initial=1))
        if by_side:
            for i, (side, colour) in enumerate(sides.items()):
                center = log.number_E[at] + (i - 0.5) * width / 2
                axes.bar(center, log[side][at], width / 2, color=colour, label=side.replace("_", "-"))
            _legend(figure, axes)
        else:
            axes.bar(log.number_E[at], log["candidates"][at], width, color=DROPPED)
        _epochs(axes, log)
        axes.set_ylabel("rows")
        counts(axes)

    return svg("run-candidates", "Candidates for pruning, by the epoch that selected them", draw)


def _overlap(log: Epochs) -> str:
    at = np.flatnonzero(np.isfinite(log["overlap"]))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        number = log.number_E[at]
        axes.plot(number, log["overlap"][at], color=KEPT, marker="o", markersize=4, label="repeated", clip_on=False)
        axes.plot(
            number, log.chance_E[at], color=INK, linestyle=_DASHED, linewidth=1, marker=".", label="by chance",
            clip_on=False,
        )  # fmt: skip
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _epochs(axes, log)
        axes.set_ylabel("share of the candidates")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        _legend(figure, axes)

    return svg("run-overlap", "Share of the candidates that were also candidates in the previous search", draw)


def _loss(log: Epochs) -> str:
    full = np.array([phase in _ON_ALL for phase in log.phases])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(log.number_E, log["loss"], color=FAINT, linewidth=1)
        for label, chosen, fill in (("full epoch", full, KEPT), ("pruned epoch", ~full, "white")):
            if chosen.any():
                axes.plot(
                    log.number_E[chosen], log["loss"][chosen], linestyle="none", marker="o", markersize=5,
                    markerfacecolor=fill, markeredgecolor=KEPT, label=label, clip_on=False,
                    rasterized=len(log) > _POINTS,
                )  # fmt: skip
        axes.set_ylim(min(0.0, float(np.nanmin(log["loss"]))), None)
        _epochs(axes, log)
        axes.set_ylabel("mean loss")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        _legend(figure, axes)

    return svg("run-loss", "Mean loss by epoch", draw)


def _histogram(log: Epochs) -> str:
    def draw(figure: Figure) -> None:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        axes = figure.add_subplot()
        share_BE = (log.counts_EB / np.maximum(log.counts_EB.sum(axis=1, keepdims=True), 1)).T
        edges = log.edges.copy()
        if edges[0] == 0:  # the axis is logarithmic: draw the lowest bin as wide as the next
            edges[0] = edges[1] / 1.25
        colours = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9cc3d3", KEPT, "#123a4d"])
        # Color by the root of the share; otherwise one epoch with equal losses would make all others pale.
        scale = PowerNorm(0.5, vmin=0, vmax=max(float(share_BE.max()), 1e-9))
        pixels = share_BE.size > _CELLS
        mesh = axes.pcolormesh(_edges(log), edges, share_BE, cmap=colours, norm=scale, rasterized=pixels)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        _epochs(axes, log)
        axes.set_ylabel("loss")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return svg("run-histogram", "Histogram of the losses of the rows trained on, by epoch", draw)


def _seconds(log: Epochs) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.stairs(np.nan_to_num(log["seconds"]), _edges(log), fill=True, color=KEPT)
        axes.set_ylim(0, None)
        _epochs(axes, log)
        axes.set_ylabel("training time in seconds")
        axes.grid(axis="y", color=GRID, linewidth=0.7)

    return svg("run-seconds", "Training time in seconds, by epoch", draw)


def _speed(log: Epochs) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        speed = log["samples_per_second"]
        axes.plot(log.number_E, speed, color=KEPT, marker=_dot(len(log)), markersize=3.5, clip_on=False)
        axes.set_ylim(0, float(np.nanmax(log["samples_per_second"])) * 1.15)
        _epochs(axes, log)
        axes.set_ylabel("samples per second")
        counts(axes)

    return svg("run-speed", "Samples per second, by epoch", draw)


def _dot(points: int) -> str:
    return "o" if points <= _POINTS else ""


def _edges(log: Epochs) -> np.ndarray:
    return np.append(log.number_E - 0.5, log.number_E[-1] + 0.5)


def _epochs(axes: Axes, log: Epochs | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    if log is not None:
        edges = _edges(log)
        axes.set_xlim(edges[0], edges[-1])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper right", ncols=2, handlelength=1)
