"""SQL conditions that users give: what they may contain, what they cost, and how DuckDB evaluates them.

Everything that is not known to be harmless is refused before any data is read. Memory and time are bounded from the
text of the condition and the size of the rows, because DuckDB limits neither while it evaluates a function.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError, suggest
from thresher.pruning.database import MEMORY, cursor
from thresher.pruning.functions import (
    ABOUT_NAN,
    ALLOWED,
    COPIES,
    CUT,
    FIXED,
    GROWTH,
    LIST,
    LIST_GROWTH,
    NAN_IN_NAN_OUT,
    PAIRWISE,
    PARTS,
    PATTERNS,
    REGULAR,
    SIZED,
    TEXT_TYPES,
    TYPES,
)
from thresher.runtime.duckdb_query import QueryTimeout, interruptible

Node = dict[str, Any]
Slot = tuple[Any, Any]  # a dict or list, and the key or index of a node in it

CHARACTERS = 100_000  # of a condition
DEPTH = 60  # of nested expressions; DuckDB reads trees of up to 256 nested objects
CLAUSES = 250  # with a number of their own; the others share the last one
SECONDS = 60.0  # for up to a batch of rows
_COPIED = 5_000  # expressions that DuckDB may add
_CONSTANT = 10**5  # bytes that a condition may add to a row
_ROW_MEMORY = 2 * MEMORY  # bytes for one row
_STEPS = 2 * 10**9  # elementary steps in one query, about a second each
_ROW_STEPS = 10 * _STEPS
_QUICK = 2 * 10**7  # steps and bytes that take no longer than a thread takes to start: some milliseconds
_WILDCARDS = 3  # in a pattern of LIKE or GLOB that DuckDB does not search from left to right
_SLOW_PATTERN = 50  # steps for each byte
_PROGRAM = 100_000  # the largest regular expression that DuckDB compiles, in instructions

_DEEP = f"is nested too deeply; at most {DEPTH} levels are allowed"
_TABLE = "pool rows"
_FLOATS = ("FLOAT", "DOUBLE")
_COMPARED = ("COMPARISON", "BETWEEN")
_OPERATORS = frozenset(
    "OPERATOR_NOT OPERATOR_IS_NULL OPERATOR_IS_NOT_NULL OPERATOR_COALESCE OPERATOR_TRY COMPARE_IN COMPARE_NOT_IN "
    "ARRAY_EXTRACT ARRAY_SLICE STRUCT_EXTRACT".split()
)
_CLASSES = frozenset("CONSTANT COLUMN_REF FUNCTION COMPARISON CONJUNCTION OPERATOR CASE CAST BETWEEN COLLATE".split())
_NAMED = {
    "SUBQUERY": "a sub-query",
    "WINDOW": "a window function",
    "STAR": "* or COLUMNS()",
    "PARAMETER": "a parameter ($1 or ?)",
    "LAMBDA": "a lambda (-> or a list comprehension)",
    "POSITIONAL_REFERENCE": "a column number such as #1",
}


@dataclass(frozen=True)
class Clause:
    """One of the conditions that ``AND`` joins: its text as DuckDB writes it, and its syntax tree."""

    text: str
    tree: Node


@dataclass(frozen=True)
class Condition:
    """A condition on the columns of one row; nothing else can be part of it.

    Attributes:
        where: Its text.
        clauses: Its clauses, at most :data:`CLAUSES`.
        columns: The columns that it names, sorted.
        sources: The columns, and parts of columns, that may be NaN where it uses them, as SQL.
    """

    where: str
    clauses: tuple[Clause, ...]
    columns: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The condition, shortened, as the start of a message."""
        return f"where = {_short(self.where)!r}"

    @classmethod
    def parse(cls, where: str) -> Condition:
        """Return a condition, split at its outermost ANDs.

        Raises:
            UsageError: It is not a condition on the columns of one row, it may use too much memory or time, or it
                contains something that is not known to be harmless.
        """
        if len(where) > CHARACTERS:
            raise _refused(
                where,
                f"has {len(where):,} characters; at most {CHARACTERS:,} are allowed. For a long list of values, join a "
                "column with --metadata and filter by it",
            )
        with cursor() as db:
            tree = _tree(db, where)
            root = _root(tree)
            _check(where, root)
            parts = _parts(root)
            if len(parts) > CLAUSES:
                rest = {**root, "children": parts[CLAUSES - 1 :]}
                parts = [*parts[: CLAUSES - 1], rest]
            clauses = [Clause(_sql(where, db, tree, [part]), part) for part in parts]
            stored = {_path(container[key]): container[key] for _, container, key in _uses(root)}
            sources = [_sql(where, db, tree, [node]) for path, node in stored.items() if path is not None]
        columns = {str(node["column_names"][0]) for node in _walk(root) if node.get("class") == "COLUMN_REF"}
        return cls(where, tuple(clauses), tuple(sorted(columns)), tuple(sources))

    def reasons(self) -> tuple[str, ...]:
        """Return the reason for each number that :meth:`Query.run` returns; they are templates, see ``Step``."""
        texts = [clause.text for clause in self.clauses]
        if len(parts := _parts(self.clauses[-1].tree)) > 1:
            texts[-1] = f"one of the last {len(parts)} clauses"
        return ("", *("fails: " + text.replace("{", "{{").replace("}", "}}") for text in texts))

    def query(self, db: Any, schema: Any, seconds: float = SECONDS) -> Query:
        """Return the query that evaluates the condition on rows of an Arrow schema.

        Raises:
            UsageError: The condition does not fit the types of the columns.
        """
        import duckdb
        import pyarrow as pa

        if wide := next((one for one in schema if pa.types.is_decimal256(one.type)), None):
            raise _refused(
                self.where, f"the column {wide.name!r} contains {wide.type}; convert it to decimal128 or text"
            )
        db.register(_TABLE, pa.Table.from_batches([], _readable(schema)))
        try:
            query = _query(self, db, seconds)
        except duckdb.Error as error:
            raise _refused(self.where, _first_line(error)) from None
        finally:
            db.unregister(_TABLE)
        return query


