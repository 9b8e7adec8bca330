from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import BadRowsError, UsageError, build, open_store


def kept_of(values: list, order: list[int], distance: int | None) -> dict[int, int]:
    """Dropped row -> the kept row it repeats, by comparing each row with all kept before it."""
    kept: list[int] = []
    dropped: dict[int, int] = {}
    for row in order:
        if values[row] is None:
            continue

        def repeats(other: int, row: int = row) -> bool:
            if distance is None:
                return values[row] == values[other]
            return (values[row] ^ values[other]).bit_count() <= distance

        found = next((other for other in kept if repeats(other)), None)
        if found is None:
            kept.append(row)
        else:
            dropped[row] = found
    return dropped


def check(selection, dropped: dict[int, int]) -> None:
    assert dropped
    assert selection.mask().tolist() == [row not in dropped for row in range(selection.total)]
    twins = selection.steps[0].rows["duplicate_of"]
    assert {row: int(twins[row]) for row in dropped} == dropped
    assert (np.delete(twins, list(dropped)) == -1).all()


@pytest.fixture
def table(tmp_path):
    """A pool of a table alone, in some files."""

    def write(files: int = 2, name: str = "pool", **columns):
        made = pa.table(columns)
        (tmp_path / name).mkdir()
        step = -(-len(made) // files)
        for i in range(files):
            part = made.slice(i * step, step)
            part = part.append_column("image_embedding", pa.array([[1.0, 0.5]] * len(part)))
            pq.write_table(part, tmp_path / name / f"{i}.parquet")
        return open_store(str(tmp_path / name))

    return write


def digests(n: int, different: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [hashlib.sha256(bytes([i])).hexdigest() for i in rng.integers(0, different, n)]


def perceptual(n: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, n // 6, np.uint64)[rng.integers(0, n // 6, n)]
    for _ in range(4):
        base ^= np.where(rng.random(n) < 0.5, np.uint64(1) << rng.integers(0, 64, n, np.uint64), np.uint64(0))
    return base.tolist()


@pytest.mark.parametrize("files", [1, 3])
def test_equal_hashes_keep_the_first_row(table, select, files) -> None:
    values: list = digests(200, 60)
    values[5] = values[17] = None
    values[8] = ""
    selection = select(table(files, sha256=values), build("dedup", {}))
    check(selection, kept_of([value or None for value in values], list(range(200)), None))
    assert "3 rows have no hash and stay" in " ".join(selection.steps[0].notes)
    row = next(iter(np.flatnonzero(~selection.mask())))
    assert selection.steps[0].why(int(row)) == f"duplicate of row {values.index(values[row])}: the same sha256"


@pytest.mark.parametrize("distance", [None, 0, 1, 3, 9])
@pytest.mark.parametrize("preferred", [False, True])
def test_similar_hashes_keep_the_first_or_the_best(table, select, distance, preferred) -> None:
    values = perceptual(300, seed=1)
    quality = np.random.default_rng(2).integers(0, 40, 300)
    given = {"by": "phash"} | ({} if distance is None else {"distance": distance})
    order = sorted(range(300), key=lambda row: (-quality[row], row)) if preferred else list(range(300))
    store = table(3, phash=[f"{value:016x}" for value in values], quality=quality)
    selection = select(store, build("dedup", given | ({"prefer": "quality"} if preferred else {})))
    expected = kept_of(values, order, 4 if distance is None else distance)
    check(selection, expected)
    if distance != 0:
        bits = selection.steps[0].rows["bits"]
        assert {row: int(bits[row]) for row in expected} == {
            row: (values[row] ^ values[twin]).bit_count() for row, twin in expected.items()
        }


def test_every_form_of_a_perceptual_hash_is_the_same(table, select) -> None:
    values = perceptual(60, seed=3)
    signed = [value - 2**64 if value >= 2**63 else value for value in values]
    forms = {
        "text": [f"{value:016x}" for value in values],
        "capitals": [f"{value:016X}" for value in values],
        "binary": [f"{value:064b}" for value in values],
        "bytes": pa.array([value.to_bytes(8, "big") for value in values]),
        "fixed": pa.array([value.to_bytes(8, "big") for value in values], pa.binary(8)),
        "unsigned": pa.array(values, pa.uint64()),
        "signed": pa.array(signed, pa.int64()),
        "words": pa.array([f"{value:016x}" for value in values]).dictionary_encode(),
    }
    store = table(2, **forms)
    expected = kept_of(values, list(range(60)), 3)
    for name in forms:
        check(select(store, build("dedup", {"by": "phash", "distance": 3, "column": name})), expected)


def test_an_exact_hash_is_the_same_as_bytes_and_in_either_case(table, select) -> None:
    text = digests(40, 10)
    mixed = [one.upper() if i % 2 else one for i, one in enumerate(text)]
    store = table(
        1, sha256=mixed, raw=pa.array([bytes.fromhex(one) for one in text]), number=[len(one) for one in text]
    )
    expected = kept_of(text, list(range(40)), None)
    check(select(store, build("dedup", {})), expected)
    check(select(store, build("dedup", {"column": "raw"})), expected)
    assert len(select(store, build("dedup", {"column": "number"}))) == 1


def test_text_that_is_no_hash_keeps_its_case(table, select) -> None:
    assert len(select(table(1, hash=["a", "A", "a", "61"]), build("dedup", {}))) == 3


def test_only_rows_that_are_given_count(table, select) -> None:
    store = table(2, sha256=["x", "x", "y", "y", "x", "z"], ok=[0, 1, 1, 1, 1, 1])
    selection = select(store, build("filter", {"where": "ok = 1"}), build("dedup", {}))
    assert selection.rows().tolist() == [1, 2, 5]
    assert selection.steps[1].rows["duplicate_of"].tolist() == [-1, -1, 2, 1, -1]


def test_all_hashes_missing(table, select) -> None:
    assert len(select(table(1, sha256=pa.array([None] * 4, pa.string())), build("dedup", {}))) == 4


@pytest.mark.parametrize("bad", ["abc", "z" * 16, "0" * 63, "ab cd ef 01 23 45"[:16], "\u0661" * 16])
def test_a_bad_perceptual_hash_is_named_with_its_row(table, select, bad) -> None:
    store = table(2, phash=["0" * 16, "1" * 16, None, bad])
    with pytest.raises(BadRowsError, match=r"1\.parquet row 1: phash is .*16 hexadecimal digits"):
        select(store, build("dedup", {"by": "phash"}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"distance": 3}, "distance is for by = 'phash'"),
        ({"by": "phash", "distance": 16}, "from 0"),
        ({"by": "phash", "distance": -1}, "from 0"),
        ({"by": "md5"}, "md5"),
    ],
)
def test_bad_parameters(given, said) -> None:
    with pytest.raises(UsageError, match=said):
        build("dedup", given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"needs a column of hashes \(sha256, .* has width"),
        ({"by": "phash"}, r"needs a column of hashes \(phash"),
        ({"column": "widht"}, "widht"),
        ({"column": "ratio"}, "contains double; hashes are text, bytes or whole numbers"),
        ({"column": "width", "prefer": "qualtiy"}, "qualtiy"),
    ],
)
def test_what_a_pool_does_not_have(table, select, given, said) -> None:
    with pytest.raises(UsageError, match=said):
        select(table(1, width=[1, 2], ratio=[0.5, 0.5]), build("dedup", given))
