"""Results as lines of text: what each command prints without ``--json``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thresher.io.paths import relative, shortened, visible
from thresher.runtime.format import counted, duration, percent, size
from thresher.runtime.places import local_path

_CAPTION = 240  # characters of a caption: three lines of a terminal

# --- look -----------------------------------------------------------------------------------------


def prose(text: str, columns: int | None, *, hanging: str = "") -> Iterator[str]:
    """Yield the lines of paragraphs, broken between words to fit; as they are if ``columns`` is None.

    Args:
        text: Paragraphs, separated by empty lines.
        columns: Columns of the terminal.
        hanging: What all lines of a paragraph but its first begin with.
    """
    if columns is None:
        yield from text.split("\n")
        return
    for number, paragraph in enumerate(text.split("\n\n")):
        yield from [""] * (number > 0)
        yield from textwrap.wrap(
            " ".join(paragraph.split()), max(columns, 20), subsequent_indent=hanging, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip


def inspection(pool: Mapping[str, Any], engine: str) -> Iterator[str]:
    """Yield the output of ``inspect`` on a pool."""
    yield (
        f"{pool['location']}: {counted(pool['rows'], 'row')}, layout {pool['layout']}, {counted(pool['files'], 'file')}"
    )
    for name, field in pool["fields"].items():
        norm = f"norms {field['norms']['min']:.3g} to {field['norms']['max']:.3g}" if field["norms"] else "no valid row"
        bad = sum(field[f"{kind}_rows"] for kind in ("nan", "infinite", "zero"))
        yield (
            f"  {name}: {field['dim']} x {field['dtype']}, {size(field['bytes'])}, {norm}, {counted(bad, 'bad row')} "
            f"of {field['looked_at']:,} checked"
        )
    yield f"  key: {pool['key'] or 'none'}; caption: {pool['caption'] or 'none'}"
    yield f"  columns: {', '.join(pool['columns']) or 'none'}"
    if keys := pool["keys"]:
        yield f"  keys: {keys['repeated']:,} repeated, {keys['unsafe']:,} unsafe, {keys['empty']:,} empty"
    for skipped in pool["skipped"]:
        yield f"  skipped: {skipped['path']}: {skipped['why']}"
    for warning in pool["warnings"]:
        yield f"  ! {warning}"
    if cost := pool["cost"]:
        spent = ", ".join(f"{name} {duration(value)}" for name, value in cost["seconds"].items())
        yield f"  estimate for {counted(cost['clusters'], 'cluster')} on {engine}: {spent}"
        peaks = ", ".join(f"{name} {size(value)}" for name, value in cost["memory"].items())
        yield f"  memory up to {size(cost['memory_bytes'])} ({peaks}), cache {size(cost['cache_bytes'])}"


def planned(run: Any, rows: int, nodes: int, calibrated: bool) -> Iterator[str]:
    """Yield lines on a :class:`thresher.check.cost.RunCost`."""
    nodes_now = counted(nodes, "node")
    start = run.seconds - sum(step.seconds for step in run.steps)
    yield f"{counted(rows, 'row')} on {nodes_now}: about {duration(run.seconds)}, {duration(start)} of it to start"
    for step in run.steps:
        requests = f", {counted(step.requests, 'request')}" if step.requests else ""
        written = f", writes {size(step.written)} in cluster order" if step.written else ""
        parts = ", ".join(f"{name} {duration(value)}" for name, value in step.parts.items())
        yield f"  {step.name}: {duration(step.seconds)} for {counted(step.rows_in, 'row')}"
        yield f"    time: most of it {step.bottleneck} ({parts})"
        yield f"    data: reads {size(step.read)}{written}, the driver receives {size(step.received)}{requests}"
        yield (
            f"    memory: driver {size(step.driver_memory)} and {size(step.driver_mapped)} mapped from files, worker "
            f"{size(step.worker_memory)}"
        )
    for name in run.missing:
        yield f"  {name}: not counted, the model does not know it"
    yield f"with {2 * nodes:,} nodes: about {duration(run.doubled)}, {run.seconds / run.doubled:.2f} times as fast"
    if not calibrated:
        yield "with typical speeds; --calibrate measures those of this machine"


def machine(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the output of ``doctor --self``."""
    yield from (f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    for name, extra in found["extras"].items():
        lacks = ", ".join(extra["missing"])
        yield f"extra {name}: {'lacks ' + lacks + '; type: ' + extra['install'] if lacks else 'installed'}"
    torch, blas = found["torch"], found["blas"]
    yield f"torch {torch['version'] or 'not installed'}" + (
        f"; devices: {', '.join(torch['devices'])}" if torch["devices"] is not None else ""
    )
    if torch["advice"]:
        yield f"  {torch['advice']}"
    for library in blas:
        kernels = f", {library['kernels']} kernels" if library["kernels"] else ""
        threads = counted(library["threads"], "thread")
        yield f"BLAS of NumPy: {library['library']} {library['version']}{kernels}, {threads}"
    yield f"GPUs: {', '.join(found['devices']) or 'none'}"
    count = found["cores"]
    limit = f", the container may use {count['container']:g}" if count["container"] is not None else ""
    yield f"cores: {count['usable']} of {count['machine']} can be used{limit}"
    amounts = {name: size(value) for name, value in found["memory"].items() if value is not None}
    yield "memory: " + ", ".join(f"{name} {value}" for name, value in amounts.items())
    if cache := found["cache"]:
        yield f"cache: {size(cache['bytes'])} of at most {size(cache['limit_bytes'])} in {_folder_state(cache)}"
    yield f"temporary files: in {_folder_state(found['temporary'])}"
    limit = found["open_files"]["limit"]
    yield f"open files: {'no limit' if limit is None else f'at most {limit:,}'}"
    terminal = found["terminal"]
    kind = f"terminal {terminal['type']}, {terminal['columns']} columns" if terminal["is_terminal"] else "no terminal"
    yield f"output: {kind}, encoding {terminal['encoding']}, locale {terminal['locale'] or 'none'}"
    yield from (f"{name}={value}" for name, value in found["variables"].items())
    yield from (f"  {line}" for line in settings({**found["config"], "problems": []}))
    yield from (f"! {problem}" for problem in found["problems"])


def _folder_state(folder: Mapping[str, Any]) -> str:
    state = ("can be written" if folder["writable"] else "CANNOT be written") + (
        "" if folder["exists"] else ", does not exist yet"
    )
    free = f", {size(folder['free_bytes'])} free" if folder["free_bytes"] is not None else ""
    return f"{folder['folder']} ({state}{free})"


def diagnosis(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the output of ``doctor`` on raw data."""
    about, read = "" if data["exact"] else "about ", data["looked_at"]
    on_disk = f"{'about ' if data['bytes_estimated'] else ''}{size(data['bytes'])}"
    yield (
        f"{data['location']}: {about}{counted(data['samples'], 'sample')}, {data['kind']}, "
        f"{counted(data['files'], data['unit'])}, {on_disk}"
    )
    if read < data["samples"]:
        yield f"  keys and captions were read from {counted(read, 'sample')}, spread over the data"
    if columns := data["columns"]:
        names = {"image": "picture", "caption": "caption", "key": "key", "uid": "uid"}
        roles = ", ".join(f"{role}: {columns[name] or 'none'}" for role, name in names.items())
        yield f"  {roles}; other columns: {', '.join(columns['others']) or 'none'}"
    if data["members"]:
        shares = (name if share == 1 else f"{name} ({share:.1%})" for name, share in data["members"].items())
        yield f"  members: {', '.join(shares)}"
    if keys := data["keys"]:
        yield f"  keys: {keys['repeated']:,} repeated, {keys['unsafe']:,} unsafe, {keys['uids']:,} with a uid"
    captions = data["captions"]
    if captions["characters"]:
        yield (
            f"  captions: {captions['empty']:,} missing, {captions['repeated']:,} repeated, "
            f"{captions['file_names']:,} file names, {_range(captions['characters'], 'characters')}"
        )
    images = data["pictures"]
    bad = images["broken"] + images["enormous"]
    if images["looked_at"]:
        yield f"  images: {counted(images['looked_at'], 'random image')} decoded, {bad:,} broken or too large"
    else:
        yield "  images: none"
    if images["formats"]:
        counts = (f"{name} {count:,}" for kind in ("formats", "modes") for name, count in images[kind].items())
        yield f"    {', '.join(counts)}"
        aspect = images["aspect"]
        long = "square" if aspect[2] == 1 else f"aspect ratio {_range(aspect)}"
        median = size(images["bytes"][1])
        yield f"    shorter side {_range(images['short_side'], 'pixels')}, {long}; median size {median}"
        odd = {"animated": "animated", "transparent": "transparent", "cmyk": "CMYK", "sixteen_bit": "16-bit"}
        unusual = [f"{images[name]:,} {what}" for name, what in odd.items() if images[name]]
        if unusual:
            yield f"    of these: {', '.join(unusual)}"
    if tars := data["tars"]:
        sizes = "none" if tars["sizes_json"] is None else "agrees"
        if tars["sizes_json"] and any(tars["sizes_json"].values()):
            sizes = "does not agree"
        each = f"samples in each {_range(tars['samples'])}" if tars["samples"] else "none is intact"
        yield f"  tars: {each}; sizes.json: {sizes}"
    if (changes := data["reshard"]) and (formats := changes["converted"]):
        listed = ", ".join(f"{name} {count:,}" for name, count in formats.items())
        yield f"  for tars that open_clip trains on, reshard --as webdataset converts to PNG: {listed}"
    for warning in data["warnings"]:
        yield f"  ! {warning}"
    cost = data["cost"]
    rates = {"decoded": "images decoded", "images": "images encoded", "texts": "captions encoded"}
    measured = [f"{cost[name]:,.0f} {what}" for kind, what in rates.items() if cost.get(name := f"{kind}_per_second")]
    if measured:
        yield f"  estimated rate per second on {counted(cost['workers'], 'core')}: {', '.join(measured)}"
    if "embed_seconds" in cost:
        spent, dims = f"{duration(cost['embed_seconds'])} to embed", counted(cost["dims"], "dimension")
    else:
        spent, dims = f"{duration(cost['decode_seconds'])} to decode", "512 dimensions each"
    yield f"  in total: {spent}, {size(cost['pool_bytes'])} of vectors in {dims}"
    if "embed_seconds" not in cost:
        yield "  --encoder NAME tries an encoder and estimates how long embedding takes"
    yield f"  next: {data['next']}"


def _range(values: Sequence[float], unit: str = "") -> str:
    """Return minimum, median and maximum as text: "2 to 80 pixels (median 26)", or "48 pixels" if all are the same."""
    low, median, high = (f"{value:,}" for value in values)
    unit = unit and f" {unit}"
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit} (median {median})"


def method_list(summaries: Mapping[str, str]) -> Iterator[str]:
    """Yield one line per method."""
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        yield f"{name:{width}}  {summary}"
    yield ""
    yield "thresher methods NAME describes one of them."


def method_page(
    name: str, summary: str, about: str, parameters: Sequence[Mapping[str, Any]], columns: int | None = None
) -> Iterator[str]:
    """Yield lines on one method, in the columns of the terminal if there is one."""
    yield from prose(f"{name}: {summary}\n\n{about}".replace("``", "`"), columns)
    yield ""
    for item in parameters:
        default = f"default {shown(item['default'])}"
        if item["default"] is None:
            default = "required" if item["required"] else "optional"
        yield f"  {item['name']} ({item['type']}; {default})"
        yield from (f"      {line}" for line in prose(item["help"], columns and columns - 6))


def recipe_list(summaries: Mapping[str, str], columns: int | None = None) -> Iterator[str]:
    """Yield a paragraph on each recipe, in the columns of the terminal if there is one."""
    for name, about in summaries.items():
        yield from prose(f"{name}: {about}", columns, hanging="  ")
        yield ""


# --- embed ----------------------------------------------------------------------------------------


def embedded(pool: Any, seconds: float) -> Iterator[str]:
    """Yield lines on an :class:`thresher.embedding.pipeline.Embedded`."""
    yield from pool.notes
    if pool.new:
        rate = f"{pool.new / seconds:,.0f}" if pool.new >= seconds else f"{pool.new / seconds:.2g}"
        yield (f"{counted(pool.new, 'row')} embedded in {seconds:.1f} s, {rate} per second including loading the model")
    if pool.skipped or pool.damaged:
        files = f" and {counted(pool.damaged, 'damaged file')}" if pool.damaged else ""
        yield f"{counted(pool.skipped, 'sample')}{files} skipped, listed in {pool.pool}/set_aside.txt"
    already = "" if pool.new else ", all from an earlier run"
    yield (
        f"{pool.pool}: {counted(pool.rows, 'row')} ({' and '.join(pool.fields)}) in "
        f"{counted(pool.shards, 'shard')}{already}"
    )


def classes_embedded(classes: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on embedded class names."""
    many = counted(classes["templates"], "sentence")
    yield f"{counted(classes['classes'], 'class', 'classes')}, {many} each, {counted(classes['dims'], 'dimension')}"
    yield f"written to {classes['out']} and {classes['names']}"


# --- select ---------------------------------------------------------------------------------------


def kept(selection: Any, out: object) -> Iterator[str]:
    """Yield lines on a written selection."""
    repeated = f", {selection.uses:,} with repeats" if selection.repeats is not None else ""
    yield (
        f"kept {len(selection):,} of {counted(selection.total, 'row')} "
        f"({percent(len(selection), selection.total)}){repeated}"
    )
    yield f"written to {out}"


def mismatched(selection: Any, out: object, run: str) -> Iterator[str]:
    """Yield lines on a written selection without mismatched pairs, and on the folder of the run that found them."""
    yield from kept(selection, out)
    yield f"to see the pairs, type: thresher report {run} -o pairs.html"


def advised(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on how much of a pool to keep."""
    yield from found["notes"]
    if not found["known"]:
        return
    yield f"  {'keep':>6}{'passes':>9}{visible(found['metric'], 24):>26}{'5% to 95%':>18}{'best in':>9}"
    for line in found["table"]:
        span = f"{line['low']:.1f} to {line['high']:.1f}"
        yield f"  {_share(line['keep']):>6}{line['passes']:9.2f}{line['expected']:26.1f}{span:>18}{line['best']:9.0%}"
    low, high = _share(found["keep_low"]), _share(found["keep_high"])
    yield f"keep {_share(found['keep'])} (from {low} to {high} in 90% of the bootstraps)"


def _share(share: float) -> str:
    """Return a share with three digits: "27.7%", "0.05%"."""
    return f"{100 * share:.3g}%"


def referenced(made: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on a written file of reference losses, and on what it cost."""
    if made["source"] == "pool":
        yield "the embeddings of the pool give the losses: help from the model that made them, which is not in the cost"
    if made["without_loss"]:
        yield f"{counted(made['without_loss'], 'row has', 'rows have')} no finite loss"
    yield (
        f"cost: {made['gradient_samples']:,} gradient samples, {made['scored_forwards']:,} scored forwards, "
        f"{duration(made['seconds'])}"
    )
    yield f"{counted(made['rows'], 'loss', 'losses')} written to {made['out']}"
    yield f"to use them, type: thresher train clip DATA -o run --policy rho --reference {made['out']}"


def scored(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on written scores."""
    yield from scores["notes"]
    span = f", {scores['least']:.4f} to {scores['most']:.4f}, mean {scores['mean']:.4f}" if scores["rows"] else ""
    yield f"{scores['rows']:,} of {counted(scores['of'], 'row')} scored{span}"
    if "shard" not in scores:  # a job leaves its scores next to the file, which the command without --shard writes
        yield f"written to {scores['out']}"


def clustered(clusters: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on written clusters."""
    yield from clusters["notes"]
    yield (
        f"{counted(clusters['clusters'], 'cluster')} of {clusters['smallest']:,} to "
        f"{counted(clusters['largest'], 'row')} "
        f"({clusters['empty']:,} empty), mean cosine to the centroid {clusters['mean_cosine']:.4f}"
    )
    yield f"written to {clusters['out']}"


# --- explain --------------------------------------------------------------------------------------


def explanation(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on a row of a selection."""
    from thresher.runtime.template import RoundedFloat

    fate = "dropped" if not row["kept"] else "kept" if row["uses"] == 1 else f"kept, used {row['uses']:,} times"
    yield f"row {row['row']:,}, key {row['key']}{_caption(row)}: {fate}"
    for number, step in enumerate(row["steps"], 1):
        package = f" ({step['package']})" if step["package"] else ""
        yield f"  {number}. {step['method']}{package}: {step['verdict']} - {step['reason'] or 'passes'}"
        if "score" in step and "history" not in step:
            cut = "" if step["cut"] is None else f" (cut at {RoundedFloat(step['cut']):.4f})"
            yield f"     {step['meaning']}: {RoundedFloat(step['score']):.4f}{cut}"
        if "history" in step and not step["reason"]:  # the reason of a dropped row has the same numbers
            yield f"     {_history(step['history'])}"
        if "group" in step and step["group"]["size"] > 1:
            yield f"     group of {step['group']['size']:,} duplicates, the first is row {step['group']['first']:,}"
        if "cluster" in step:
            cluster = step["cluster"]
            facts = ", ".join(
                f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}"
                for name, value in cluster.items()
                if name not in ("number", "name")
            )
            called = f" ({cluster['name']})" if "name" in cluster else ""
            yield f"     cluster {cluster['number']}{called}: {facts}"
        if "duplicate" in step:
            yield f"     {_duplicate(step['duplicate'])}"
        if "reference" in step:
            known = step["reference"]
            key = f", key {known['key']}" if "key" in known else ""
            yield f"     repeats row {known['row']:,} of {known['pool']}{key}{_caption(known)}"


def _duplicate(twin: Mapping[str, Any]) -> str:
    """Return which row a row duplicates, and the row at the end of a chain of duplicates."""
    text, last = f"duplicates row {twin['row']:,}, key {twin['key']}{_caption(twin)}", twin
    if "last" in twin:
        last, between = twin["last"], twin["links"] - 2
        link = f"; this chain of {twin['links']:,} duplicates ends at" if between else ", which duplicates"
        text += f"{link} row {last['row']:,}, key {last['key']}{_caption(last)}"
    return f"{text}, which was {'kept' if last['kept'] else 'dropped'}"


def run_explanation(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on a row of a training run."""
    epochs = f"{counted(row['epochs'], 'epoch')} of training, {row['policy']}"
    yield f"row {row['row']:,}, key {row['key']}{_caption(row)}: {epochs}"
    yield f"  {_history(row['history'])}"
    if "mismatch" in row:
        yield f"  {_mismatch(**row['mismatch'])}"
    yield f"  epochs that selected candidates: {row['searches']:,}"


def _caption(row: Mapping[str, Any]) -> str:
    return f" \u201c{shortened(row['caption'], _CAPTION)}\u201d" if row.get("caption") else ""


def _history(history: Mapping[str, Any]) -> str:
    """Return what training recorded about a row, in one line."""
    if history["seen"] is None:
        seen = "never trained on"
    else:
        seen = f"last trained on in epoch {history['seen']}, with a loss of {history['loss']:.4f}"
    if not history["candidate"]:
        return f"never a candidate for pruning; {seen}"
    times = "once" if history["candidate"] == 1 else f"{history['candidate']:,} times"
    kinds = " and ".join(history["kinds"])
    return f"a candidate for pruning {times}, last in epoch {history['last']} as {kinds}; {seen}"


def _mismatch(rank: float | None, chance: float | None) -> str:
    """Return whether a pair is thought mismatched, and why, in one line."""
    if rank is None:
        return "no rank of its loss: never trained on in an epoch on all rows"
    why = f"the mean rank of its loss is {rank:.3f}, from 0 (lowest) to 1 (highest)"
    if chance is None:
        return f"{why}; the losses of this run do not show mismatched pairs"
    return f"{'probably' if chance > 0.5 else 'probably not'} mismatched, probability {chance:.1%}: {why}"


def comparison(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that compare selections."""
    for name, count in result["kept"].items():
        repeated = f", {result['uses'][name]:,} with repeats" if result["uses"][name] != count else ""
        yield f"{name}: {count:,} of {counted(result['rows'], 'row')} ({percent(count, result['rows'])}){repeated}"
    for pair in result["pairs"]:
        yield (
            f"{pair['a']} and {pair['b']}: {pair['both']:,} in both, {pair['only_a']:,} and {pair['only_b']:,} in "
            f"only one; overlap {pair['overlap']:.1%} of the smaller, Jaccard {pair['jaccard']:.3f}"
        )
    if result["clusters"]:
        yield "clusters with the largest differences in the share kept:"
        for entry in result["clusters"]:
            counts = ", ".join(f"{name} {count:,}" for name, count in entry["kept"].items())
            yield f"  cluster {entry['cluster']} of {counted(entry['size'], 'row')}: {counts}"


def covariance_table(errors: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of covariance errors of selections, by name."""
    # The width of the column is that of the escaped names.
    errors = {visible(name, limit=None): error for name, error in errors.items()}
    first = next(iter(errors.values()))
    inside = f"within {counted(first.classes, 'cluster')} of {counted(first.classed, 'row')}"
    if first.within is None:
        inside = "pass --clusters DIR for the error within clusters"
    yield (
        f"cross-covariance of image and text, relative error to the {counted(first.rows, 'row')} of the pool; {inside}:"
    )
    width = max(map(len, ["not centred", *errors]))
    for title, names in (
        ("centred", ("overall", "within")),
        ("not centred", ("overall_uncentred", "within_uncentred")),
    ):
        shown = [name for name in names if getattr(first, name) is not None]
        heads = "".join(f"{name.split('_')[0]:>9}{'random':>9}{'ratio':>7}" for name in shown)
        yield f"  {title:{width}}{'rows':>14}{heads}" + ("" if first.within is None else f"{'lost':>7}")
        for name, error in errors.items():
            deviations = [getattr(error, each) for each in shown]
            cells = "".join(
                f"{_number(d.error, 9, 4)}{_number(d.random, 9, 4)}{_number(d.ratio, 7, 2)}" for d in deviations
            )
            lost = "" if error.within is None else f"{error.classes_lost:7,}"
            yield f"  {name:{width}}{error.kept:14,}{cells}{lost}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def reported(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line on a written report."""
    yield f"report: {result['report']} ({size(result['bytes'])})"


# --- train ----------------------------------------------------------------------------------------


def trained(out: str, log: Sequence[Mapping[str, Any]], requested: float | None) -> Iterator[str]:
    """Yield lines on a finished training run, from its folder, its log and the requested share to prune, or None."""
    from thresher.train.data import SET_ASIDE
    from thresher.train.loop import table_of

    last = log[-1]
    seen, seconds = sum(e["samples"] for e in log), sum(e["seconds"] for e in log)
    pruned = last["pruned_so_far"]
    missed = f" ({requested:.1%} requested)" if requested is not None and abs(requested - pruned) > 0.01 else ""
    yield (
        f"{counted(len(log), 'epoch')}, {counted(seen, 'sample')} in {seconds:,.0f} s, {pruned:.1%} of the "
        f"rows pruned{missed}"
    )
    for name, metrics in last.get("eval", {}).items():
        yield f"{name}:"
        yield from table_of(metrics)
    skipped = local_path(out) / SET_ASIDE
    if skipped.exists():
        rows = len(skipped.read_text(encoding="utf-8").splitlines())
        yield f"{counted(rows, 'row')} skipped, listed in {skipped}"
    yield f"written to {out}"


# --- write ----------------------------------------------------------------------------------------


def exported(done: Any) -> Iterator[str]:
    """Yield lines on an :class:`thresher.export.write.Exported`."""
    yield f"{counted(done.rows, 'row')} written to {done.path}"
    if done.missing:
        yield f"{counted(done.missing, 'row')} of the selection could not be written, listed in {done.missing_file}"
    if done.manifest:
        yield f"manifest: {done.manifest}"


def resharded(done: Any, data: str, out: str) -> Iterator[str]:
    """Yield lines on new shards."""
    from thresher.data.trainable import described

    yield from done.notes
    files = counted(done.shards, {"webdataset": "tar", "parquet": "parquet file", "csv": "csv"}[done.form])
    yield f"{done.samples:,} of {counted(done.chosen, 'sample')} in {files}, found by {done.by}"
    if done.missing:
        yield f"{counted(done.missing, 'key')} not found in {data}, listed in {out}/missing.txt"
    if done.aside:
        yield f"{counted(done.aside, 'file or sample', 'files or samples')} skipped, listed in {out}/set-aside.txt"
    changes = {
        "converted to PNG": counted(done.converted, "image"),
        "renamed": counted(done.renamed, "image"),
        "written to .txt": counted(done.captioned, "caption"),
    }
    if done.converted or done.renamed or done.captioned:
        yield ", ".join(f"{what} {how}" for how, what in changes.items() if not what.startswith("0 "))
    if done.blank:
        yield f"! {counted(done.blank, 'sample has', 'samples have')} no caption, only an empty .txt"
    if done.left_out:
        yield (
            f"! open_clip will leave out {counted(sum(done.left_out.values()), 'sample')}: "
            f"{described(list(done.left_out.items()))}; --trainable fixes what can be fixed"
        )
    yield f"written to {out}"


# --- cache ----------------------------------------------------------------------------------------


def cache_size(cache: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line on the size of the cache."""
    yield f"{cache['folder']}: {size(cache['bytes'])} of at most {size(cache['limit_bytes'])}"


def settings(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on each setting, on the configuration file, and on each problem."""
    rows = [
        (row["name"], "?" if row["value"] is None else shown(row["value"]), _setting_source(row))
        for row in result["settings"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, value, source in rows:
        yield f"{name.ljust(widths[0])}  {value.ljust(widths[1])}  {source}"
    yield f"file: {result['file']}"
    for problem in result["problems"]:
        yield f"! {problem}"


def shown(value: Any) -> str:
    """Return the value of a setting as text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _setting_source(row: Mapping[str, Any]) -> str:
    return {"file": "the file", "problem": "see below"}.get(row["source"], row["where"] or "default")


def cache_cleared(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line on a cleared cache."""
    yield f"{size(result['removed_bytes'])} removed from {result['folder']}"


def run_comparison(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that compare training runs."""
    from thresher.report.runs import value_texts

    groups = result["groups"]
    for group in groups:
        yield (
            f"{group['name']}: {counted(len(group['runs']), 'run')}, {group['samples']:,.0f} samples seen, "
            f"{duration(group['seconds'])} of training, {group['pruned']:.1%} pruned"
        )
        for name, earlier in group["repeated"].items():
            yield f"  {name} has the seed and settings of {earlier}: both count as one seed, with their mean"
    for name, run in result["runs"].items():
        state = f", not finished: {run['unfinished']}" if run["unfinished"] else ""
        yield f"  {name}: {run['policy']}, seed {run['seed']}, {run['left_out']:,} samples left out{state}"
    metrics = dict.fromkeys(name for group in groups for name in group["metrics"])
    if metrics:
        against = f"; minus {groups[0]['name']}, paired by seed" if len(groups) > 1 else ""
        yield f"metrics of the last evaluation, shares in percent: mean ± half of the 95% interval over seeds{against}:"
    for name in metrics:
        yield f"  {name}"
        for group in groups:
            value, apart = value_texts(group["metrics"].get(name))
            yield f"    {group['name']:40} {value:16} {apart}".rstrip()
    if result["agreement"]:
        yield "candidates of the last search in both runs, as a share of the smaller set:"
    for pair in result["agreement"]:
        yield f"  {pair['a']} and {pair['b']}: {pair['overlap']:.1%}, by chance {pair['chance']:.1%}"


def lab_plan(result: dict[str, Any]) -> Iterator[str]:
    """Describe what a plan would do."""
    rows = "an unknown number of rows" if result["rows"] is None else f"{result['rows']:,} rows"
    cost = f"which cost {result['full_runs']:.1f} times as much as full training"
    yield f"{result['plan']}: {counted(result['runs'], 'run')}, {cost}"
    yield f"train: {relative(result['data'])} ({result['kind']}, {rows})"
    yield from (f"eval: {relative(path)}" for path in result["evals"])
    yield f"seeds: {', '.join(map(str, result['seeds']))}"
    yield from (f"  {job['name']:50} {job['of_a_full_run']:7.1%} of full training" for job in result["jobs"])


def evaluated(results: Sequence[Mapping[str, Any]], out: str | None) -> Iterator[str]:
    """Yield the metrics of a model by set and task, in percent."""
    for one in results:
        yield f"{one['key']}" + (f" ({counted(one['rows'], 'row')})" if one["rows"] is not None else "")
        low, high = one["metrics"].get("main_metric_interval", (None, None))
        for name, value in one["metrics"].items():
            if isinstance(value, float):
                interval = f"  [{100 * low:.1f}, {100 * high:.1f}]" if name == "main_metric" and low is not None else ""
                yield f"  {name:32} {100 * value:5.1f}{interval}"
    if out is not None:
        yield f"written to {out}"
