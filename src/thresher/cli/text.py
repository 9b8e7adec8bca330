"""Results as lines of text: what each command prints without ``--json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thresher.io.paths import visible
from thresher.runtime.format import duration, size

# --- look -----------------------------------------------------------------------------------------


def inspection(found: Mapping[str, Any], engine: str) -> Iterator[str]:
    """Yield lines on a pool, as ``inspect`` describes it."""
    yield f"{found['location']}: {found['rows']:,} rows, layout {found['layout']}, files: {found['files']:,}"
    for name, field in found["fields"].items():
        norm = f"norms {field['norms']['min']:.3g} .. {field['norms']['max']:.3g}" if field["norms"] else "no good row"
        bad = sum(field[f"{kind}_rows"] for kind in ("nan", "infinite", "zero"))
        yield (
            f"  {name}: {field['dim']} x {field['dtype']}, {size(field['bytes'])}, {norm}, {bad:,} bad rows "
            f"of {field['looked_at']:,} looked at"
        )
    yield f"  key: {found['key'] or 'none'}; caption: {found['caption'] or 'none'}"
    yield f"  columns: {', '.join(found['columns']) or 'none'}"
    if found["keys"]:
        yield "  keys: " + ", ".join(f"{found['keys'][kind]:,} {kind}" for kind in ("repeated", "climbing", "empty"))
    for aside in found["set_aside"]:
        yield f"  set aside: {aside['path']}: {aside['why']}"
    for warning in found["warnings"]:
        yield f"  ! {warning}"
    if cost := found["cost"]:
        spent = ", ".join(f"{name} {duration(value)}" for name, value in cost["seconds"].items())
        yield f"  about, with {cost['clusters']:,} clusters on {engine}: {spent}"
        yield f"  memory up to {size(cost['memory_bytes'])}, cache {size(cost['cache_bytes'])}"


def diagnosis(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on raw data, as ``doctor`` describes them."""
    about, read = "" if found["exact"] else "about ", found["looked_at"]
    files = found["unit"]
    on_disk = f"{'about ' if found['bytes_estimated'] else ''}{size(found['bytes'])}"
    yield (
        f"{found['location']}: {about}{found['samples']:,} samples, {found['kind']}, "
        f"{found['files']:,} {files}{'s' * (found['files'] != 1)}, {on_disk}"
    )
    if read < found["samples"]:
        yield f"  keys and captions of {read:,} samples were read, spread over the data"
    if columns := found["columns"]:
        roles = ", ".join(f"{role}: {columns[role] or 'none'}" for role in ("picture", "caption", "key", "uid"))
        yield f"  {roles}; other columns: {', '.join(columns['others']) or 'none'}"
    if found["members"]:
        shares = (name if share == 1 else f"{name} ({share:.1%})" for name, share in found["members"].items())
        yield f"  members: {', '.join(shares)}"
    if keys := found["keys"]:
        yield f"  keys: {keys['repeated']:,} repeated, {keys['climbing']:,} climbing, {keys['uids']:,} with a uid"
    captions = found["captions"]
    if captions["characters"]:
        yield (
            f"  captions: {captions['empty']:,} missing, {captions['repeated']:,} repeated, "
            f"{captions['file_names']:,} names of files, {_range(captions['characters'])} characters"
        )
    pictures = found["pictures"]
    bad = pictures["broken"] + pictures["enormous"]
    yield f"  pictures: {pictures['looked_at']:,} at random were decoded, {bad:,} are broken or too large"
    if pictures["formats"]:
        counts = (f"{name} {count:,}" for kind in ("formats", "modes") for name, count in pictures[kind].items())
        yield f"    {', '.join(counts)}"
        aspect = pictures["aspect"]
        long = "square" if aspect[2] == 1 else f"the longer {_range(aspect)} times that"
        middle = size(pictures["bytes"][1])
        yield f"    shorter side {_range(pictures['short_side'])} pixels, {long}; half have up to {middle}"
        odd = {"animated": "animated", "transparent": "transparent", "cmyk": "CMYK", "sixteen_bit": "of 16 bits"}
        unusual = [f"{pictures[name]:,} {what}" for name, what in odd.items() if pictures[name]]
        if unusual:
            yield f"    of which {', '.join(unusual)}"
    if tars := found["tars"]:
        sizes = "none" if tars["sizes_json"] is None else "agrees"
        if tars["sizes_json"] and any(tars["sizes_json"].values()):
            sizes = "does not agree"
        each = f"{_range(tars['samples'])} samples each" if tars["samples"] else "none is sound"
        yield f"  tars: {each}; sizes.json: {sizes}"
    for warning in found["warnings"]:
        yield f"  ! {warning}"
    cost = found["cost"]
    rates = {"decoded": "pictures decoded", "images": "encoded", "texts": "captions encoded"}
    measured = [f"{cost[name]:,.0f} {what}" for kind, what in rates.items() if (name := f"{kind}_per_second") in cost]
    yield f"  about, a second on {cost['workers']} cores: {', '.join(measured)}"
    if "embed_seconds" in cost:
        spent, dims = f"{duration(cost['embed_seconds'])} to embed", f"{cost['dims']:,} dimensions"
    else:
        spent, dims = f"{duration(cost['decode_seconds'])} to decode", "512 dimensions each"
    yield f"  in all: {spent}, {size(cost['pool_bytes'])} of vectors in {dims}"
    if "embed_seconds" not in cost:
        yield "  --encoder NAME tries an encoder and tells how long embedding takes"
    yield f"  next: {found['next']}"


