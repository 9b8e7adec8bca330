"""Keys of every Arrow type that has a text: the same text in pools, raw data, selections, exports and joins.

Each type is written as a Parquet pool, and as raw data in Parquet, in both Arrow formats and as a dataset on disk.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import arrow_of, parquet_of
from tests.resharding.common import picture
from thresher import Cache, EmbeddingStore, Options, Selection, Serial, build, open_store, run_steps
from thresher.data import Data, DataOptions, open_data
from thresher.embedding.pipeline import EmbedSettings, embed
from thresher.errors import UsageError
from thresher.export.keys import read_keys, select_indices
from thresher.export.write import export
from thresher.report.explain import explain
from thresher.resharding import reshard

N = 23
WORDS = [f"item-{(i * 7) % N:03d}" for i in range(N)]
UUIDS = [uuid.UUID(int=((i + 7) * 0x1234567890ABCDEF) << 40) for i in range(N)]
DAYS = [datetime.datetime(2024, 2, 1) + datetime.timedelta(days=i, hours=i, milliseconds=i) for i in range(N)]
CAPTIONS = [f"a picture of {i}" for i in range(N)]


def written(day: datetime.datetime) -> str:
    return day.strftime("%Y-%m-%d %H:%M:%S.") + f"{day.microsecond // 1000:03d}"


# Name -> the column of keys, and their text, made without Arrow.
TYPES: dict[str, tuple[Callable[[], pa.Array], list[str]]] = {
    "string": (lambda: pa.array(WORDS), WORDS),
    "large_string": (lambda: pa.array(WORDS, pa.large_string()), WORDS),
    "string_view": (lambda: pa.array(WORDS, pa.string_view()), WORDS),
    "dictionary": (lambda: pa.array(WORDS).dictionary_encode(), WORDS),
    "small dictionary": (lambda: pa.array(WORDS).cast(pa.dictionary(pa.int8(), pa.large_string())), WORDS),
    "binary": (lambda: pa.array([word.encode() for word in WORDS]), WORDS),
    "binary_view": (lambda: pa.array([word.encode() for word in WORDS], pa.binary_view()), WORDS),
    "dictionary of binary": (lambda: pa.array([word.encode() for word in WORDS]).dictionary_encode(), WORDS),
    "uuid": (lambda: pa.array([one.bytes for one in UUIDS], pa.uuid()), list(map(str, UUIDS))),
    "16 bytes": (lambda: pa.array([one.bytes for one in UUIDS], pa.binary(16)), list(map(str, UUIDS))),
    "int": (lambda: pa.array(range(100, 100 + N)), [str(100 + i) for i in range(N)]),
    "uint8": (lambda: pa.array(range(N), pa.uint8()), [str(i) for i in range(N)]),
    "dictionary of int": (lambda: pa.array(range(N)).dictionary_encode(), [str(i) for i in range(N)]),
    "decimal": (
        lambda: pa.array([decimal.Decimal(i) / 4 for i in range(N)], pa.decimal128(20, 2)),
        [f"{i / 4:.2f}" for i in range(N)],
    ),
    "timestamp": (lambda: pa.array(DAYS, pa.timestamp("ms")), [written(day) for day in DAYS]),
    "date": (lambda: pa.array([day.date() for day in DAYS]), [day.strftime("%Y-%m-%d") for day in DAYS]),
}
FORMS = ("parquet", "stream", "file", "dataset")


def pool(folder: Path, keys: pa.Array, **more: Any) -> Path:
    """A pool of two files, which share nothing, not even a dictionary."""
    folder.mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(N, 8)).astype(np.float32)
    for i, some in enumerate((slice(0, 9), slice(9, N))):
        columns = {"key": keys[some], "image_embedding": list(vectors[some]), "caption": CAPTIONS[some]}
        pq.write_table(
            pa.table({**columns, **{name: one[some] for name, one in more.items()}}), folder / f"{i}.parquet"
        )
    return folder


def raw(folder: Path, form: str, keys: pa.Array, captions: pa.Array | None = None, **more: Any) -> Path:
    """Raw data of two files, in batches or row groups of four."""
    folder.mkdir(parents=True)
    names = []
    for i, some in enumerate((slice(0, 9), slice(9, N))):
        images = [{"bytes": picture(n), "path": None} for n in range(N)[some]]
        texts = pa.array(CAPTIONS)[some] if captions is None else captions[some]
        columns = {"key": keys[some], "image": images, "text": texts}
        table = pa.table({**columns, **{name: one[some] for name, one in more.items()}})
        names.append(f"data-{i:05d}-of-00002.{'parquet' if form == 'parquet' else 'arrow'}")
        content = (
            parquet_of(table, row_group_size=4)
            if form == "parquet"
            else arrow_of(table.combine_chunks(), stream=form != "file", rows=4)
        )
        (folder / names[-1]).write_bytes(content)
    if form == "dataset":
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (folder / "dataset_info.json").write_text("{}")
    return folder


def chosen_by(folder: Path, store: EmbeddingStore, method: str, **values: Any) -> Selection:
    return run_steps(store, [build(method, values)], engine=Serial(), cache=Cache.at(folder / "cache"))


def keys_of(data: Data) -> list[str]:
    return [key for part in data.parts for key in part.scan().keys]


@pytest.mark.parametrize("name", TYPES)
def test_keys_of_a_pool_are_the_same_text_everywhere(tmp_path: Path, name: str) -> None:
    """pandas#28252, arrow#47177: such keys were skipped, written as ``b'...'`` or called damage."""
    make, wanted = TYPES[name]
    keys = make()
    store = open_store(str(pool(tmp_path / "pool", keys)))
    assert [key for _, part in store.keys() for key in part] == wanted
    selection = chosen_by(tmp_path, store, "random", keep=9)
    kept = [wanted[row] for row in np.flatnonzero(selection.mask())]
    chosen = read_keys(selection)
    assert [key in chosen for key in wanted] == selection.mask().tolist()
    export(selection, "keys", tmp_path / "keys.txt")
    assert (tmp_path / "keys.txt").read_text().split("\n") == [*kept, ""]
    export(selection, "parquet", tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").column("key").to_pylist() == wanted
    row = int(np.flatnonzero(selection.mask())[0])
    assert explain(selection, store, wanted[row])["row"] == row
    assert explain(selection, store, wanted[row])["key"] == wanted[row]
    assert select_indices(chosen, keys=keys).tolist() == np.flatnonzero(selection.mask()).tolist()
    pq.write_table(
        pa.table({"key": keys.take(pa.array([1, 2])) if "view" not in name else keys[1:3]}), tmp_path / "k.parquet"
    )
    assert read_keys(str(tmp_path / "k.parquet")).find_many(wanted[1:3]).min() >= 0


@pytest.mark.parametrize("name", TYPES)
def test_tables_join_by_the_text_of_keys(tmp_path: Path, name: str) -> None:
    make, wanted = TYPES[name]
    pool(tmp_path / "pool", make())
    pq.write_table(pa.table({"key": wanted[::-1], "new": range(N)}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"key": make(), "more": range(N)}), tmp_path / "same.parquet")
    for other, column, found in (("text", "new", list(range(N))[::-1]), ("same", "more", list(range(N)))):
        options = Options(metadata=str(tmp_path / f"{other}.parquet"))
        joined = open_store(str(tmp_path / "pool"), options, scratch=str(tmp_path / "cache"))
        assert joined.column(column).tolist() == found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TYPES)
