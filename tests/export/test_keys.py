"""Sets of keys: as a dictionary of texts, in a fraction of its memory; the files they are read from; rows by them."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thresher.export.keys
import thresher.ops.key_hash
from thresher import Selection, build, select_indices
from thresher.errors import PoolError, UsageError
from thresher.export.keys import KeySet, each_key, hashes_of, read_keys
from thresher.export.write import export
from thresher.train.open_clip import static_keys

UID = re.compile("[0-9a-fA-F]{32}")

anything = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates too: tars may have such names
uids = st.text("0123456789abcdef", min_size=32, max_size=32)
cased = st.builds(lambda uid, upper: uid.upper() if upper else uid, uids, st.booleans())
nearly = st.text("0aF gx_\u0660\uff11\n", min_size=31, max_size=33)  # what only looks like 32 digits
near = st.builds(lambda i, end: f"{i:09d}{end}", st.integers(0, 30), st.sampled_from(["", " ", "\0", "é", "e\u0301"]))
keys = st.one_of(anything, cased, nearly, near)


def plain(key: str) -> str:
    """A key in canonical form: uids in lower case."""
    return key.lower() if UID.fullmatch(key) else key


def agrees(found: KeySet, wanted: Mapping[str, int], others: list[str]) -> None:
    """Check a set against a dictionary, key by key and all at once."""
    assert len(found) == len(wanted)
    assert found.total == sum(wanted.values())
    assert found.uids == any(UID.fullmatch(key) for key in wanted)
    asked = [*wanted, *others]
    numbers = [found.find(key) for key in asked]
    assert sorted(numbers[: len(wanted)]) == list(range(len(wanted)))
    for key, number in zip(asked, numbers, strict=True):
        assert (number >= 0) == (key in found) == (plain(key) in wanted)
        assert found.times(key) == wanted.get(plain(key), 0)
        if number >= 0:
            assert found.times_at(number) == wanted[plain(key)]
    assert found.find_many(iter(asked)).tolist() == numbers
    assert found.times_many(asked).tolist() == [wanted.get(plain(key), 0) for key in asked]
    assert found.find_many([]).dtype == np.int64


@given(st.lists(keys, max_size=60), st.lists(keys, max_size=30))
def test_a_set_is_a_count_of_keys(chosen: list[str], others: list[str]) -> None:
    wanted = Counter(map(plain, chosen))
    found = KeySet.from_keys(iter(chosen))
    agrees(found, wanted, others)
    agrees(pickle.loads(pickle.dumps(found)), wanted, others)


@given(st.lists(st.tuples(keys, st.integers(0, 300) | st.integers(0, 2**20)), max_size=40), st.lists(keys, max_size=20))
def test_counts_add_up_and_none_is_none(counts: list[tuple[str, int]], others: list[str]) -> None:
    wanted: Counter[str] = Counter()
    for key, times in counts:
        wanted[plain(key)] += times
    agrees(KeySet.from_counts(iter(counts)), +wanted, others)


@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 17, 1000, 65_536, 70_001])
@pytest.mark.parametrize("kind", ["numbers", "uids", "both"])
def test_sets_of_many_sizes(n: int, kind: str) -> None:
    names = [f"{i:09d}" if kind == "numbers" or (kind == "both" and i % 2) else f"{i:032x}" for i in range(2 * n)]
    found = KeySet.from_keys(names[:n])
    assert sorted(found.find_many(names)[:n].tolist()) == list(range(n))
    assert (found.find_many(names)[n:] == -1).all()
    some = names[:: max(1, n // 500)]
    assert [found.find(key) for key in some] == found.find_many(some).tolist()


def test_white_space_is_no_part_of_a_uid() -> None:
    for digits, twice in ((15, 1), (12, 2), (8, 2)):
        names = [f"{i:02x}" * digits + "  " * (16 - digits) for i in range(twice)]
        agrees(KeySet.from_keys(names), dict.fromkeys(names, 1), ["0" * 32, "0" * 16])


def test_keys_that_repeat_late() -> None:
    found = KeySet.from_counts((f"{i}", 3 if i >= 66_000 else 1) for i in range(66_010))
    assert found.times_many(map(str, range(66_010))).tolist() == [1] * 66_000 + [3] * 10


def test_times_that_cannot_be_are_refused() -> None:
    for times in (-1, 2**31):
        with pytest.raises(UsageError, match="give 0 to 2,147,483,647"):
            KeySet.from_counts([("a", times)])
    with pytest.raises(UsageError, match="use it 2,147,483,647 times or fewer"):
        KeySet.from_counts([("a", 2**31 - 1), ("a", 1)])
    assert KeySet.from_counts([("a", 2**31 - 1)]).times("a") == 2**31 - 1
    with pytest.raises(IndexError, match="no key number 1; there are 1"):
        KeySet.from_keys(["a"]).times_at(1)
    with pytest.raises(IndexError, match="no key number -1"):
        KeySet.from_keys(["a"]).times_at(-1)


@pytest.mark.parametrize("times", [1, 2, 300, 70_000])
@pytest.mark.parametrize("form", ["{:09d}", "{:032x}"])
def test_a_key_takes_less_than_16_bytes(times: int, form: str) -> None:
    n = 100_000
    found = KeySet.from_counts((form.format(i), times if i % 7 == 0 else 1) for i in range(n))
    assert len(found) == n
    arrays = [array for array in vars(found).values() if isinstance(array, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == found.nbytes < (9.1 if times == 1 else 13.1) * n
    assert len(pickle.dumps(found)) < found.nbytes + 1000


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [False, True])
def test_keys_are_never_all_held_while_a_set_is_made(repeats: bool) -> None:
    n = 200_000
    names = (f"a key that is longer than a hash, much longer: {i % (n // 2 if repeats else n):09d}" for i in range(n))
    tracemalloc.start()
    found = KeySet.from_keys(names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    chunk = 65_536 * (8 + 105 + 8 + 41 + 8)  # a part's keys, their hashes, lists of both
    assert peak < 26 * n + 1.25 * chunk < n * 105
    assert found.total == n


class Counted:
    """A sequence that counts how often it is looked into."""

    def __init__(self, sequence: Any) -> None:
        self.sequence, self.looks = sequence, 0

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, at: int) -> Any:
        self.looks += 1
        return self.sequence[at]


def looks(found: KeySet, asked: list[str]) -> list[int]:
    counted = [Counted(found._hashes), Counted(found._begins)]
    found._hashes, found._begins = counted  # type: ignore[assignment]
    before, each = 0, []
    for key in asked:
        found.find(key)
        each.append(sum(one.looks for one in counted) - before)
        before += each[-1]
    return each


def test_looking_up_takes_as_many_steps_in_a_large_set_as_in_a_small_one() -> None:
    mean = {}
    for n in (1_000, 30_000, 1_000_000):
        asked = [f"{i:032x}" for i in range(0, 2 * n, n // 500)]
        mean[n] = np.mean(looks(KeySet.from_keys(f"{i:032x}" for i in range(n)), asked))
    assert max(mean.values()) < 8  # 2 for the bucket, 3 or 4 within, 1 to be sure
    assert max(mean.values()) < min(mean.values()) + 1.5


def test_hashes_that_crowd_into_one_bucket_are_bisected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresher.ops.key_hash, "_digest", lambda key: int(key).to_bytes(8, "little"))
    names = [str(i) for i in range(0, 20_000, 2)]
    found = KeySet.from_keys(names)
    assert found.find_many(map(str, range(20_000))).tolist() == [-1 if i % 2 else i // 2 for i in range(20_000)]
    assert max(looks(found, [str(i) for i in range(0, 20_000, 37)])) <= 3 + 14


def test_hashes_are_those_that_were() -> None:
    """Others keep what is in the order of keys; and a hash has to be blake2b's of the text, or mix a uid's halves."""
    found = hashes_of(["000000012", "", "\ud800é", "0" * 31, "g" * 32])
    for key, one in zip(["000000012", "", "\ud800é", "0" * 31, "g" * 32], found.tolist(), strict=True):
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        assert one == int.from_bytes(digest, "little")
    many = hashes_of([f"{i:032x}" for i in range(20_000)] + [f"{i << 64:032x}" for i in range(1, 20_000)])
    assert len(np.unique(many)) == len(many)
    ones = np.unpackbits(many.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.02  # every bit as often 0 as 1, though the uids count from 0


# Where keys come from


@pytest.fixture
def drawn(pool: Callable[..., Any], rows: Callable[..., Any], select: Callable[..., Selection]) -> Callable[..., Any]:
    """Make a selection of a pool with these keys: half of it, or draws with repeats."""

    def make(names: list[str], *, repeats: bool = False, name: str = "pool") -> Selection:
        store = pool(rows(len(names)), rows(len(names), seed=1), {"uid": names}, name=name)
        step = {"draws": 2 * len(names), "temperature": 0.2} if repeats else {"keep": "50%"}
        return select(store, build("scs" if repeats else "random", step))

    return make


def counted(names: list[str], selection: Selection) -> dict[str, int]:
    times = selection.mask() if selection.repeats is None else selection.repeats
    return {key: int(often) for key, often in zip(names, times, strict=True) if often}


def streamed(sel: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for key, times in each_key(sel):
        found[key] += times
    return found


@pytest.mark.parametrize("repeats", [False, True])
def test_all_that_a_selection_is_written_as_has_the_same_keys(
    drawn: Callable[..., Selection], tmp_path: Path, repeats: bool
) -> None:
    names = [hashlib.md5(str(i).encode()).hexdigest() for i in range(200)]
    selection = drawn(names, repeats=repeats)
    wanted = counted(names, selection)
    assert (max(wanted.values()) > 1) == repeats
    selection.save(tmp_path / "subset")
    export(selection, "keys", tmp_path / "keys.txt")
    export(selection, "datacomp", tmp_path / "subset.npy")
    export(selection, "parquet", tmp_path / "subset.parquet")
    for sel in (selection, tmp_path / "subset", *(str(tmp_path / f) for f in ("keys.txt", "subset.npy"))):
        agrees(read_keys(sel), wanted, names)
    agrees(read_keys(tmp_path / "subset.parquet"), wanted, names)
    for sel in (selection, *(tmp_path / f for f in ("subset", "keys.txt", "subset.npy", "subset.parquet"))):
        assert streamed(sel) == wanted
    assert list(each_key(selection)) == list(wanted.items())


def test_uids_are_found_in_either_case(tmp_path: Path) -> None:
    uid = "00ff" * 8
    for there, asked in ((uid.upper(), uid), (uid, uid.upper()), (uid, "00Ff" * 8)):
        (tmp_path / "keys.txt").write_text(there)
        found = read_keys(tmp_path / "keys.txt")
        assert found.find(asked) == found.find_many([asked, "another"])[0] == 0
    assert KeySet.from_keys(["00ff"]).find("00FF") == -1


def test_a_text_file_has_a_key_a_line_and_only_line_feeds_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes("\ufeffa\r\n\n b \nc\u2028d\x0be\na\nlast".encode())
    assert list(each_key(path)) == [("a", 1), (" b ", 1), ("c\u2028d\x0be", 1), ("a", 1), ("last", 1)]
    agrees(read_keys(path), streamed(path), ["b", "c", ""])
    assert streamed(path) == {"a": 2, " b ": 1, "c\u2028d\x0be": 1, "last": 1}
    path.write_text("")
    assert (len(read_keys(path)), read_keys(path).total, read_keys(path).find("")) == (0, 0, -1)
    assert read_keys(path).find_many(["a"]).tolist() == [-1]
    path.write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(
        PoolError, match=rf"{path}: is UTF-16, not UTF-8; save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path}"
    ):
        read_keys(path)
    path.write_bytes(b"a\xff\xfe")
    for wrong in (path, tmp_path / "nothing.txt"):
        with pytest.raises(PoolError, match="is neither a selection folder nor a file of keys"):
            read_keys(wrong)
    with pytest.raises(PoolError, match="not a selection folder"):
        read_keys(tmp_path)


def test_a_subset_file_of_datacomp(tmp_path: Path) -> None:
    path = tmp_path / "subset.npy"
    pairs = [(1, 2), (2**64 - 1, 0), (1, 2)]
    for kind in ("u8,u8", ">u8,>u8"):
        np.save(path, np.array(pairs, kind))
        found = read_keys(path)
        agrees(found, {f"{1:016x}{2:016x}": 2, "f" * 16 + "0" * 16: 1}, ["0" * 32, ""])
        assert list(each_key(path)) == [(f"{a:016x}{b:016x}", 1) for a, b in pairs]
    np.save(path, np.array([], "u8,u8"))
    assert len(read_keys(path)) == 0
    for wrong in (np.ones(4, np.bool_), np.ones((4, 2), np.uint64), np.zeros(3, "u8,u4"), np.zeros((1, 1), "u8,u8")):
        np.save(path, wrong)
        with pytest.raises(PoolError, match=r"subset\.npy: contains .*, but keys are \(rows,\) of text, or of u8,u8"):
            read_keys(path)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(
        PoolError, match=r"pickled .*, which are never read; .*np\.save\(path, np\.array\(keys, dtype=str"
    ):
        read_keys(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3, "u8,u8"))
    with pytest.raises(PoolError, match=r"subset\.npy: cannot be read as keys"):
        read_keys(path)
    with open(path, "wb") as file:
        np.save(file, np.array(pairs, "u8,u8"))
        np.save(file, np.array(pairs, "u8,u8"))
    with pytest.raises(PoolError, match="another array begins at byte .*, and is not read; save one array per file"):
        read_keys(path)
    np.save(path, np.array(pairs * 9, "u8,u8"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PoolError, match=r"subset\.npy: cannot be read, it may be damaged \(it is truncated"):
        read_keys(path)


def test_an_array_of_text(tmp_path: Path) -> None:
    path = tmp_path / "keys.npy"
    names = ["000000012", "é", "ab" * 16, "000000012"]
    for kind in ("U32", ">U32", "U40", "O"):
        array = np.array(names, kind)
        np.save(path, array if kind != "O" else np.array(names))
        agrees(read_keys(path), Counter(names), ["12", ""])
        assert streamed(path) == Counter(names)
    np.save(path, np.array([key.encode() for key in names], "S32"))
    agrees(read_keys(path), Counter(names), ["12", "b'12'"])
    np.save(path, np.array([f"{i}" for i in range(70_000)]))
    assert len(read_keys(path)) == 70_000
    np.save(path, np.array([], "U8"))
    assert len(read_keys(path)) == 0
    np.save(path, np.array([b"\xff"], "S4"))
    with pytest.raises(PoolError, match="bytes that are not UTF-8"):
        read_keys(path)
    np.save(path, np.arange(3))
    with pytest.raises(PoolError, match="row numbers and masks are not keys; save keys as text"):
        read_keys(path)
    np.save(path, np.array([["a"]]))
    with pytest.raises(PoolError, match=r"of shape \(1, 1\), but keys are \(rows,\)"):
        read_keys(path)


LISTS = {
    "keys.txt": "b\n000000012\nb\n",
    "keys": "\ufeffb\r\n\n000000012\nb",
    "keys.csv": "score,key\n0.5,b\n,000000012\n1,b\n",
    "semicolon.csv": "key;score\nb;0.5\n000000012;\nb;1\n",
    "one.CSV": '"uid"\nb\n"000000012"\nb\n',
    "keys.tsv": "key\tnote\nb\tx, y\n000000012\t\nb\tz\n",
    "keys.jsonl": '{"key": "b", "a": 1}\n\n{"key": "000000012"}\n{"a": [2], "key": "b"}\n',
    "alone.ndjson": '"b"\n"000000012"\n"b"\n',
    "keys.json": '[{"id": "b"}, {"id": "000000012", "x": null}, {"id": "b"}]',
    "alone.json": '["b", "000000012", "b"]',
}


@pytest.mark.parametrize("name", [*LISTS, "keys.parquet", "keys.arrow", "keys.feather", "stream.ipc"])
def test_a_list_of_keys_in_any_format(tmp_path: Path, name: str) -> None:
    path, found = tmp_path / name, pa.table({"url": ["x"] * 3, "key": ["b", "000000012", "b"]})
    if name in LISTS:
        path.write_text(LISTS[name], encoding="utf-8", newline="")
    elif name.endswith("parquet"):
        pq.write_table(found, path)
    else:
        with (pa.ipc.new_stream if "stream" in name else pa.ipc.new_file)(str(path), found.schema) as file:
            file.write_table(found)
    agrees(read_keys(path), {"b": 2, "000000012": 1}, ["12", "key", "uid", "x"])
    assert list(each_key(path)) == [("b", 1), ("000000012", 1), ("b", 1)]
    assert static_keys(path, 10).times_M.sum() == 3
    assert select_indices(path, keys=["b", "c", "000000012"]).tolist() == [0, 0, 2]


def test_whole_numbers_in_json_are_keys_as_in_parquet(tmp_path: Path) -> None:
    for name, text in (("a.json", "[12, 7]"), ("a.jsonl", '{"key": 12}\n{"key": 7}\n'), ("b.jsonl", "12\n7\n")):
        (tmp_path / name).write_text(text)
        assert streamed(tmp_path / name) == {"12": 1, "7": 1}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "000001\n000002\n", r"no column of keys \(uid, .*\); it has 000001\. Name .* 'key', or give a \.txt"),
        ("a.csv", "key,score\na\n", "the row at byte 10 has 1 cell, but the first line has 2"),
        ("a.csv", "key,key\na,b\n", "several columns with the name key"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "key,score\na,1\n,2\n", "1 row has no key; every row needs one"),
        ("a.jsonl", '{"key": "a"}\n{"kye": "b"}\n', "1 row has no key"),
        ("a.jsonl", '{"key": "a"}\n{"key"', "the line at byte 13 is not JSON"),
        ("a.jsonl", "[1]\n", r"the line at byte 0 is \[1\]; write an object, or a key as text"),
        ("a.jsonl", '{"key": 1.5}\n', "floats are not keys"),
        ("a.json", '{"a": 1}', "is not a list; write a list of keys"),
        ("a.json", '["a", null]', "entry 1 is null; write an object, or a key as text"),
        (
            "a.pkl",
            "x",
            r"not read from \.pkl files; give a \.txt file with one key per line, a \.npy of text, or a table",
        ),
        ("a.pt", "x", r"not read from \.pt files"),
        ("a.gz", "x", r"not read from \.gz files"),
    ],
)
def test_lists_of_keys_that_are_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((PoolError, UsageError), match=says):
        read_keys(tmp_path / name)


def test_a_table_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.parquet"
    pq.write_table(pa.table({"url": ["x", "y", "z"], "key": ["b", "a", "b"], "id": [1, 2, 3]}), path)
    assert streamed(path) == {"b": 2, "a": 1}
    agrees(read_keys(path), {"b": 2, "a": 1}, ["1", "x"])
    pq.write_table(pa.table({"id": [7, 8, 7]}), path)
    assert streamed(path) == {"7": 2, "8": 1}
    pq.write_table(pa.table({"key": ["a", None]}), path)
    with pytest.raises(PoolError, match="1 row has no key; every row needs one"):
        read_keys(path)
    pq.write_table(pa.table({"url": ["a"]}), path)
    with pytest.raises(PoolError, match=r"has no column of keys \(uid, key, .*\); it has url"):
        read_keys(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PoolError, match="keys.parquet: cannot be read"):
        read_keys(path)


def test_a_key_of_several_rows_is_refused(pool: Callable[..., Any], rows: Callable[..., Any], tmp_path: Path) -> None:
    """As selections may be that were made with other versions, or of pools that changed: runs refuse such pools."""
    store = pool(rows(5), None, {"uid": ["a", "b", "c", "b", "c"]})
    whole = Selection.everything(store.fingerprint(), store.layout.location, {}, 5)
    whole.save(tmp_path / "subset")
    export(whole, "parquet", tmp_path / "subset.parquet")
    for sel in (whole, tmp_path / "subset", tmp_path / "subset.parquet"):
        with pytest.raises(
            UsageError, match="the key 'b' belongs to several rows; select from a pool with unique keys"
        ):
            read_keys(sel)
    fewer = dataclasses.replace(whole, dropped_by=np.array([-1, -1, -1, 0, 0], np.int16))
    assert streamed(fewer) == {"a": 1, "b": 1, "c": 1}
    assert read_keys(fewer).total == 3


@pytest.mark.parametrize("repeats", [False, True])
def test_keys_with_one_hash_are_not_taken_for_repeated_ones(
    drawn: Callable[..., Selection], monkeypatch: pytest.MonkeyPatch, repeats: bool
) -> None:
    monkeypatch.setattr(thresher.ops.key_hash, "_digest", lambda key: (int(key) // 2).to_bytes(8, "little"))
    names = [f"{i:03d}" for i in range(60)]
    selection = drawn(names, repeats=repeats)
    wanted = counted(names, selection)
    pairs = [sorted({wanted.get(f"{i:03d}", 0), wanted.get(f"{i + 1:03d}", 0)}) for i in range(0, 60, 2)]
    assert any(pair[0] > 0 for pair in pairs)
    found = read_keys(selection)
    assert [found.times(f"{i:03d}") for i in range(0, 60, 2)] == [pair[-1] for pair in pairs]


# Rows of a dataset


@pytest.mark.parametrize("repeats", [False, True])
def test_rows_by_number_and_by_key(drawn: Callable[..., Selection], tmp_path: Path, repeats: bool) -> None:
    names = [f"{i:03d}" for i in range(50)]
    selection = drawn(names, repeats=repeats)
    selection.save(tmp_path / "subset")
    export(selection, "keys", tmp_path / "keys.txt")
    wanted = counted(names, selection)
    rows = [i for i, key in enumerate(names) for _ in range(wanted.get(key, 0))]
    found = select_indices(tmp_path / "subset")
    assert found.dtype == np.int64
    assert found.tolist() == select_indices(selection, names).tolist() == rows
    assert select_indices(tmp_path / "keys.txt", keys=names).tolist() == rows
    back = [*names[::-1], "another", names[rows[0]]]
    expected = [i for i, key in enumerate(back) for _ in range(wanted.get(key, 0))]
    hf = datasets.Dataset.from_dict({"uid": back})
    for column in (back, hf["uid"], hf.data.column("uid"), np.array(back), (key for key in back), pa.array(back)):
        assert select_indices(read_keys(selection), keys=column).tolist() == expected
    assert hf.select(select_indices(selection, hf, keys=hf["uid"]))["uid"][:] == [back[i] for i in expected]
    by_row = torch.utils.data.Subset(names, select_indices(selection, names))
    assert [by_row[i] for i in range(len(by_row))] == [names[i] for i in rows]


def test_keys_that_are_no_text_are_written_as_text() -> None:
    chosen = KeySet.from_keys(["7", "9", ""])
    for column in ([7, 8, 9], np.array([7, 8, 9]), pa.array([7, 8, 9])):
        assert select_indices(chosen, keys=column).tolist() == [0, 2]
    assert select_indices(chosen, keys=[None, "8", "9"]).tolist() == [0, 2]


def test_keys_of_python_are_the_text_of_a_pool() -> None:
    """Bytes were compared as ``b'7'``, and booleans as ``True``."""
    chosen = KeySet.from_keys(["7", "true", "é"])
    assert select_indices(chosen, keys=[b"7", b"8", "é".encode(), True, False]).tolist() == [0, 2, 3]
    with pytest.raises(UsageError, match=r"keys=: the key b'\\xff' is not UTF-8 text; give keys as text"):
        select_indices(chosen, keys=[b"\xff"])
    with pytest.raises(UsageError, match=r"keys=: floats are not keys: 7\.0; give keys as text or whole numbers"):
        select_indices(chosen, keys=[7.0])


def test_a_table_of_keys_that_are_floats_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1.0, 2.0]}), tmp_path / "k.parquet")
    with pytest.raises(UsageError, match=r"k\.parquet: the column 'id' contains double .*floats are not keys"):
        read_keys(str(tmp_path / "k.parquet"))


def test_rows_that_cannot_be_identified_raise(drawn: Callable[..., Selection], tmp_path: Path) -> None:
    selection = drawn([f"{i:03d}" for i in range(50)])
    with pytest.raises(
        UsageError, match=r"a dataset of 49 rows for a pool of 50 rows \(.*\); select by key with keys="
    ):
        select_indices(selection, range(49))
    with pytest.raises(UsageError, match=r"a dataset of 3 rows for 2 keys"):
        select_indices(selection, range(3), keys=["000", "001"] if selection.mask()[:2].any() else ["048", "049"])
    with pytest.raises(UsageError, match="none of the 2 keys is one of 25 kept keys; is this other data"):
        select_indices(selection, keys=["a", "b"])
    export(selection, "keys", tmp_path / "keys.txt")
    for sel in (tmp_path / "keys.txt", read_keys(selection)):
        with pytest.raises(UsageError, match="a file of keys has no row numbers; give the keys of the dataset"):
            select_indices(sel)


def test_a_stream_of_hugging_faces_is_filtered_by_key() -> None:
    chosen = KeySet.from_keys(["a", "c", "z"])

    def samples() -> Iterator[dict[str, str]]:
        for key in "abcd":
            yield {"uid": key}

    stream = datasets.IterableDataset.from_generator(samples)
    assert [one["uid"] for one in stream.filter(lambda key: key in chosen, input_columns="uid")] == ["a", "c"]
    many = stream.filter(lambda part: chosen.find_many(part) >= 0, input_columns="uid", batched=True, batch_size=3)
    assert [one["uid"] for one in many] == ["a", "c"]