def _range(values: Sequence[float]) -> str:
    """Return the smallest, the middle and the largest."""
    return " .. ".join(f"{value:,}" for value in values)


def method_list(summaries: Mapping[str, str]) -> Iterator[str]:
    """Yield a line a method."""
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        yield f"{name:{width}}  {summary}"
    yield ""
    yield "thresher methods NAME describes one of them."


def method_page(name: str, summary: str, about: str, parameters: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines on one method."""
    yield from (f"{name}: {summary}\n\n{about}\n").split("\n")
    for item in parameters:
        default = f"default {item['default']}"
        if item["default"] is None:
            default = "required" if item["required"] else "optional"
        yield f"  {item['name']} ({item['type']}; {default})"
        yield f"      {item['help']}"


# --- embed ----------------------------------------------------------------------------------------


def embedded(found: Any, seconds: float) -> Iterator[str]:
    """Yield lines on an :class:`thresher.embed.pipeline.Embedded`."""
    yield from found.notes
    if found.new:
        rate = found.new / seconds
        yield f"{found.new:,} rows embedded in {seconds:.1f} s, {rate:,.0f} a second, loading the model included"
    if found.set_aside or found.damaged:
        files = f" and {found.damaged:,} damaged file{'s' if found.damaged > 1 else ''}" if found.damaged else ""
        yield f"{found.set_aside:,} samples{files} set aside, listed in {found.pool}/set_aside.txt"
    shards = f"{found.shards:,} shard{'s' if found.shards > 1 else ''}"
    already = "" if found.new else ", which were there already"
    yield f"{found.pool}: {found.rows:,} rows ({' and '.join(found.fields)}) in {shards}{already}"


def classes_embedded(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on class names that were embedded."""
    many = "a sentence" if found["templates"] == 1 else f"{found['templates']:,} sentences"
    yield f"{found['classes']:,} classes, {many} each, {found['dims']:,} dimensions"
    yield f"written to {found['out']} and {found['names']}"


# --- select ---------------------------------------------------------------------------------------


def kept(selection: Any, out: object) -> Iterator[str]:
    """Yield lines on a selection that was written."""
    repeated = f", {selection.uses:,} with repeats" if selection.repeats is not None else ""
    yield f"kept {len(selection):,} of {selection.total:,} rows ({len(selection) / selection.total:.1%}){repeated}"
    yield f"written to {out}"


def scored(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on scores that were written."""
    yield from found["notes"]
    yield (
        f"{found['rows']:,} of {found['of']:,} rows scored, {found['least']:.4f} to {found['most']:.4f}, "
        f"mean {found['mean']:.4f}"
    )
    yield f"written to {found['out']}"


def clustered(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on clusters that were written."""
    yield from found["notes"]
    yield (
        f"{found['clusters']:,} clusters of {found['smallest']:,} to {found['largest']:,} rows "
        f"({found['empty']:,} empty), mean cosine to the centroid {found['mean_cosine']:.4f}"
    )
    yield f"written to {found['out']}"


# --- explain --------------------------------------------------------------------------------------


def explanation(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on a row of a selection."""
    from thresher.selection import RoundedFloat

    fate = "dropped" if not found["kept"] else "kept" if found["uses"] == 1 else f"kept, used {found['uses']:,} times"
    yield f"row {found['row']:,}, key {found['key']}{_caption(found)}: {fate}"
    for number, step in enumerate(found["steps"], 1):
        package = f" ({step['package']})" if step["package"] else ""
        yield f"  {number}. {step['method']}{package}: {step['verdict']} - {step['reason'] or 'passes'}"
        if "score" in step and "history" not in step:
            cut = "" if step["cut"] is None else f" (cut at {RoundedFloat(step['cut']):.4f})"
            yield f"     {step['meaning']}: {RoundedFloat(step['score']):.4f}{cut}"
        if "history" in step and not step["reason"]:  # the reason of a dropped row says it already
            yield f"     {_history(step['history'])}"
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
            twin = step["duplicate"]
            fate = "kept" if twin["kept"] else "dropped"
            yield f"     duplicates row {twin['row']:,}, key {twin['key']}{_caption(twin)}, which was {fate}"
        if "reference" in step:
            known = step["reference"]
            key = f", key {known['key']}" if "key" in known else ""
            yield f"     repeats row {known['row']:,} of {known['pool']}{key}{_caption(known)}"


def run_explanation(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on a row of a training run."""
    epochs = f"{found['epochs']:,} epochs of training, {found['policy']}"
    yield f"row {found['row']:,}, key {found['key']}{_caption(found)}: {epochs}"
    yield f"  {_history(found['history'])}"
    yield f"  candidates were found in {found['searches']:,} of the epochs"


def _caption(row: Mapping[str, Any]) -> str:
    return f" \u201c{row['caption']}\u201d" if row.get("caption") else ""


def _history(found: Mapping[str, Any]) -> str:
    """Return what training recorded about a row, in one line."""
    if found["seen"] is None:
        seen = "never trained on"
    else:
        seen = f"last trained on in epoch {found['seen']}, with a loss of {found['loss']:.4f}"
    if not found["candidate"]:
        return f"never a candidate for pruning; {seen}"
    times = "once" if found["candidate"] == 1 else f"{found['candidate']:,} times"
    return f"a candidate for pruning {times}, last in epoch {found['last']} as {' and '.join(found['kinds'])}; {seen}"


def comparison(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on selections side by side."""
    for name, count in found["kept"].items():
        repeated = f", {found['uses'][name]:,} with repeats" if found["uses"][name] != count else ""
        yield f"{name}: {count:,} of {found['rows']:,} rows ({count / found['rows']:.1%}){repeated}"
    for pair in found["pairs"]:
        yield (
            f"{pair['a']} and {pair['b']}: {pair['both']:,} in both, {pair['only_a']:,} and {pair['only_b']:,} in one; "
            f"overlap {pair['overlap']:.1%} of the smaller, Jaccard {pair['jaccard']:.3f}"
        )
    if found["clusters"]:
        yield "clusters whose kept shares differ most:"
        for entry in found["clusters"]:
            counts = ", ".join(f"{name} {count:,}" for name, count in entry["kept"].items())
            yield f"  cluster {entry['cluster']} of {entry['size']:,} rows: {counts}"


def covariance_table(errors: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of covariance errors of selections, by name."""
    errors = {visible(name, limit=None): error for name, error in errors.items()}  # the width counts what is shown
    first = next(iter(errors.values()))
    inside = f"within {first.classes:,} clusters of {first.classed:,} rows"
    if first.within is None:
        inside = "pass --clusters DIR for the error within clusters"
    yield f"cross-covariance of image and text, relative error to the {first.rows:,} rows of the pool; {inside}:"
    width = max(map(len, ["not centred", *errors]))
    for title, names in (
        ("centred", ("overall", "within")),
        ("not centred", ("overall_uncentred", "within_uncentred")),
    ):
        shown = [name for name in names if getattr(first, name) is not None]
        heads = "".join(f"{name.split('_')[0]:>9}{'random':>9}{'ratio':>7}" for name in shown)
        yield f"  {title:{width}}{'rows':>14}{heads}" + ("" if first.within is None else f"{'lost':>7}")
        for name, error in errors.items():
            found = [getattr(error, each) for each in shown]
            cells = "".join(f"{_figure(d.error, 9, 4)}{_figure(d.random, 9, 4)}{_figure(d.ratio, 7, 2)}" for d in found)
            lost = "" if error.within is None else f"{error.classes_lost:7,}"
            yield f"  {name:{width}}{error.kept:14,}{cells}{lost}"


def _figure(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def reported(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line on a report that was written."""
    yield f"report: {found['report']} ({size(found['bytes'])})"


# --- train ----------------------------------------------------------------------------------------


def trained(out: str, log: Sequence[Mapping[str, Any]], asked: float | None) -> Iterator[str]:
    """Yield lines on a training run: its folder, its log, and the share to prune or None."""
    from thresher.train.data import SET_ASIDE
    from thresher.train.loop import table_of

    last = log[-1]
    seen, seconds = sum(e["samples"] for e in log), sum(e["seconds"] for e in log)
    pruned = last["pruned_so_far"]
    missed = f" ({asked:.1%} asked for)" if asked is not None and abs(asked - pruned) > 0.01 else ""
    yield f"{len(log)} epochs, {seen:,} samples in {seconds:,.0f} s, {pruned:.1%} of the rows pruned{missed}"
    for name, found in last.get("eval", {}).items():
        yield f"{name}:"
        yield from table_of(found)
    aside = Path(out, SET_ASIDE)
    if aside.exists():
        rows = len(aside.read_text(encoding="utf-8").splitlines())
        yield f"{rows:,} rows could not be used; they are listed in {aside}"
    yield f"written to {out}"


# --- write ----------------------------------------------------------------------------------------


def exported(done: Any) -> Iterator[str]:
    """Yield lines on an :class:`thresher.export.write.Exported`."""
    yield f"{done.rows:,} rows written to {done.path}"
    if done.missing:
        yield f"{done.missing:,} rows asked for were not found; they are listed in {done.missing_file}"
    if done.manifest:
        yield f"manifest: {done.manifest}"


def resharded(done: Any, data: str, out: str) -> Iterator[str]:
    """Yield lines on new shards."""
    files = {"webdataset": "tar", "parquet": "parquet file", "csv": "csv"}[done.form]
    files += "s" if done.shards > 1 else ""
    yield f"{done.samples:,} of {done.chosen:,} samples in {done.shards:,} {files}, found by {done.by}"
    if done.missing:
        yield f"{done.missing:,} keys are not in {data}; they are listed in {out}/missing.txt"
    if done.aside:
        yield f"{done.aside:,} files or samples could not be used; they are listed in {out}/set-aside.txt"
    yield f"written to {out}"


# --- cache ----------------------------------------------------------------------------------------


def cache_size(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line on the size of the cache."""
    yield f"{found['folder']}: {size(found['bytes'])} of at most {size(found['limit_bytes'])}"


def cache_cleared(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line on a cache that was cleared."""
    yield f"{size(found['removed_bytes'])} removed from {found['folder']}"


# --- figures --------------------------------------------------------------------------------------