def test_a_selection_of_a_pool_applies_to_raw_data_of_any_form(tmp_path: Path, name: str, form: str) -> None:
    make, wanted = TYPES[name]
    data = raw(tmp_path / "raw", form, make())
    opened = open_data(str(data))
    assert keys_of(opened) == wanted
    assert [(sample.key, sample.text) for sample in opened.samples()] == list(zip(wanted, CAPTIONS, strict=True))
    assert [key for part in opened.parts for words in part.words() or () for key in words.keys] == wanted
    store = open_store(str(pool(tmp_path / "pool", make())))
    selection = chosen_by(tmp_path, store, "random", keep=9)
    export(selection, "keys", tmp_path / "keys.txt")
    kept = np.flatnonzero(selection.mask()).tolist()
    for how in ({}, {"shuffle": 3, "per_shard": 4}):
        out = tmp_path / f"out{len(how)}"
        done = reshard(str(data), str(tmp_path / "keys.txt"), str(out), **how)
        assert done.samples == len(kept)
        rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        texts = [row["text"] for row in rows]
        assert (texts if not how else sorted(texts)) == (sorted if how else list)([CAPTIONS[row] for row in kept])
        by_caption = dict(zip(CAPTIONS, make().to_pylist(), strict=True))
        assert [row["key"] for row in rows] == [by_caption[text] for text in texts]
    if form == "file":
        done = reshard(str(data), str(tmp_path / "keys.txt"), str(tmp_path / "tars"), form="webdataset")
        assert done.samples == len(kept)


