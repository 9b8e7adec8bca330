"""Filter by an SQL condition on the metadata columns, evaluated by DuckDB.

``words(text) > 2 AND characters(text) > 5 AND least(original_width, original_height) >= 200 AND
aspect(original_width, original_height) <= 3`` is DataComp's basic filter without its test for English. A
condition that is NULL because a value is missing drops the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError, suggest
from thresher.select.database import MACROS, cursor
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.selection import Selection

# DuckDB's macros that depend on one row only; its others depend on several rows, the session or the clock.
_ROW_MACROS = re.compile(
    r"(list|array|map)_\w+|if|nullif|split_part|fmod|fdiv|date_add|days_in_month|json|md5_number_\w+"
)
# Functions that DuckDB's list does not mark: they make several rows of one, or read the environment.
_FOREIGN = {"unnest", "unlist", "getenv", "getvariable", "current_setting"}


@method("filter")
@dataclass(frozen=True, kw_only=True)
class Filter:
    """Keep rows whose metadata satisfies an SQL condition."""

    where: str = field(
        metadata={
            "metavar": "SQL",
            "help": "SQL condition on metadata columns; also words(t), characters(t), aspect(w, h)",
        }
    )

    def __post_init__(self) -> None:
        """Validate the condition: it must parse, and depend on the row alone."""
        _ = self._parsed

    @cached_property
    def _parsed(self) -> list[tuple[str, list[str]]]:
        """The text and the columns of each clause."""
        return _clauses(self.where)

    def select(self, run: Run) -> Selection:
        """Evaluate clause by clause, so that each dropped row records the clause that it fails."""
        import duckdb

        clauses = self._parsed
        columns = sorted({name for _, names in clauses for name in names})
        known = {name.lower(): name for name in run.store.columns}
        if not known:
            raise UsageError(f"{run.store.layout.location} has no metadata to filter by")
        for name in columns:
            alike = [other for other in run.store.columns if other.lower() == name.lower()]
            if len(alike) > 1:
                raise UsageError(f"where = {self.where!r}: the columns {', '.join(alike)} differ only in case")
            if name.lower() not in known:
                raise UsageError(
                    f"where = {self.where!r}: no metadata column {name!r}; {run.store.layout.location} has "
                    f"{', '.join(run.store.columns) or 'no metadata'}.{suggest(name, run.store.columns)}"
                )
        failed = run.cache.columns(
            "filter",
            run.key(_failed, clauses=[text for text, _ in clauses], duckdb=duckdb.__version__),
            {"failed": "uint8"},
            len(run.store),
            lambda start: _failed(run, clauses, [known[name.lower()] for name in columns], start),
        )["failed"]
        mask = np.asarray(failed) == 0
        notes = []
        if run.store.options.metadata and (alone := int(np.count_nonzero(run.store.column("joined") == 0))):
            notes.append(f"{alone:,} rows have no match in {run.store.options.metadata}: its columns are empty there")
        return run.selection(
            self,
            mask,
            notes=notes,
            reasons=("", *("fails: " + text.replace("{", "{{").replace("}", "}}") for text, _ in clauses)),
            rows={"code": failed},
        )


def _failed(
    run: Run, clauses: list[tuple[str, list[str]]], columns: list[str], start: int
) -> Iterator[tuple[npt.NDArray[np.uint8]]]:
    """Yield, batch by batch, the number (from 1) of the first clause that each row fails, 0 if none."""
    import duckdb

    cases = " ".join(f"WHEN NOT coalesce(({text}), false) THEN {i + 1}" for i, (text, _) in enumerate(clauses))
    done = 0
    with cursor() as db, run.progress.task("filter", len(run.store)) as advance:
        for _, part in run.store.scan(columns or list(run.store.columns[:1])):
            advance(len(part))
            done += len(part)
            if done <= start:
                continue
            db.register("part", part)
            try:
                result = db.execute(f"SELECT (CASE {cases} ELSE 0 END)::UTINYINT AS failed FROM part").fetchnumpy()
            except duckdb.Error as error:
                raise UsageError(f"cannot evaluate the condition: {str(error).splitlines()[0]}") from None
            db.unregister("part")
            if len(result["failed"]) != len(part):
                raise UsageError("the condition changes the number of rows; it must give one value per row")
            yield (np.asarray(result["failed"], np.uint8),)


def _clauses(where: str) -> list[tuple[str, list[str]]]:
    """Split a condition at its outermost ANDs; return the text and columns of each clause.

    Raises:
        UsageError: It is not a single condition on the columns of one row.
    """
    with cursor() as db:
        tree = _tree(db, f"SELECT {where}" if where.strip() else "")
        if tree.get("error"):
            raise UsageError(
                f"where = {where!r} is not an SQL condition: {tree.get('error_message')}. Put columns that are named "
                'like SQL keywords in double quotes: "group"'
            )
        nodes = [statement["node"] for statement in tree["statements"]]
        bare = _tree(db, "SELECT 1")["statements"][0]["node"]
        plain = len(nodes) == 1 and all(nodes[0].get(key) == bare[key] for key in bare if key != "select_list")
        if not plain or len(nodes[0]["select_list"]) != 1 or nodes[0]["select_list"][0].get("alias"):
            raise UsageError(f"where = {where!r}: give one condition on the columns of a row")
        root = nodes[0]["select_list"][0]
        parts = _parts(root)
        if len(parts) > 250:
            raise UsageError(f"where has {len(parts)} clauses; at most 250")
        clauses = []
        for part in parts:
            forbidden = {"SUBQUERY", "WINDOW", "STAR", "PARAMETER", "LAMBDA", "LAMBDA_REF"} & set(_classes(part))
            if forbidden:
                raise UsageError(
                    f"where = {where!r}: {', '.join(sorted(forbidden)).lower()} is not allowed in a filter"
                )
            for function, arguments in sorted(set(_functions(part))):
                _plain(db, where, function, arguments)
            nodes[0]["select_list"] = [part]
            query = db.execute("SELECT json_deserialize_sql(?)", [json.dumps(tree)]).fetchone()[0]
            clauses.append((query.removeprefix("SELECT ").rstrip(";"), sorted(set(_columns(part)))))
    return clauses


def _tree(db: Any, query: str) -> dict[str, Any]:
    import duckdb

    try:
        tree: dict[str, Any] = json.loads(db.execute("SELECT json_serialize_sql(?)", [query]).fetchone()[0])
    except duckdb.Error as error:
        return {"error": True, "error_message": str(error).splitlines()[0]}
    return tree


def _parts(node: dict[str, Any]) -> list[dict[str, Any]]:
    if node.get("type") != "CONJUNCTION_AND":
        return [node]
    return [part for child in node["children"] for part in _parts(child)]


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def _plain(db: Any, where: str, function: str, arguments: int) -> None:
    """Refuse functions of several rows, and functions whose value depends on more than the row."""
    # DuckDB 2 treats functions of the session's time zone as not constant; here the time zone is fixed.
    known = """
        SELECT function_type, coalesce(stability, 'CONSISTENT') FROM duckdb_functions()
        WHERE function_name = ? AND NOT regexp_matches(parameter_types::VARCHAR, 'TIME ZONE|TIMESTAMPTZ')
    """
    kinds = db.execute(known, [function]).fetchall()
    own = function in re.findall(r"CREATE MACRO (\w+)", MACROS)
    plain = bool(kinds) and all(
        stability == "CONSISTENT" and (kind == "scalar" or (kind == "macro" and _ROW_MACROS.fullmatch(function)))
        for kind, stability in kinds
    )
    clock = function == "age" and arguments == 1  # age(t) counts up to now
    if function in _FOREIGN or clock or not (own or plain):
        raise UsageError(
            f"where = {where!r}: {function} is not allowed in a filter; a condition may only use columns of the row"
        )


def _functions(node: dict[str, Any]) -> Iterator[tuple[str, int]]:
    return (
        (str(part["function_name"]).lower(), len(part.get("arguments", part.get("children", ()))))
        for part in _walk(node)
        if part.get("class") == "FUNCTION"
    )


def _classes(node: dict[str, Any]) -> Iterator[str]:
    return (str(part["class"]) for part in _walk(node) if "class" in part)


def _columns(node: dict[str, Any]) -> Iterator[str]:
    return (part["column_names"][0] for part in _walk(node) if part.get("class") == "COLUMN_REF")
