"""``explain``, ``compare``, ``report`` and ``view``: why rows were kept or dropped, and what a selection contains."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

import click

from thresher import api
from thresher.cli import text
from thresher.cli.options import (
    CACHE,
    JSON,
    MOVED,
    OVERWRITE,
    RUN,
    Common,
    WholeRange,
    options,
)
from thresher.cli.output import Output
from thresher.errors import OutputError, UsageError


def _runs(folders: tuple[str, ...]) -> dict[str, Any]:
    """Return the training runs of folders by name; {} if none is a run.

    Raises:
        UsageError: Some are runs, and others are not.
    """
    from thresher.dynamic.run_folder import Training, is_run

    are_runs = {folder: is_run(folder) for folder in folders}
    if any(are_runs.values()) and not all(are_runs.values()):
        other = next(folder for folder, yes in are_runs.items() if not yes)
        raise UsageError(
            f"{other}: is not a training run, but others are; compare runs with runs, selections with selections"
        )
    return {folder: Training.load(folder) for folder in folders} if all(are_runs.values()) else {}


# --- explain --------------------------------------------------------------------------------------


@click.command()
@click.argument("selection", metavar="SEL")
@click.argument("key")
@options(*MOVED, JSON)
def explain(selection: str, key: str, pool: str | None, metadata: str | None, output: Output) -> None:
    """Explain why one row was kept or dropped.

    SEL is a selection folder, or the folder of a training run. KEY is the row's key, or row:NUMBER.
    """
    from thresher.dynamic.run_folder import is_run
    from thresher.selection import Selection

    if is_run(selection):
        _explain_run(selection, key, pool, metadata, output)
        return
    result = Selection.load(selection).explain(key, pool=pool, metadata=metadata)
    output.result(result, text.explanation(result), cost=False)


def _explain_run(folder: str, key: str, pool: str | None, metadata: str | None, output: Output) -> None:
    """Show what a training run recorded about a row."""
    from thresher.dynamic.run_folder import Training
    from thresher.report.explain import history

    if metadata:
        raise UsageError("--metadata is for selections: a training run has no joined metadata")
    training = Training.load(folder)
    result = history(training, training.open_pool(pool), key)
    output.result(result, text.run_explanation(result), cost=False)


# --- compare --------------------------------------------------------------------------------------


@click.command()
@click.argument("selections", nargs=-1, required=True, metavar="SEL [SEL]...")
@click.option("--clusters", metavar="DIR", help="Compare within these clusters, a folder of 'thresher cluster'.")
@click.option(
    "--worst", type=WholeRange(0), default=10, show_default=True, metavar="N", help="How many clusters to list."
)
@click.option(
    "--covariance", is_flag=True, help="Also measure how well each preserves the image-text cross-covariance."
)
@options(*MOVED, *RUN)
def compare(
    selections: tuple[str, ...], clusters: str | None, worst: int, covariance: bool, pool: str | None,
    metadata: str | None, **values: Any,
) -> None:  # fmt: skip
    """Compare selections of one pool with each other, or training runs.

    SEL is a selection folder. With --covariance, one is enough: it is compared with its pool. All may be folders of
    training runs instead; those that differ only in their seed are a group.
    """
    from thresher.pool.store import reopen
    from thresher.pruning.clusters import read_labels
    from thresher.selection import Selection

    common = Common.from_values(values)
    if len(set(selections)) != len(selections):
        raise UsageError("a selection is given twice")
    if runs := _runs(selections):
        if covariance or clusters or pool or metadata:
            raise UsageError(
                "--covariance, --clusters, --pool and --metadata are for selections, not for training runs"
            )
        from thresher.report.runs import compare_runs

        found = compare_runs(runs)
        common.output.result(found, text.run_comparison(found))
        return
    if len(selections) < 2 and not covariance:
        raise UsageError("compare needs at least two selections, or --covariance to compare one with its pool")
    loaded = {name: Selection.load(name) for name in selections}
    result = api.compare(loaded, clusters=clusters, worst=worst)
    lines = text.comparison(result)
    if covariance:
        labels = read_labels(clusters) if clusters else None
        errors = _covariance(common, loaded, labels, reopen(next(iter(loaded.values())), pool, metadata))
        result["covariance"] = {name: error.header(worst) for name, error in errors.items()}
        lines = itertools.chain(lines, text.covariance_table(errors))
    common.output.result(result, lines)


def _covariance(common: Common, selections: dict[str, Any], labels: Any, store: Any) -> dict[str, Any]:
    """Compare the cross-covariance of selections with their pool, within given clusters or those of their steps."""
    from thresher.pruning.covariance import covariance_errors
    from thresher.pruning.run import Run
    from thresher.report.compare import clusters_of

    chosen = list(selections.values())
    run = Run(store, chosen[0], **common.resources())
    return covariance_errors(run, selections, clusters_of(chosen) if labels is None else labels)


# --- report ---------------------------------------------------------------------------------------


@click.command()
@click.argument("selections", nargs=-1, required=True, metavar="SEL [SEL]...")
@click.option("-o", "--out", required=True, metavar="FILE", help="HTML file to write.")
@click.option("--title", metavar="TEXT", help="Heading of the page.")
@click.option(
    "--examples", type=WholeRange(0), default=6, show_default=True, metavar="N", help="Sample rows per cluster."
)
@click.option(
    "--points", type=WholeRange(0), default=5_000, show_default=True, metavar="N",
    help="Rows on the map; 0 for no map.",
)  # fmt: skip
@click.option("--without-pool", is_flag=True, help="Do not read the pool; the report then has no captions and images.")
@click.option("--covariance", is_flag=True, help="Also measure how well the image-text cross-covariance is preserved.")
@click.option("--clusters", metavar="DIR", help="Folder of 'thresher cluster' for --covariance.")
@options(*MOVED, OVERWRITE, *RUN)
def report(
    selections: tuple[str, ...], out: str, title: str | None, examples: int, points: int, without_pool: bool,
    covariance: bool, clusters: str | None, pool: str | None, metadata: str | None, overwrite: bool, **values: Any,
) -> None:  # fmt: skip
    """Write an HTML report on a selection or a training run, or compare several.

    SEL is a selection folder, or the folder of a training run. Two to five selections of one pool, or several
    training runs, are compared. The page loads nothing from the network.
    """
    from thresher.export.write import check_target
    from thresher.io.places import place
    from thresher.pool.store import reopen
    from thresher.pruning.clusters import read_labels
    from thresher.report.compared import MOST, write_comparison
    from thresher.selection import Selection

    common = Common.from_values(values)
    if runs := _runs(selections):
        if covariance or clusters or metadata:
            raise UsageError("--covariance, --clusters and --metadata are for selections, not for a training run")
        if len(set(selections)) > 1:
            from thresher.report.runs import write_runs_report

            say = common.output.progress(common.quiet).say
            _written(common, write_runs_report(runs, out, title=title, overwrite=overwrite, say=say))
            return
        run_pool = None if without_pool else pool or ""
        _report_run(common, selections[0], out, title, examples, run_pool, overwrite)
        return
    if len(set(selections)) != len(selections):
        raise UsageError("a selection is given twice")
    if len(selections) > MOST:
        raise UsageError(f"{len(selections)} selections; one page compares at most {MOST}")
    if covariance and without_pool:
        raise UsageError("--covariance reads the pool; remove --without-pool")
    if clusters and not covariance:
        raise UsageError("--clusters needs --covariance; pass both")
    loaded = {name: Selection.load(name) for name in selections}
    labels = read_labels(clusters) if clusters else None
    first = next(iter(loaded.values()))
    store = None if without_pool else reopen(first, pool, metadata)
    target = place(out)
    check_target(target, store)
    errors = _covariance(common, loaded, labels, store) if covariance else None
    how: dict[str, Any] = {"title": title, "overwrite": overwrite, "say": common.output.progress(common.quiet).say}
    if len(loaded) > 1:
        how |= {"store": store, "examples": 2 * examples, "covariance": errors, "labels_N": labels}
        _written(common, write_comparison(loaded, target, **how))
        return
    how |= {"examples": examples, "points": points, "cache": common.resources()["cache"]}
    error = errors[selections[0]] if errors else None
    _written(common, first.report(target, pool=False if store is None else store, covariance=error, **how))


def _report_run(
    common: Common, folder: str, out: str, title: str | None, examples: int, pool: str | None, overwrite: bool
) -> None:
    """Write the report on a training run. ``pool`` is a path, "" for the recorded path, or None for no pool."""
    from thresher.dynamic.run_folder import FILES, Training
    from thresher.export.write import check_target
    from thresher.io.places import place
    from thresher.report.run import write_run_report

    training = Training.load(folder)
    if os.path.realpath(out) in {os.path.realpath(training.folder / name) for name in FILES}:
        raise OutputError(f"{out}: is a file of the run; choose another name")
    store = None if pool is None else training.open_pool(pool or None)
    target = place(out)
    check_target(target, store)
    how: dict[str, Any] = {"title": title, "examples": examples, "overwrite": overwrite}
    _written(
        common, write_run_report(training, target, store=store, **how, say=common.output.progress(common.quiet).say)
    )


def _written(common: Common, path: Any) -> None:
    result = {"report": str(path), "bytes": path.stat().st_size}
    common.output.result(result, text.reported(result))


# --- view -----------------------------------------------------------------------------------------


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="SEL|RUN|POOL [SEL|RUN]...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen at; 0.0.0.0 for other machines too.",
)
@click.option(
    "--port", type=WholeRange(0, 65_535), default=0, metavar="N", help="Port to listen at (default: a free one)."
)
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="Also answer under this name, such as that of a Jupyter server in front of it; may be repeated.",
)
@click.option("--no-browser", is_flag=True, help="Only print the address; do not open a browser.")
@click.option(
    "-o", "--out", metavar="DIR", help="Folder in which selections are saved (default: where the first SEL is)."
)
@options(*MOVED)
@CACHE
@options(JSON)
def view(
    paths: tuple[str, ...], host: str, port: int, names: tuple[str, ...], no_browser: bool, out: str | None,
    pool: str | None, metadata: str | None, cache: str | None, output: Output,
) -> None:  # fmt: skip
    """Show selections, training runs or a pool in the browser.

    SEL is a selection folder; up to five of one pool are compared. RUN is the folder of a training run. The page loads
    nothing from the network, and whoever has the printed address can see the data. Ctrl-C ends it.
    """
    from thresher.viewer.security import LOOPBACK
    from thresher.viewer.server import open_browser

    if host not in LOOPBACK:
        warnings.warn(
            f"--host {host}: other machines can reach this server, and who has the address sees the data; the "
            "connection is not encrypted",
            stacklevel=2,
        )
    shown = api.view(*paths, host=host, port=port, names=names, out=out, pool=pool, metadata=metadata, cache=cache)
    output.result({"url": shown.url}, [shown.url, "Ctrl-C ends it."], cost=False)
    sys.stdout.flush()
    if not no_browser:
        open_browser(shown.url)
    with suppress(KeyboardInterrupt):
        shown.wait()
    if shown.is_busy:  # a library that computes a map cannot be stopped, and would abort the process at its end
        os._exit(0)