@pytest.mark.parametrize("form", ["parquet", "file"])
@pytest.mark.parametrize("name", ["string_view", "dictionary", "small dictionary", "binary", "dictionary of binary"])
@pytest.mark.parametrize("shuffle", [None, 1])
def test_copies_of_such_keys_get_names(tmp_path: Path, name: str, form: str, shuffle: int | None) -> None:
    make, wanted = TYPES[name]
    data = raw(tmp_path / "raw", form, make())
    (tmp_path / "keys.txt").write_text(f"{wanted[3]}\n{wanted[3]}\n{wanted[20]}\n")
    reshard(str(data), str(tmp_path / "keys.txt"), str(tmp_path / "out"), shuffle=shuffle)
    assert sorted(keys_of(open_data(str(tmp_path / "out")))) == sorted([wanted[3], f"{wanted[3]}-1", wanted[20]])


CAPTION_TYPES: dict[str, Callable[[], pa.Array]] = {
    "dictionary": lambda: pa.array(CAPTIONS).dictionary_encode(),
    "binary": lambda: pa.array([text.encode() for text in CAPTIONS]),
    "dictionary of binary": lambda: pa.array([text.encode() for text in CAPTIONS]).dictionary_encode(),
    "string_view": lambda: pa.array(CAPTIONS, pa.string_view()),
    "large_string": lambda: pa.array(CAPTIONS, pa.large_string()),
    "list of string": lambda: pa.array([["", text, "no"] for text in CAPTIONS]),
    "list of string_view": lambda: pa.array([[text] for text in CAPTIONS], pa.list_(pa.string_view())),
    "list of binary": lambda: pa.array([[text.encode()] for text in CAPTIONS]),
    "list_view": lambda: pa.array([[text] for text in CAPTIONS], pa.list_view(pa.string())),
}


@pytest.mark.parametrize("form", ["parquet", "file"])
@pytest.mark.parametrize("name", CAPTION_TYPES)
def test_captions_of_every_type_are_read(tmp_path: Path, name: str, form: str) -> None:
    data = raw(tmp_path / "raw", form, pa.array(WORDS), CAPTION_TYPES[name]())
    opened = open_data(str(data))
    assert [sample.text for sample in opened.samples()] == CAPTIONS
    assert [text for part in opened.parts for words in part.words() or () for text in words.texts] == CAPTIONS


@pytest.mark.parametrize("name", CAPTION_TYPES)
def test_captions_of_a_pool_are_exported(tmp_path: Path, name: str) -> None:
    paths = pa.array([f"{word}.jpg" for word in WORDS]).dictionary_encode()
    store = open_store(
        str(pool(tmp_path / "pool", pa.array(WORDS), text=CAPTION_TYPES[name](), filepath=paths, url=paths))
    )
    everything = Selection.everything(store.fingerprint(), str(tmp_path / "pool"), store.options.recorded(), N)
    export(everything, "open_clip", tmp_path / "list.csv", store=store)
    lines = (tmp_path / "list.csv").read_text().splitlines()[1:]
    assert lines == [f"{word}.jpg\t{text}" for word, text in zip(WORDS, CAPTIONS, strict=True)]
    export(everything, "img2dataset", tmp_path / "list.parquet", store=store)
    table = pq.read_table(tmp_path / "list.parquet")
    assert table.column("key").to_pylist() == WORDS
    assert table.column("url").to_pylist() == paths.to_pylist()
    if "list" not in name:
        assert table.column("caption").to_pylist() == CAPTIONS
    assert "b'" not in explain(everything, store, "row:0")["caption"]