@dataclass(frozen=True)
class Query:
    """The query that evaluates a condition on rows of one schema.

    Attributes:
        condition: The condition.
        sql: The query.
        plain: The same for rows without NaN, which is faster; None if the condition may compute NaN.
        sources: Those of the condition's sources that are floating-point numbers.
        cost: Bounds of what it costs.
        seconds: Time limit of one evaluation.
    """

    condition: Condition
    sql: str
    plain: str | None
    sources: tuple[str, ...]
    cost: Cost
    seconds: float

    def run(self, db: Any, part: Any) -> tuple[npt.NDArray[np.uint8], dict[str, int]]:
        """Evaluate the rows of a record batch.

        NaN counts as a missing value: no comparison with it is true.

        Returns:
            The number (from 1) of the first clause that each row fails, 0 if none, (B,) uint8; and the number of rows
            that are NaN, by source.

        Raises:
            UsageError: A value cannot be evaluated, or evaluation takes too much memory or time.
        """
        import duckdb

        failed, missing = [np.empty(0, np.uint8)], dict.fromkeys(self.sources, 0)
        for rows in self._slices(part.cast(_readable(part.schema))):
            db.register(_TABLE, rows)
            try:
                plain = None if self.plain is None or _any_nan(rows) else self.plain
                query = partial(_fetched, db, plain or self.sql)
                quick = sum(self.cost.of(len(rows), _decoded_bytes(rows))) < _QUICK
                found = query() if quick else interruptible(db, query, seconds=self.seconds)
            except duckdb.Error as error:
                raise _refused(self.condition.where, f"cannot be evaluated: {_first_line(error)}") from None
            except QueryTimeout:
                raise _refused(
                    self.condition.where,
                    f"takes more than {self.seconds:g} s for {len(rows):,} rows; simplify the condition",
                ) from None
            finally:
                db.unregister(_TABLE)
            failed.append(np.asarray(found["failed"], np.uint8))
            for i, source in enumerate(() if plain else self.sources):
                missing[source] += int(np.count_nonzero(np.ma.filled(found[f"nan{i}"], False)))
        return np.concatenate(failed), missing

    def _slices(self, part: Any) -> Iterator[Any]:
        """Yield the rows in slices that are within the limits of memory and time."""
        n, size = len(part), _decoded_bytes(part)
        memory, steps = self.cost.of(n, size)
        if memory <= MEMORY and steps <= _STEPS or n == 1 and memory <= _ROW_MEMORY and steps <= _ROW_STEPS:
            yield part
        elif n == 1:
            need = f"{memory / 1e9:,.0f} GB of memory" if memory > _ROW_MEMORY else f"{steps:.0e} steps"
            raise _refused(
                self.condition.where,
                f"may take {need} for one row, whose values have {size:,} bytes; shorten the values first, as in "
                "left(text, 1000)",
            )
        else:
            yield from self._slices(part.slice(0, n // 2))
            yield from self._slices(part.slice(n // 2))


# --- the syntax tree ------------------------------------------------------------------------------


def _tree(db: Any, where: str) -> Node:
    """Return DuckDB's syntax tree of a query that selects the condition alone."""
    import duckdb

    hint = 'Put columns that are named like SQL keywords in double quotes: "group"'
    if "\0" in where or any("\ud800" <= letter <= "\udfff" for letter in where):
        raise _refused(where, "is not an SQL condition: it contains NUL or bytes that are not UTF-8")
    try:
        text = _scalar(db, "SELECT json_serialize_sql(?)", f"SELECT {where}" if where.strip() else "")
        tree: Node = json.loads(text)
    except RecursionError:
        raise _refused(where, _DEEP) from None
    except duckdb.Error as error:
        raise _refused(where, f"is not an SQL condition: {_first_line(error)}. {hint}") from None
    if tree.get("error"):
        message = str(tree.get("error_message"))
        if "expression depth" in message:
            raise _refused(where, _DEEP)
        raise _refused(where, f"is not an SQL condition: {_first_line(message)}. {hint}")
    nodes = [statement["node"] for statement in tree["statements"]]
    empty = _own_tree("true")["statements"][0]["node"]
    alone = len(nodes) == 1 and all(nodes[0].get(key) == empty[key] for key in empty if key != "select_list")
    if not alone or len(nodes[0]["select_list"]) != 1 or nodes[0]["select_list"][0].get("alias"):
        raise _refused(where, "give one condition on the columns of a row")
    return tree


@cache
def _own_tree(expression: str) -> Node:
    """Return the syntax tree of a query of our own; it must not be changed."""
    with cursor() as db:
        tree: Node = json.loads(_scalar(db, "SELECT json_serialize_sql(?)", f"SELECT {expression}"))
    return tree


def _root(tree: Node) -> Node:
    node: Node = tree["statements"][0]["node"]["select_list"][0]
    return node


def _sql(where: str, db: Any, tree: Node, nodes: Sequence[Node]) -> str:
    """Return expressions as SQL text, separated by commas."""
    import duckdb

    select = {**tree["statements"][0]["node"], "select_list": list(nodes)}
    whole = {**tree, "statements": [{**tree["statements"][0], "node": select}]}
    try:
        query = _scalar(db, "SELECT json_deserialize_sql(?)", json.dumps(whole))
    except (duckdb.SerializationException, RecursionError):
        raise _refused(where, _DEEP) from None
    return str(query).removeprefix("SELECT ").rstrip(";")


def _parts(node: Node) -> list[Node]:
    if node.get("type") != "CONJUNCTION_AND":
        return [node]
    return [part for child in node["children"] for part in _parts(child)]


def _slots(node: Node) -> list[Slot]:
    """Return the places of the expressions directly below one."""
    slots: list[Slot] = []
    left: list[Any] = [node]
    while left:
        container = left.pop()
        items = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        inner = []
        for key, value in items:
            if isinstance(value, dict) and "class" in value:
                slots.append((container, key))
            elif isinstance(value, dict | list):
                inner.append(value)
        left += reversed(inner)
    return slots


def _children(node: Node) -> list[Node]:
    return [container[key] for container, key in _slots(node) if container[key]["class"] != "TYPE"]


def _walk(node: Node) -> Iterator[Node]:
    left = [node]
    while left:
        node = left.pop()
        yield node
        left += _children(node)


def _name(node: Node) -> str:
    return str(node["function_name"]).lower()


def _literal(node: Node) -> str | None:
    """Return the text of a constant, None if an expression is not a constant."""
    if node.get("class") != "CONSTANT":
        return None
    value = node["literal"].get("text", "") if "literal" in node else node["value"].get("value", "")
    return str(value)


# --- what is allowed, and what it costs -----------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The bytes of a value: at most ``growth`` times those of the row, plus ``constant``; by default of a number."""

    growth: float = 0.0
    constant: float = 16.0

    def __add__(self, other: Size) -> Size:
        """Return the size of two values."""
        return Size(self.growth + other.growth, self.constant + other.constant)

    def times(self, growth: float, extra: float = 16.0) -> Size:
        """Return the size of a value that is up to ``growth`` times as large, plus ``extra``."""
        return Size(self.growth * growth, self.constant * growth + extra)


@dataclass
class Cost:
    """Bounds of the memory (bytes) and time (steps) that a condition takes: polynomials in the bytes of a row."""

    memory: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    steps: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    expressions: float = 0.0

    def add(self, size: Size, times: float, *, steps: float = 0.0) -> None:
        """Add a value that is computed ``times`` times, with some steps for each of its bytes."""
        self.memory[0] += times * (size.constant + 16)
        self.memory[1] += times * size.growth
        self.steps[0] += times * (1 + steps * size.constant)
        self.steps[1] += times * steps * size.growth

    def add_pairs(self, a: Size, b: Size, times: float, memory: float) -> None:
        """Add a comparison of each byte of one value with each byte of another."""
        pairs = (a.constant * b.constant, a.constant * b.growth + b.constant * a.growth, a.growth * b.growth)
        for i, number in enumerate(pairs):
            self.steps[i] += times * number
            self.memory[i] += times * memory * number

    def of(self, rows: int, size: int) -> tuple[float, float]:
        """Return the bounds of memory and steps for some rows with this many bytes together."""
        powers = (rows, size, size * size)
        memory, steps = (sum(p * c for p, c in zip(powers, of, strict=True)) for of in (self.memory, self.steps))
        return memory, steps


def _check(where: str, root: Node) -> None:
    """Raise a UsageError if a condition has a part that is not allowed, is nested too deeply or costs too much."""
    written, level = 0, [root]
    for _ in range(DEPTH):
        written += len(level)
        level = [child for node in level for child in _children(node)]
    if level:
        raise _refused(where, _DEEP)
    for node in _walk(root):
        _allowed(where, node)
    cost = _cost(where, root)
    if cost.expressions > written + _COPIED:
        raise _refused(where, "nests least, greatest or aspect too deeply")


def _allowed(where: str, node: Node) -> None:
    """Raise a UsageError unless an expression is known to depend on one row alone."""
    kind = node["class"]
    if kind not in _CLASSES or kind == "OPERATOR" and node["type"] not in _OPERATORS:
        what = _NAMED.get(kind) or str(node["type"]).lower().replace("_", " ")
        raise _refused(where, f"{what} is not allowed in a filter")
    if kind == "CAST":
        for name in _type_names(node):
            if name.upper() not in TYPES | {"LIST"}:
                raise _refused(where, f"a cast to {name} is not allowed in a filter; cast to a number, text or time")
    if kind != "FUNCTION":
        return
    name, arguments = _name(node), _children(node)
    plain = node.get("schema") in (None, "", "main")  # DuckDB 1 writes [1, 2] as main.list_value(1, 2)
    plain &= not (node.get("catalog") or node.get("distinct") or node.get("filter"))
    plain &= not (node.get("order_bys") or {}).get("orders") and not node.get("export_state")
    if not plain and name in ALLOWED:
        raise _refused(where, f"call {name} as {name}(...), without a prefix, DISTINCT, FILTER or ORDER BY")
    if name == "age" and len(arguments) == 1:  # counts up to now
        raise _refused(where, "age(t) is not allowed in a filter, because it depends on the clock; use age(t, since)")
    if name in ALLOWED:
        return
    if name in _functions():
        raise _refused(where, f"{name} is not allowed in a filter; a condition may only use the values of one row")
    words = sorted(one for one in ALLOWED if one[0].isalpha())
    raise _refused(where, f"there is no function {name!r} that a filter may use.{suggest(name, words)}")


@cache
def _functions() -> frozenset[str]:
    """Return the names of all functions of DuckDB."""
    with cursor() as db:
        names = db.execute("SELECT DISTINCT lower(function_name) FROM duckdb_functions()").fetchall()
    return frozenset(name for (name,) in names)


def _type_names(cast: Node) -> list[str]:
    """Return the names of the types that make up the type of a cast."""
    if "type_expr" not in cast:  # DuckDB 1
        names, kind = [], cast["cast_type"]
        while kind:
            info = kind.get("type_info") or {}
            names.append(str(info.get("name") or info.get("user_type_name") or kind["id"]))
            kind = info.get("child_type")
        return names
    names, left = [], [cast["type_expr"]]
    while left:
        kind = left.pop()
        if kind.get("class") == "TYPE":
            names.append(str(kind["type_name"] if not kind.get("schema") else f"{kind['schema']}.{kind['type_name']}"))
            left += kind.get("children", [])
    return names


def _cost(where: str, root: Node) -> Cost:
    """Return bounds of the cost of an expression.

    Raises:
        UsageError: The size of a value is not bounded, or too large.
    """
    cost = Cost()
    _size(where, root, cost, 1.0)
    if cost.memory[0] > 10 * _CONSTANT or cost.steps[0] > _STEPS / 20:
        raise _refused(where, "takes too much memory or time for each row; repeat, pad or compare shorter texts")
    return cost


def _size(where: str, node: Node, cost: Cost, times: float) -> Size:
    """Return the size of a value, and add what it takes to compute it, so many times, to the cost."""
    cost.expressions += times
    if (text := _literal(node)) is not None:
        cost.steps[0] += times
        return Size(0, len(text.encode("utf-8", "replace")))
    if node["class"] == "COLUMN_REF":
        cost.steps[0] += times
        return Size(1, 0)
    name = _name(node) if node["class"] == "FUNCTION" else ""
    children = _children(node)
    copies = times * COPIES.get(name, 1)
    if cost.expressions + copies > 10**6:
        raise _refused(where, "nests least, greatest or aspect too deeply")
    sizes = [_size(where, child, cost, copies) for child in children]
    total = sum(sizes, Size(0, 0))
    if node["class"] == "FUNCTION":
        size = _size_of_call(where, name, children, sizes, total)
        if name in PAIRWISE and len(sizes) > 1:
            cost.add_pairs(sizes[0], sizes[1], times, PAIRWISE[name])
        if name in REGULAR:
            cost.add(sizes[0], times, steps=_program(children[1] if len(children) > 1 else None))
        if name in PATTERNS and _is_slow(where, name, children):
            cost.add(sizes[0], times, steps=_SLOW_PATTERN)
        if name == "words":
            cost.add(sizes[0].times(9), times)
    elif node["class"] == "CAST":
        names = [kind.upper() for kind in _type_names(node)]
        size = (
            total.times(LIST_GROWTH if "LIST" in names else GROWTH, 64) if {*names} & {*TEXT_TYPES, "LIST"} else Size()
        )
    elif node["class"] in ("CASE", "COLLATE") or node["type"].endswith(("COALESCE", "TRY", "EXTRACT", "SLICE")):
        size = total.times(GROWTH if node["class"] == "COLLATE" else 1)
    else:
        size = Size()
    cost.steps[0] += times * total.constant
    cost.steps[1] += times * total.growth
    if size.constant > _CONSTANT:
        what = f"{name}(...)" if name else "an expression"
        raise _refused(
            where, f"{what} makes values of up to {size.constant:,.0f} bytes; at most {_CONSTANT:,} are allowed"
        )
    cost.add(size, times)
    return size


def _size_of_call(where: str, name: str, arguments: list[Node], sizes: list[Size], total: Size) -> Size:
    """Return the size of the result of a function."""
    if name in FIXED or name == "number_or_null":
        return Size()
    if name in LIST:
        return total.times(LIST_GROWTH)
    if name.startswith("json_extract") or name in ("->>", "json_value"):
        path = _literal(arguments[1]) if len(arguments) > 1 else ""
        if path is None or "*" in path or ".." in path:
            raise _refused(where, f"{name} needs a constant path without * and ..")
    if name in CUT and len(arguments) > CUT[name] and (length := _literal(arguments[CUT[name]]) or "-").isdecimal():
        return Size(0, 4 * float(length))
    if name not in SIZED:
        return total if name in PARTS else total.times(GROWTH, 64)

    def constant(i: int, what: str) -> str:
        text = _literal(arguments[i]) if len(arguments) > i else ""
        if text is None:
            raise _refused(where, f"{name} needs a constant as its {what}, so that the size of the result is known")
        return text

    def number(i: int, what: str) -> float:
        text = constant(i, what)
        try:
            return max(float(text), 0.0)
        except ValueError:
            raise _refused(where, f"{name} needs a number as its {what}") from None

    if name == "repeat":
        return sizes[0].times(number(1, "second argument")) if sizes else total
    if name in ("lpad", "rpad"):
        return Size(0, 4 * number(1, "second argument") + 16)
    if name == "replace":
        old, new = constant(1, "second argument"), constant(2, "third argument")
        return sizes[0].times(max(math.ceil(len(new.encode()) / max(len(old.encode()), 1)), 1)) if sizes else total
    if name == "regexp_replace":
        new = constant(2, "third argument")
        return sizes[0].times(1 + len(new.encode()) + new.count("\\"), 16 + len(new.encode())) if sizes else total
    if name == "array_to_string":
        return total.times(GROWTH + len(constant(1, "second argument").encode()))
    layout = constant(0, "first argument")  # format, printf
    if re.search(r"\{[^}]*\{", layout) if name == "format" else re.search(r"%[^a-zA-Z%]*\*", layout):
        raise _refused(where, f"{name} needs constant widths")
    widths = sum(float(digits) for digits in re.findall(r"\d+", layout))
    return total.times(GROWTH, 4 * widths + 512 * len(arguments))


def _is_slow(where: str, name: str, arguments: list[Node]) -> bool:
    """Return whether DuckDB matches a pattern of LIKE or GLOB by trying all places of its wildcards.

    Raises:
        UsageError: It has too many wildcards for that, or is not a constant.
    """
    pattern = _literal(arguments[1]) if len(arguments) > 1 else ""
    if pattern is None:
        raise _refused(where, "LIKE and GLOB need a constant pattern; use contains(text, other) or starts_with")
    if name in ("~~", "!~~") and "_" not in pattern:
        return False
    if len(re.findall(re.escape(PATTERNS[name]) + "+", pattern)) > _WILDCARDS:
        raise _refused(
            where,
            f"the pattern {_short(pattern)!r} has more than {_WILDCARDS} {PATTERNS[name]}, which only LIKE without _ "
            "may have; use regexp_matches",
        )
    return True


def _program(pattern: Node | None) -> float:
    """Return a bound of the instructions of a compiled regular expression."""
    text = _literal(pattern) if pattern is not None else ""
    if text is None:
        return _PROGRAM
    size = float(len(text) + 1)
    for numbers in re.findall(r"\{([\d,\s]+)\}", text):
        size *= max([1.0, *(float(number) for number in re.findall(r"\d+", numbers))])
        if size > _PROGRAM:
            break
    return min(size, _PROGRAM)


# --- NaN, and the query ---------------------------------------------------------------------------


def _query(condition: Condition, db: Any, seconds: float) -> Query:
    """Return the query for the registered table, in which NaN counts as missing.

    DuckDB treats NaN as the largest number, and as true. Here each floating-point value that is not an argument of a
    function of numbers is replaced by NULL if it is NaN: the columns, and what is computed from them.
    """
    roots = [copy.deepcopy(clause.tree) for clause in condition.clauses]
    uses = [use for root in roots for use in _uses(root)]
    values = [*roots, *(container[key] for _, container, key in uses)]
    kinds = _types(condition, db, values)
    kind_of = {id(node): kind for node, kind in zip(values, kinds, strict=True)}
    for clause, kind in zip(condition.clauses, kinds, strict=False):
        if kind != "BOOLEAN":
            raise _refused(
                condition.where,
                f"{_short(clause.text)} is {_short(kind)}, not true or false; compare it with something",
            )
    for node in values:
        _check_comparison(condition.where, node, kind_of)
    tree, wrapper = _own_tree("true"), _root(_own_tree("number_or_null(x)"))
    sources: dict[Any, Node] = {}
    computed = False
    for parent, container, key in uses:
        node = container[key]
        name = _name(parent) if parent["class"] == "FUNCTION" else ""
        if kind_of[id(node)] not in _FLOATS or name in ABOUT_NAN:
            continue
        path = _path(node)
        if path is not None:
            sources.setdefault(path, node)
        computed |= path is None or len(path) > 1
        if name not in NAN_IN_NAN_OUT or kind_of[id(parent)] not in _FLOATS:
            container[key] = call = copy.deepcopy(wrapper)
            (inside, at), *_ = _slots(call)
            inside[at] = node
    costs = [_cost(condition.where, root) for root in roots]
    if sum(cost.expressions for cost in costs) > sum(1 for root in roots for _ in _walk(root)) + _COPIED:
        raise _refused(condition.where, "nests comparisons of numbers too deeply")
    cost = Cost()
    for one in costs:
        cost.memory = [a + b for a, b in zip(cost.memory, one.memory, strict=True)]
        cost.steps = [a + b for a, b in zip(cost.steps, one.steps, strict=True)]
    names = [_sql(condition.where, db, tree, [node]) for node in sources.values()]
    flags = "".join(f", isnan({name}) AS nan{i}" for i, name in enumerate(names))
    return Query(
        condition,
        _cases([_sql(condition.where, db, tree, [root]) for root in roots], flags),
        None if computed else _cases([clause.text for clause in condition.clauses]),
        tuple(names),
        cost,
        seconds,
    )


def _cases(clauses: list[str], more: str = "") -> str:
    cases = " ".join(f"WHEN NOT coalesce(({clause}), false) THEN {i + 1}" for i, clause in enumerate(clauses))
    return f'SELECT (CASE {cases} ELSE 0 END)::UTINYINT AS failed{more} FROM "{_TABLE}"'


def _uses(root: Node) -> list[tuple[Node, Any, Any]]:
    """Return for each value below an expression, except constants: its parent, and its place."""
    uses, left = [], [root]
    while left:
        parent = left.pop()
        for container, key in _slots(parent):
            if container[key]["class"] not in ("CONSTANT", "TYPE"):
                uses.append((parent, container, key))
                left.append(container[key])
    return uses


def _types(condition: Condition, db: Any, nodes: list[Node]) -> list[str]:
    """Return the type of each expression, as DuckDB names it."""
    if sum(sum(1 for _ in _walk(node)) for node in nodes) > CHARACTERS:
        raise _refused(condition.where, "is too long and nested too deeply; make it shorter")
    text = _sql(condition.where, db, _own_tree("true"), nodes)
    return [str(kind).strip('"') for kind in db.sql(f'SELECT {text} FROM "{_TABLE}"').types]


def _check_comparison(where: str, node: Node, kind_of: dict[int, str]) -> None:
    """Raise a UsageError for comparisons in which NaN would not count as missing."""
    if node["class"] not in _COMPARED and node["type"] not in ("COMPARE_IN", "COMPARE_NOT_IN"):
        return
    children = _children(node)
    kinds = [kind_of.get(id(child), "") for child in children]
    ordered = node["type"] not in ("COMPARE_EQUAL", "COMPARE_NOTEQUAL", "COMPARE_IN", "COMPARE_NOT_IN")
    for kind in kinds:
        if kind.endswith("]") or "(" in kind and not kind.startswith(("DECIMAL", "ENUM")) or kind == "VARIANT":
            if ordered or any(name in kind for name in _FLOATS):
                raise _refused(where, f"compare single values, not {_short(kind)}: as in a > 1 AND b > 2, or l[1] > 2")
    if any(kind in _FLOATS for kind in kinds) and any(
        (text := _literal(child)) is not None and re.fullmatch(r"\s*[+-]?nan\s*", text, re.IGNORECASE)
        for child in children
    ):
        raise _refused(where, "no number equals NaN, and none is below or above it; use isnan(x)")


def _path(node: Node) -> tuple[str, ...] | None:
    """Return what identifies a column, or a part of a column that constants name; None for other expressions."""
    path: list[str] = []
    while node["class"] == "OPERATOR" and node["type"] in ("ARRAY_EXTRACT", "STRUCT_EXTRACT"):
        node, *inner = _children(node)
        names = [_literal(one) for one in inner]
        if None in names:
            return None
        path = [*map(repr, names), *path]
    return (*node["column_names"], *path) if node["class"] == "COLUMN_REF" else None


# --- rows -----------------------------------------------------------------------------------------


def _readable(schema: Any) -> Any:
    """Return a schema with types that DuckDB reads: float32 for float16."""
    import pyarrow as pa

    return pa.schema(
        [one.with_type(pa.float32()) if pa.types.is_float16(one.type) else one.remove_metadata() for one in schema]
    )


def _decoded_bytes(part: Any) -> int:
    """Return the bytes of the values of a record batch; a repeated value of a dictionary counts each time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size = 8 * len(part) * part.num_columns
    for column in part.columns:
        if not pa.types.is_dictionary(column.type):
            size += column.nbytes
        elif pa.types.is_primitive(column.type.value_type):
            size += 16 * len(column)
        else:
            try:
                lengths = pc.binary_length(column.dictionary)
            except pa.ArrowNotImplementedError:  # of lists
                size += len(column) * column.dictionary.nbytes
            else:
                size += pc.sum(pc.take(lengths, column.indices).cast(pa.int64())).as_py() or 0
    return int(size)


def _scalar(db: Any, query: str, parameter: str) -> Any:
    return db.execute(query, [parameter]).fetchall()[0][0]


def _any_nan(part: Any) -> bool:
    """Return whether a floating-point column of a record batch has NaN, or may have it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for column in part.columns:
        if pa.types.is_floating(column.type):
            if pc.any(pc.is_nan(column)).as_py():
                return True
        elif pa.types.is_dictionary(column.type) and pa.types.is_floating(column.type.value_type):
            return True
    return False


def _fetched(db: Any, sql: str) -> dict[str, Any]:
    found: dict[str, Any] = db.execute(sql).fetchnumpy()
    return found


# --- messages -------------------------------------------------------------------------------------


def _refused(where: str, why: str) -> UsageError:
    return UsageError(f"where = {_short(where)!r}: {why}")


def _short(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 20]} ... {text[-15:]}"


def _first_line(error: object) -> str:
    return _short((str(error).splitlines() or [""])[0], 300)
