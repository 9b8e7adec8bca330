"""Selections: which rows are kept, and why each of the others was dropped.

A selection is a mask over the rows of a store (or a repeat count per row), the fingerprint of the store, and the
chain of steps that produced it, each with its parameters, counts and evidence.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.errors import BudgetError, OutputError, PoolError, UsageError
from thresher.runtime.files import DAMAGED, refuse_foreign_files
from thresher.runtime.results import Say, exists_already, result_folder

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

FORMAT = 1
FILES = ("selection.json", "mask.npy", "dropped_by.npy", "repeats.npy", "steps")


@dataclass(frozen=True)
class Keep:
    """A budget: a share of the input rows, or a number of rows.

    ``Keep.parse`` accepts ``"30%"``, ``"0.3"`` / ``0.3`` (strictly between 0 and 1) and integers (``3_000_000``).
    ``1.0`` is rejected because it is ambiguous: it could mean one row or all rows.
    """

    share: Fraction | None = None
    count: int | None = None

    @classmethod
    def parse(cls, value: str | int | float | Keep) -> Keep:
        """Parse a budget.

        Raises:
            UsageError: The value is not a valid budget; the message says what is allowed.
        """
        if isinstance(value, Keep):
            return value
        hint = "give a share like 30% or 0.3 (strictly between 0 and 1), or a number of rows like 3_000_000"
        if isinstance(value, bool):
            raise UsageError(f"cannot keep {value!r}; {hint}")
        if isinstance(value, int):
            if value < 1:
                raise UsageError(f"cannot keep {value:,} rows; {hint}")
            return cls(count=value)
        text = str(value).strip()
        if re.fullmatch(r"\d{1,18}|\d{1,3}(_\d{3})+", text):
            return cls.parse(int(text))
        number = text.removesuffix("%").strip()
        if not re.fullmatch(r"(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,3})?", number):
            raise UsageError(f"cannot read {text!r} as an amount to keep; {hint}")
        share = Fraction(Decimal(number))
        if text.endswith("%"):
            share /= 100
            if not 0 < share <= 1:
                raise UsageError(f"cannot keep {text}; {hint}")
        elif not 0 < share < 1:
            ends = "for all rows write 100%, for one row write 1; " if share == 1 else ""
            raise UsageError(f"cannot keep {text}: {ends}{hint}")
        return cls(share=share)

    def of(self, rows: int, *, repeats: bool = False) -> int:
        """Return the exact number of rows to keep out of ``rows``; shares are rounded down.

        Args:
            rows: Number of available rows.
            repeats: Whether a row may count more than once, so that the result may exceed ``rows``.

        Raises:
            BudgetError: The budget exceeds ``rows``, or a share comes to less than one row.
        """
        count = self.count if self.count is not None else int(self.share * rows) if self.share else 0
        if count > rows and not repeats:
            raise BudgetError(f"cannot keep {count:,} rows of the {rows:,} available")
        if count == 0:
            raise BudgetError(f"{self} of {rows:,} rows is less than one row; keep more")
        return count

    def __str__(self) -> str:
        """Return the budget as a user would write it."""
        if self.share is None:
            return str(self.count)
        percent = self.share * 100
        exact = f"{float(percent):.10f}".rstrip("0").rstrip(".")
        return f"{exact}%" if Fraction(Decimal(exact)) == percent else f"{float(percent)!r}%"


class RoundedFloat(float):
    """A float whose fixed-point format never shows a small value as 0: it switches to significant digits instead."""

    def __format__(self, spec: str) -> str:
        """Format like a float, except for small values with a specification such as ``.4f``."""
        return format(float(self), ".3g" if spec.endswith("f") and 0 < abs(self) < 5e-4 else spec)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step of a chain.

    Attributes:
        method: Name of the method.
        parameters: Parameters including defaults, as JSON values.
        seed: Random seed.
        rows_in: Number of input rows.
        rows_out: Number of kept rows.
        reasons: Templates for the reason why a row was dropped, filled from its evidence by name
            (``{score}``, ``{cut}``, ``{duplicate_of}``, ``{cluster}``, ``{quota}``, ``{size}``,
            ``{reference_key}``). If there are several, the row's evidence "code" is the index of the one that applies.
        score: Description of the score; "" if the method has none.
        cut: The score threshold, if there is a single one.
        version: Version of thresher that made the step.
        package: The package that provides the method, {"name", "version"}.
        notes: Information for the user, such as why a number was chosen.
        rows: Evidence per input row, (rows_in,): "score" float32, "duplicate_of" int64, "cluster" int32,
            "code" uint8, "reference" int64 (the row of a reference pool that a dropped row repeats, else -1).
        groups: Evidence per cluster, (K,): "size", "quota", "kept", "complexity", "d_intra", "d_inter",
            "name" (text).
        reference: Evidence per row of a reference pool that a dropped row repeats: "row" (H,) int64, its row number
            there, ascending; "key" and "caption", text as :func:`packed` with "key_ends" and "caption_ends".
    """

    method: str
    parameters: Mapping[str, Any]
    seed: int
    rows_in: int
    rows_out: int
    reasons: tuple[str, ...]
    score: str = ""
    cut: float | None = None
    version: str = __version__
    notes: tuple[str, ...] = ()
    rows: Mapping[str, Array] = field(default_factory=dict)
    groups: Mapping[str, Array] = field(default_factory=dict)
    reference: Mapping[str, Array] = field(default_factory=dict)
    package: Mapping[str, str] = field(default_factory=lambda: {"name": "thresher", "version": __version__})

    @property
    def foreign(self) -> str:
        """Name and version of the package that provides the method, "" for thresher itself."""
        name, version = self.package["name"], self.package["version"]
        return "" if name == "thresher" else f"{name} {version}".strip()

    def why(self, i: int) -> str:
        """Return why row ``i`` of the input rows was dropped."""
        template = self.reasons[int(self.rows["code"][i]) if "code" in self.rows else 0]
        values = {name: self._value(name, i) for name in _names(template)}
        return template.format(**{k: RoundedFloat(v) if isinstance(v, float) else v for k, v in values.items()})

    def _value(self, name: str, i: int) -> Any:
        if name == "cut":
            return self.cut
        if name in self.rows:
            return self.rows[name][i].item()
        if name.startswith("reference_"):
            return (self.repeated(i) or {}).get(name.removeprefix("reference_"))
        return self.groups[name][int(self.rows["cluster"][i])].item()

    def repeated(self, i: int) -> dict[str, Any] | None:
        """Return the row of a reference pool that row ``i`` of the input rows repeats.

        Returns:
            A dictionary with "row", the row number in the reference pool, and "key" and "caption" if the reference
            pool has them; None if the row was not dropped as a repeat of a reference row.
        """
        row = int(self.rows["reference"][i]) if "reference" in self.rows else -1
        if row < 0:
            return None
        at = int(np.searchsorted(self.reference["row"], row))
        texts = {
            name: _unpacked(self.reference[name], self.reference[f"{name}_ends"], at)
            for name in ("key", "caption")
            if name in self.reference
        }
        return {"row": row, **texts}

    def header(self) -> dict[str, Any]:
        """Return everything except the arrays, as JSON values."""
        return {
            "method": self.method,
            "parameters": dict(self.parameters),
            "seed": self.seed,
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "score": self.score,
            "cut": self.cut,
            "version": self.version,
            "package": dict(self.package),
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "rows": sorted(self.rows),
            "groups": sorted(self.groups),
            "reference": sorted(self.reference),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Which rows of a store are kept, and which step dropped each of the others.

    Attributes:
        store: Fingerprint of the store; selections of different stores cannot be combined.
        pool: Location of the pool, to look up keys and captions later.
        options: Options with which the pool was opened.
        dropped_by: (N,) int16: index of the step that dropped the row, -1 for kept rows.
        steps: The chain of steps.
        repeats: (N,) int32, how often each kept row is used, 0 for dropped rows; None if each is used once.
    """

    store: str
    pool: str
    options: Mapping[str, Any]
    dropped_by: npt.NDArray[np.int16]
    steps: tuple[Step, ...] = ()
    repeats: npt.NDArray[np.int32] | None = None

    @classmethod
    def everything(cls, store: str, pool: str, options: Mapping[str, Any], rows: int) -> Selection:
        """Return the selection of all rows, before any step."""
        return cls(store=store, pool=pool, options=options, dropped_by=np.full(rows, -1, np.int16))

    def mask(self) -> Bools:
        """Return (N,) bool, True for kept rows."""
        return np.asarray(self.dropped_by == -1, np.bool_)

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the global ids of the kept rows, ascending."""
        return np.flatnonzero(self.dropped_by == -1)

    def __len__(self) -> int:
        """Number of kept rows."""
        return int(np.count_nonzero(self.dropped_by == -1))

    @property
    def total(self) -> int:
        """N, the number of rows of the store."""
        return len(self.dropped_by)

    @property
    def uses(self) -> int:
        """Number of kept rows, each counted as often as it is used."""
        return len(self) if self.repeats is None else int(self.repeats.sum(dtype=np.int64))

    def given(self, step: int) -> npt.NDArray[np.int64]:
        """Return the global ids of the input rows of step number ``step``."""
        return np.flatnonzero((self.dropped_by == -1) | (self.dropped_by >= step))

    def then(self, step: Step, keep_n: Bools, repeats_n: npt.NDArray[np.int32] | None = None) -> Selection:
        """Return the selection after one more step.

        Args:
            step: The step.
            keep_n: (n,) bool, which of the rows kept so far to keep.
            repeats_n: (n,) int32, how often to use each row, 0 for dropped rows; by default as often as before.

        Raises:
            UsageError: An array has the wrong length, or an earlier step repeats rows already.
        """
        kept = self.rows()
        if keep_n.shape != kept.shape:
            raise UsageError(f"{step.method} returned a mask of {len(keep_n):,} rows for {len(kept):,} input rows")
        dropped_by = np.array(self.dropped_by)
        dropped_by[kept[~keep_n]] = len(self.steps)
        repeats = self.repeats
        if repeats_n is not None:
            if repeats is not None:
                raise UsageError("an earlier step repeats rows already; draw only once, and filter before or after")
            if not np.array_equal(repeats_n > 0, keep_n):
                raise UsageError(f"{step.method} must repeat the rows it keeps at least once, and no other row")
            repeats = np.zeros(self.total, np.int32)
            repeats[kept] = repeats_n
        elif repeats is not None:
            repeats = np.where(dropped_by == -1, repeats, 0).astype(np.int32)
        return Selection(
            store=self.store,
            pool=self.pool,
            options=self.options,
            dropped_by=dropped_by,
            steps=(*self.steps, step),
            repeats=repeats,
        )

    # --- set algebra --------------------------------------------------------------------------

    def __and__(self, other: Selection) -> Selection:
        """Return the rows kept by both."""
        return self._combined("intersection", other, self.mask() & self.same_store(other).mask())

    def __or__(self, other: Selection) -> Selection:
        """Return the rows kept by either."""
        return self._combined("union", other, self.mask() | self.same_store(other).mask())

    def __sub__(self, other: Selection) -> Selection:
        """Return the rows kept by this selection and not by ``other``."""
        return self._combined("difference", other, self.mask() & ~self.same_store(other).mask())

    def same_store(self, other: Selection) -> Selection:
        """Return ``other`` after checking that it belongs to the same store.

        Raises:
            UsageError: It belongs to a different store.
        """
        if (other.store, other.total) != (self.store, self.total):
            raise UsageError(
                f"these selections belong to different pools: {self.pool} ({self.total:,} rows, {self.store[:12]}) "
                f"and {other.pool} ({other.total:,} rows, {other.store[:12]})"
            )
        return other

    def _combined(self, name: str, other: Selection, mask: Bools) -> Selection:
        if self.repeats is not None or other.repeats is not None:
            raise UsageError(f"cannot take the {name} of selections that repeat rows: they are not sets")
        origins = [[step.header() for step in part.steps] for part in (self, other)]
        step = Step(
            method=name,
            parameters={"of": origins},
            seed=0,
            rows_in=self.total,
            rows_out=int(mask.sum()),
            reasons=(f"not in the {name} of two selections",),
        )
        start = Selection.everything(self.store, self.pool, self.options, self.total)
        return start.then(step, mask)

    # --- on disk ------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """Return the content of ``selection.json``."""
        return {
            "format": FORMAT,
            "store": self.store,
            "pool": self.pool,
            "options": dict(self.options),
            "rows": self.total,
            "kept": len(self),
            "uses": self.uses,
            "repeats": self.repeats is not None,
            "steps": [step.header() for step in self.steps],
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False, say: Say | None = None) -> Path:
        """Write a selection folder atomically; does nothing if it holds this selection already.

        The folder contains ``selection.json``, ``mask.npy`` (N,) bool, ``dropped_by.npy`` (N,) int16,
        ``repeats.npy`` if rows are repeated, and evidence in ``steps/<number>-<method>/*.npy``.

        Args:
            folder: The folder.
            overwrite: Replace a different selection.
            say: Called with one line if the folder holds this selection already.

        Raises:
            OutputError: The folder holds something else, and ``overwrite`` is false or it is not a selection; or it
                cannot be written.
        """
        target = Path(folder)
        header = json.dumps(self.header(), indent=1, allow_nan=False) + "\n"
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            known = target / "selection.json"
            if not known.is_file():
                raise OutputError(f"{target}: is not a selection folder, so it is not overwritten")
            if not overwrite and known.read_text(encoding="utf-8", errors="replace") != header:
                raise exists_already(target)
        refuse_foreign_files(target, FILES)
        with result_folder(target, overwrite=overwrite, say=say) as scratch:
            self._write(scratch, header)
        return target

    def _write(self, folder: Path, header: str) -> None:
        def put(name: str, array: Array) -> None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                np.save(file, array, allow_pickle=False)

        put("mask.npy", self.mask())
        put("dropped_by.npy", self.dropped_by)
        if self.repeats is not None:
            put("repeats.npy", self.repeats)
        for number, step in enumerate(self.steps):
            for name, array in step.rows.items():
                put(f"{_step_folder(number, step.method)}/rows.{name}.npy", array)
            for name, array in step.groups.items():
                put(f"{_step_folder(number, step.method)}/groups.{name}.npy", array)
            for name, array in step.reference.items():
                put(f"{_step_folder(number, step.method)}/reference.{name}.npy", array)
        (folder / "selection.json").write_text(header, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Selection:
        """Load a selection folder; arrays are memory-mapped.

        Raises:
            PoolError: The folder is not a selection folder, or it is damaged.
        """
        path = Path(folder)
        try:
            header = json.loads((path / "selection.json").read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise PoolError(f"{path}: has format {header['format']}, but this version reads format {FORMAT}")
            total = int(header["rows"])
            steps = []
            for number, head in enumerate(header["steps"]):
                base = _step_folder(number, head["method"])
                rows = {name: _load(path, f"{base}/rows.{name}.npy", head["rows_in"]) for name in head["rows"]}
                groups = {name: _load(path, f"{base}/groups.{name}.npy") for name in head["groups"]}
                names = head.get("reference", ())
                reference = {name: _load(path, f"{base}/reference.{name}.npy") for name in names}
                _check_reference(path, rows, reference)
                for name in (name for reason in head["reasons"] for name in _names(reason)):
                    if name not in {"cut", *rows, *groups, *(f"reference_{name}" for name in reference)}:
                        raise PoolError(f"{path}: a reason template uses {name!r}, which its step does not have")
                info = {"notes": tuple(head["notes"]), "reasons": tuple(head["reasons"]), "package": _package(head)}
                steps.append(Step(**{**head, **info, "rows": rows, "groups": groups, "reference": reference}))
            selection = cls(
                store=header["store"],
                pool=header["pool"],
                options=header["options"],
                dropped_by=_load(path, "dropped_by.npy", total),
                steps=tuple(steps),
                repeats=_load(path, "repeats.npy", total) if header["repeats"] else None,
            )
            if not np.array_equal(_load(path, "mask.npy", total), selection.mask()):
                raise PoolError(f"{path}: mask.npy does not match dropped_by.npy; the selection is damaged")
            if selection.repeats is not None and not np.array_equal(selection.repeats > 0, selection.mask()):
                raise PoolError(f"{path}: repeats.npy does not match the kept rows; the selection is damaged")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PoolError(f"{path}: not a selection folder ({Path(error.filename or '').name} is missing)") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise PoolError(f"{path}: the selection cannot be read, it may be damaged ({error})") from None
        if len(selection) != header["kept"]:
            raise PoolError(f"{path}: {len(selection):,} rows are kept, but selection.json says {header['kept']:,}")
        return selection


def _load(folder: Path, name: str, rows: int | None = None) -> Array:
    if not re.fullmatch(r"(steps/[a-z0-9-]+/(rows|groups|reference)\.)?[a-z_]+\.npy", name):
        raise PoolError(f"{folder}: names an array {name!r}, which is not allowed in a selection")
    try:
        array: Array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise PoolError(f"{folder / name}: cannot be read, it may be damaged ({error})") from None
    if rows is not None and len(array) != rows:
        raise PoolError(f"{folder / name}: has {len(array):,} rows, expected {rows:,}")
    return array


def _package(head: Mapping[str, Any]) -> dict[str, str]:
    """Return the package that provides a step's method; older selections do not record it."""
    package = head.get("package", {"name": "thresher", "version": head["version"]})
    if not (set(package) == {"name", "version"} and all(isinstance(word, str) for word in package.values())):
        raise ValueError(f"{package!r} is not the name and version of a package")
    return dict(package)


def packed(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return texts as concatenated UTF-8 bytes, (B,) uint8, and the end offset of each text, (H,) int64."""
    parts = [text.encode("utf-8", "replace") for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([len(part) for part in parts], dtype=np.int64)


def _unpacked(bytes_B: Array, ends_H: Array, at: int) -> str:
    start = int(ends_H[at - 1]) if at else 0
    return bytes(bytes_B[start : int(ends_H[at])]).decode("utf-8", "replace")


def _check_reference(path: Path, rows: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
    """Check that all repeated reference rows are described, and that their texts have end offsets."""
    known = np.asarray(reference.get("row", np.empty(0, np.int64)))
    wanted = np.asarray(rows.get("reference", np.empty(0, np.int64)))
    ends = all(len(reference.get(f"{name}_ends", ())) == len(known) for name in ("key", "caption") if name in reference)
    if not ends or (np.diff(known) <= 0).any() or not np.isin(wanted[wanted >= 0], known).all():
        raise PoolError(f"{path}: does not describe the reference rows that were repeated; the selection is damaged")


def _step_folder(number: int, method: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", method):
        raise PoolError(f"{method!r} is not a valid method name")
    return f"steps/{number:02d}-{method}"


def _names(template: str) -> Iterable[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]