REFUSED = {
    "float": (pa.array([float(i) for i in range(N)]), "floats are not keys"),
    "3 bytes": (pa.array([b"abc"] * N, pa.binary(3)), "only 16 bytes"),
    "list": (pa.array([[word] for word in WORDS]), "not a list, a struct or a map"),
    "struct": (pa.array([{"a": i} for i in range(N)]), "not a list, a struct or a map"),
    "not text": (pa.array([bytes([255, i]) for i in range(N)]), "its bytes are not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_keys_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    keys, why = REFUSED[name]
    data, there = raw(tmp_path / "raw", "parquet", keys, id=pa.array(WORDS)), pool(tmp_path / "pool", keys)
    with pytest.raises(UsageError, match=f"raw/data-00000.*'key' contains .*{why}.*--key row") as error:
        keys_of(open_data(str(data)))
    assert "damage" not in str(error.value)
    with pytest.raises(UsageError, match=f"pool.*'key' contains .*{why}.*--key row"):
        chosen_by(tmp_path, open_store(str(there)), "random", keep=3)
    assert keys_of(open_data(str(data), DataOptions(key="id"))) == WORDS
    assert keys_of(open_data(str(data), DataOptions(key="row")))[0] == "data-00000-of-00002-0"
    chosen_by(tmp_path, open_store(str(there), Options(key="row")), "random", keep=3)


def test_other_columns_of_such_types_are_kept_or_left_out(tmp_path: Path) -> None:
    more = {
        "lang": pa.array(["en", "de"] * N)[:N].dictionary_encode(),
        "view": pa.array(WORDS, pa.string_view()),
        "price": TYPES["decimal"][0](),
        "ident": TYPES["uuid"][0](),
        "moment": TYPES["timestamp"][0](),
    }
    opened = open_data(str(raw(tmp_path / "raw", "file", pa.array(WORDS), **more)))
    kinds = {"lang": pa.string(), "view": pa.large_string(), "price": pa.decimal128(20, 2), "ident": pa.large_string()}
    assert dict(opened.columns) == kinds
    first = next(iter(opened.samples())).columns
    assert first == {"lang": "en", "view": WORDS[0], "price": decimal.Decimal(0), "ident": str(UUIDS[0])}
    store = open_store(str(pool(tmp_path / "pool", pa.array(WORDS), **more)))
    for where, rows in (
        ("lang = 'en'", range(0, N, 2)),
        (f"view = '{WORDS[4]}'", [4]),
        ("price > 5", range(21, N)),
        (f"ident = '{UUIDS[3]}'", [3]),
        ("moment < TIMESTAMP '2024-02-03'", [0, 1]),
    ):
        found = chosen_by(tmp_path, store, "filter", where=where)
        assert np.flatnonzero(found.mask()).tolist() == list(rows), where
    paths = pa.array([f"{word}.jpg" for word in WORDS])
    store = open_store(str(pool(tmp_path / "urls", pa.array(WORDS), url=paths, **more)))
    everything = Selection.everything(store.fingerprint(), str(tmp_path / "urls"), store.options.recorded(), N)
    export(everything, "img2dataset", tmp_path / "list.parquet", store=store)
    assert set(more) <= set(pq.read_schema(tmp_path / "list.parquet").names)


def test_a_condition_names_a_column_that_is_too_wide(tmp_path: Path) -> None:
    wide = pa.array([decimal.Decimal(10**40)] * N, pa.decimal256(50, 0))
    store = open_store(str(pool(tmp_path / "pool", pa.array(WORDS), wide=wide)))
    with pytest.raises(UsageError, match=r"the column 'wide' contains decimal256\(50, 0\); convert it to decimal128"):
        chosen_by(tmp_path, store, "filter", where="wide > 5")


@pytest.mark.parametrize("name", ["dictionary", "binary_view", "uuid", "timestamp"])
def test_an_embedded_pool_has_the_same_keys_and_columns(tmp_path: Path, name: str) -> None:
    """The selection of a pool that was embedded from one form applies to the data, found by place and by key."""
    make, wanted = TYPES[name]
    more = {"lang": pa.array(["en", "de"] * N)[:N].dictionary_encode(), "ident": TYPES["uuid"][0]()}
    data = raw(tmp_path / "raw", "file", make(), CAPTION_TYPES["binary"](), **more)
    settings = EmbedSettings(encoder="tests.toy:Toy", batch_size=8, workers=0)
    assert embed(str(data), tmp_path / "pool", settings).rows == N
    store = open_store(str(tmp_path / "pool"))
    assert [key for _, part in store.keys() for key in part] == wanted
    rows = [row for _, part in store.scan(["text", "lang", "ident"]) for row in part.to_pylist()]
    assert rows == [
        {"text": text, "lang": ["en", "de"][i % 2], "ident": str(UUIDS[i])} for i, text in enumerate(CAPTIONS)
    ]
    selection = chosen_by(tmp_path, store, "filter", where="lang = 'de'")
    selection.save(tmp_path / "sel")
    assert reshard(str(data), str(tmp_path / "sel"), str(tmp_path / "out")).samples == N // 2
    assert keys_of(open_data(str(tmp_path / "out"))) == wanted[1::2]
