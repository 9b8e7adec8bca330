"""Parquet, Arrow and Hugging Face datasets, against what pyarrow and datasets read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.common import arrow_of, outcome, parquet_of, picture, rows, table
from thresher.data import DataOptions, open_data
from thresher.data.samples import SEVERAL, Place
from thresher.errors import ChangedError, PoolError, UsageError

KEYS = [f"k{i}" for i in range(23)]
WRITTEN = [(key, f"caption {key}", picture(i)) for i, key in enumerate(KEYS)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def read(location: Path | str, **options: Any) -> list[tuple[str, str, bytes | None]]:
    return [(key, text, found) for key, text, found, *_ in rows(open_data(str(location), DataOptions(**options)))]


def in_file(folder: Path, kind: str, what: pa.Table, group: int = 4) -> Path:
    path = folder / f"x.{'parquet' if kind == 'parquet' else 'arrow'}"
    path.write_bytes(
        parquet_of(what, row_group_size=group)
        if kind == "parquet"
        else arrow_of(what, stream=kind == "stream", rows=group)
    )
    return path


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_samples_are_what_was_written(tmp_path: Path, kind: str) -> None:
    more = {
        "width": list(range(23)),
        "score": [i / 4 for i in range(23)],
        "when": pa.array([2**62] * 23, pa.timestamp("ns")),
    }
    data = open_data(str(in_file(tmp_path, kind, table(KEYS, **more))))
    assert data.kind == ("parquet" if kind == "parquet" else "arrow")
    assert dict(data.columns) == {"score": pa.float64()}
    assert [(s.key, s.text, s.stored()) for s in data.samples()] == WRITTEN
    assert [s.columns for s in data.samples()] == [{"score": i / 4} for i in range(23)]
    assert [s.at for s in data.samples()] == list(range(23))


@pytest.mark.parametrize("kind", ["parquet", "stream", pytest.param("file", marks=pytest.mark.slow)])
@given(per_part=st.integers(1, 30), group=st.integers(1, 30))
def test_parts_give_the_same_samples_wherever_they_are_cut(
    tmp_path: Path, kind: str, per_part: int, group: int
) -> None:
    path = in_file(tmp_path, kind, table(KEYS), group)
    whole, parts = open_data(str(path)), open_data(str(path), DataOptions(per_part=per_part))
    assert len(whole.parts) == 1
    assert rows(parts) == rows(whole)
    assert [part.first for part in parts.parts] == list(range(0, 23, parts.parts[0].rows))
    assert sum(part.rows or 0 for part in parts.parts) == 23


def test_a_large_row_group_is_not_read_again_for_every_part(tmp_path: Path) -> None:
    path = in_file(tmp_path, "parquet", table(KEYS), 23)
    assert len(open_data(str(path), DataOptions(per_part=1)).parts) == 8


def test_keys_without_a_column_are_file_and_row(tmp_path: Path) -> None:
    for name in ("b10", "b9"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet_of(table(["x", "y"]).drop_columns("key")))
    assert [s.key for s in open_data(str(tmp_path), DataOptions(per_part=1)).samples()] == [
        "b9-0",
        "b9-1",
        "b10-0",
        "b10-1",
    ]


def test_columns_besides_are_those_that_all_files_have(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").write_bytes(parquet_of(table(["a"], n=[1], m=[2.0], only=["x"])))
    (tmp_path / "2.parquet").write_bytes(parquet_of(table(["b"], m=[3.0], n=[2])))
    (tmp_path / "3.parquet").write_bytes(parquet_of(table(["c"], n=["three"], m=[4.0])))
    data = open_data(str(tmp_path))
    assert dict(data.columns) == {"m": pa.float64()}
    assert [dict(s.columns) for s in data.samples()] == [{"m": 2.0}, {"m": 3.0}, {"m": 4.0}]


def test_columns_are_found_by_their_names_or_as_told(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    cells = [picture(1), picture(2)]
    path.write_bytes(
        parquet_of(
            pa.table(
                {"jpg": cells, "other": cells[::-1], "captions": [["", "one"], None], "uid": ["u", None], "id": [7, 8]}
            )
        )
    )
    a, b = open_data(str(path)).samples()
    assert (a.key, a.uid, a.text, a.stored()) == ("u", "u", "one", cells[0])
    assert (b.key, b.uid, b.text) == ("x-1", "", "")
    told = DataOptions(image="other", key="id", caption="uid")
    a, b = open_data(str(path), told).samples()
    assert (a.key, a.text, a.stored(), b.key) == ("7", "u", cells[1], "8")
    assert a.uid == ""  # else the pool of it would be known by the uids, not by the key asked for
    for wrong in ({"image": "othr"}, {"key": "uidd"}, {"caption": "captionss"}):
        with pytest.raises(UsageError, match="no column 'o|no column 'u|no column 'c") as error:
            open_data(str(path), DataOptions(**wrong))
        assert "Did you mean" in str(error.value)


def test_names_of_columns_without_regard_to_case(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet_of(pa.table({"Image": [picture(0)], "IMAGE_PATH": ["x"], "Title": ["one"]})))
    assert [(s.text, s.stored()) for s in open_data(str(path)).samples()] == [("one", picture(0))]
    path.write_bytes(parquet_of(pa.table({"TEXT": ["upper"], "text": ["lower"], "Image": [b""], "image": [picture()]})))
    assert [(s.text, s.stored()) for s in open_data(str(path)).samples()] == [("lower", picture())]


@pytest.mark.parametrize("several", [False, True])
def test_columns_that_datasets_declares_as_images(tmp_path: Path, several: bool) -> None:
    import datasets

    image = datasets.Sequence(datasets.Image()) if several else datasets.Image()
    features = datasets.Features({"photo": image, "text": datasets.Value("string"), "sound": datasets.Audio()})
    cells = [{"bytes": picture(i), "path": None} for i in range(3)]
    told = {
        "photo": [[cell, cell] for cell in cells] if several else cells,
        "text": ["a", "b", "c"],
        "sound": [None] * 3,
    }
    made = datasets.Dataset.from_dict(told, features=features)
    made.to_parquet(tmp_path / "x.parquet")
    made.save_to_disk(tmp_path / "saved")
    for name in ("x.parquet", "saved"):
        data = open_data(str(tmp_path / name))
        assert [s.stored() for s in data.samples()] == [picture(i) for i in range(3)]
        assert {s.notes for s in data.samples()} == {(SEVERAL,) if several else ()}
        assert data.parts[0].roles()["picture"] == "photo"
        assert not data.columns


@pytest.mark.parametrize("kind", ["parquet", "stream"])
@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ({"text": "a"}, r"column 'caption' for --caption has struct<text: string>; allowed: a text or a list of texts "
                        r"\(image, other, key\); .*--caption COLUMN, or embed only the images with --only image"),
        ([{"raw": "a"}], r"column 'caption' for --caption has list<.*struct<raw: string>>"),
        ([["a"]], r"column 'caption' for --caption has list<.*list<.*string>>"),
    ],
)  # fmt: skip
def test_captions_inside_structs_are_refused(tmp_path: Path, kind: str, cell: Any, says: str) -> None:
    what = pa.table({"image": [picture()], "caption": [cell], "other": ["b"], "key": ["k"]})
    path = in_file(tmp_path, kind, what)
    for options in (DataOptions(), DataOptions(caption="caption")):
        with pytest.raises(PoolError, match=says):
            open_data(str(path), options)
    with pytest.raises(
        UsageError, match=r"no column 'caption.text' for --caption; .*; a column inside a struct is not"
    ):
        open_data(str(path), DataOptions(caption="caption.text"))
    for options in (DataOptions(caption="other"), DataOptions(captions=False)):
        (sample,) = open_data(str(path), options).samples()
        assert (sample.text, sample.stored()) == ("b" if options.caption else "", picture())


@pytest.mark.parametrize("cell", [{"url": "a"}, [[[1, 2, 3]]], [{"height": 3}]])
def test_images_of_other_types_are_refused(tmp_path: Path, cell: Any) -> None:
    """Pixels as nested lists, and structs without an image."""
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet_of(pa.table({"image": [cell], "photo": [picture()], "text": ["a"]})))
    for options in (DataOptions(), DataOptions(image="image")):
        with pytest.raises(PoolError, match=r"column 'image' for --image has .*; allowed: bytes, .* \(photo, text\); "):
            open_data(str(path), options)
    assert [s.stored() for s in open_data(str(path), DataOptions(image="photo")).samples()] == [picture()]


def test_captions_of_every_type_of_text(tmp_path: Path) -> None:
    texts = ["one", "", None, "nan"]
    kinds = {
        "large": pa.array(texts, pa.large_string()),
        "view": pa.array(texts, pa.string_view()),
        "dictionary": pa.array(texts).dictionary_encode(),
        "bytes": pa.array([None if text is None else text.encode() for text in texts]),
        "lists": pa.array([["one", "two"], [], None, ["", "nan"]]),
    }
    for name, column in kinds.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(parquet_of(pa.table({"image": [picture()] * 4, "text": column})))
        assert [s.text for s in open_data(str(path)).samples()] == ["one", "", "", "nan"], name


SPLIT_NAMES = [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
     {"train": "data/train*.parquet", "test": "data/test*.parquet"}),
    (["train/0000.parquet", "validation/0000.parquet"], {"train": "train", "validation": "validation"}),
    (["my_train.parquet", "my_dev.parquet"], {"train": "my_train*.parquet", "validation": "my_dev*.parquet"}),
    (["cc-train.arrow", "cc-eval.arrow"], {"train": "cc-train*.arrow", "test": "cc-eval*.arrow"}),
]  # fmt: skip


@pytest.mark.parametrize(("names", "splits"), SPLIT_NAMES)
def test_splits_are_not_mixed_without_a_word(tmp_path: Path, names: list[str], splits: dict[str, str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        what = table([name])
        (tmp_path / name).write_bytes(arrow_of(what) if name.endswith("arrow") else parquet_of(what))
    with pytest.raises(UsageError) as error:
        open_data(str(tmp_path))
    assert f"contains the splits {', '.join(sorted(splits, key=str(error.value).index))}; give one: " in str(
        error.value
    )
    for split, pattern in splits.items():
        assert f"{tmp_path}/{pattern}" in str(error.value)
        keys = [s.key for s in open_data(str(tmp_path / pattern)).samples()]
        assert keys == [name for name in names if split[:2] in name or split == "validation" and "dev" in name or
                        split == "test" and "eval" in name]  # fmt: skip
    both = f"{tmp_path}/{'*' if '/' not in names[0] else '*/*'}"
    assert sorted(s.key for s in open_data(both).samples()) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [["train-0.parquet", "train-1.parquet"], ["trains-0.parquet", "latest-0.parquet"], ["a.parquet", "test.parquet"]],
)
def test_one_split_or_other_names(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(parquet_of(table([name])))
    assert len(list(open_data(str(tmp_path)).samples())) == 2
    with pytest.raises(PoolError, match=r"nothing-\*.parquet: nothing is there"):
        open_data(f"{tmp_path}/nothing-*.parquet")
    with pytest.raises(PoolError, match=r"none/\*.parquet: nothing is there"):
        open_data(f"{tmp_path}/none/*.parquet")


@pytest.mark.parametrize("way", ["names", "struct", "absolute", "root"])
def test_pictures_may_be_files_below_the_table_or_the_root(tmp_path: Path, way: str) -> None:
    below = tmp_path / "else" if way == "root" else tmp_path
    (below / "in").mkdir(parents=True)
    (below / "in" / "a.png").write_bytes(picture(5))
    name = str(below / "in" / "a.png") if way == "absolute" else "in/a.png"
    cells: Any = [{"bytes": None, "path": name}] if way == "struct" else [name]
    (tmp_path / "x.parquet").write_bytes(parquet_of(pa.table({"image": cells})))
    options = DataOptions(root=str(below) if way == "root" else None)
    (sample,) = open_data(str(tmp_path / "x.parquet"), options).samples()
    assert sample.picture == Place(os.path.realpath(below / "in" / "a.png"))
    assert sample.stored() == picture(5)


def test_a_dataset_saved_to_disk_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    cells = {"image": [{"bytes": picture(i), "path": None} for i in range(7)], "text": [f"t{i}" for i in range(7)]}
    made = datasets.Dataset.from_dict(cells, features=features)
    made.save_to_disk(tmp_path / "one", num_shards=3)
    expected = [
        (row["image"]["bytes"], row["text"])
        for row in datasets.load_from_disk(tmp_path / "one").cast_column("image", datasets.Image(decode=False))
    ]
    found = read(tmp_path / "one")
    assert [(data, text) for _, text, data in found] == expected
    assert [key for key, *_ in found][:4] == [f"data-0000{i}-of-00003-{j}" for i, j in ((0, 0), (0, 1), (0, 2), (1, 0))]

    both = datasets.DatasetDict({"train": made, "test": made.select(range(2), keep_in_memory=True)})
    both.save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match=r"contains the splits test, train; give one, such as .*two/test"):
        open_data(str(tmp_path / "two"))
    assert [text for _, text, _ in read(tmp_path / "two" / "test")] == ["t0", "t1"]
    assert len(read(tmp_path / "two" / "train")) == 7

    single = datasets.DatasetDict({"train": made})
    single.save_to_disk(tmp_path / "three")
    assert len(read(tmp_path / "three")) == 7

    made.shuffle(seed=1).save_to_disk(tmp_path / "four")
    shuffled = [row["text"] for row in datasets.load_from_disk(tmp_path / "four").remove_columns("image")]
    assert [text for _, text, _ in read(tmp_path / "four")] == shuffled != [f"t{i}" for i in range(7)]

    made.to_parquet(tmp_path / "five.parquet")
    assert [(data, text) for _, text, data in read(tmp_path / "five.parquet")] == expected


def test_arrow_files_that_datasets_keeps_of_what_it_computed_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "d-train.arrow").write_bytes(arrow_of(table(["a"])))
    (tmp_path / "cache-1234.arrow").write_bytes(arrow_of(table(["b"])))
    assert [s.key for s in open_data(str(tmp_path)).samples()] == ["a"]


def test_a_table_that_has_changed_is_noticed(tmp_path: Path) -> None:
    for kind in ("parquet", "stream"):
        path = in_file(tmp_path, kind, table(KEYS))
        data = open_data(str(path))
        in_file(tmp_path, kind, table(KEYS[:5]))
        with pytest.raises(ChangedError, match="has fewer rows than when it was opened"):
            list(data.samples())


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """One row group of 160 MB, in a process of its own."""
    path = tmp_path / "x.parquet"
    cells = [bytes([i]) * 200_000 for i in range(20)] * 40
    how = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_batch_size": 10}
    pq.write_table(pa.table({"image": cells, "text": ["x"] * 800}), path, **how)
    code = (
        "import sys, tracemalloc, thresher.data, pyarrow as pa\n"
        "tracemalloc.start()\n"
        "size = sum(len(s.stored()) for s in thresher.data.open_data(sys.argv[1]).samples())\n"
        "print(size, pa.default_memory_pool().max_memory(), tracemalloc.get_traced_memory()[1])\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    size, arrow, python = map(int, out.split())
    assert size == 160_000_000
    assert arrow < 60_000_000
    assert python < 60_000_000


def test_tables_elsewhere_are_read_and_not_believed_about_files_here(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "a.png").write_bytes(picture())
    memory = fsspec.filesystem("memory")
    for kind, content in (("parquet", parquet_of(table(["a", "b"]))), ("arrow", arrow_of(table(["a", "b"])))):
        memory.pipe(f"/elsewhere/{kind}/x.{kind}", content)
        assert [key for key, *_ in read(f"memory://elsewhere/{kind}")] == ["a", "b"]
    named = pa.table({"image": [str(tmp_path / "a.png"), "a.png"]})
    memory.pipe("/x.parquet", parquet_of(named))
    first, second = open_data("memory://x.parquet").samples()
    assert first.picture is None
    assert second.why == "names an image by path, which is read only with --root: a.png"
    first, second = open_data("memory://x.parquet", DataOptions(root=str(tmp_path))).samples()
    assert first.stored() == second.stored() == picture()


# --- mutations ------------------------------------------------------------------------------------

BASE = {
    "parquet": parquet_of(table(["a", "b", "c"])),
    "parquet, plain": parquet_of(
        table(["a", "b", "c"]), use_dictionary=False, compression="none", write_statistics=False, row_group_size=2
    ),
    "parquet, checked": parquet_of(table(["a", "b", "c"]), compression="none", write_page_checksum=True),
    "stream": arrow_of(table(["a", "b", "c"])),
    "file": arrow_of(table(["a", "b", "c"]), stream=False),
}


@pytest.mark.parametrize("kind", BASE)
@given(st.data())
def test_mutated_tables_are_read_or_refused(tmp_path: Path, kind: str, draw: st.DataObject) -> None:
    data = bytearray(BASE[kind])
    for _ in range(draw.draw(st.integers(1, 4))):
        lo = draw.draw(st.sampled_from([0, len(data) * 9 // 10, max(0, len(data) - 300)]))
        at = draw.draw(st.integers(min(lo, len(data) - 1), len(data) - 1))
        what = draw.draw(st.sampled_from(["byte", "byte", "byte", "long", "cut", "piece"]))
        if what == "byte":
            data[at] = draw.draw(st.integers(0, 255))
        elif what == "long":
            data[at : at + 8] = draw.draw(
                st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0"])
            )
        elif what == "cut":
            del data[at : at + draw.draw(st.integers(1, 40))]
        else:
            data[at:at] = data[: draw.draw(st.integers(1, 100))]
        data = data or bytearray(b"x")
    path = tmp_path / f"x.{'parquet' if 'parquet' in kind else 'arrow'}"
    path.write_bytes(bytes(data))
    outcome(path)


def several(path: Path, kind: str, **columns: Any) -> str:
    path.mkdir()
    return str(in_file(path, kind, pa.table({"image": [picture(i) for i in range(3)], **columns})))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_captions_are_looked_for_in_other_columns_but_not_guessed(tmp_path: Path, kind: str) -> None:
    """Recap-DataComp-1B has re_caption and org_caption; of labels and names nothing is said."""
    words = ["a red dog", "a cat", ""]
    made = open_data(
        several(tmp_path / "a", kind, label=["cat", "dog", "cat"], url=["http://x/a b"] * 3, re_caption=words)
    )
    assert not any(sample.text for sample in made.samples())
    assert made.captions_elsewhere().endswith(
        "it has image, label, url, re_caption; name one, such as --caption re_caption"
    )
    assert not open_data(several(tmp_path / "b", kind, label=["cat", "dog", "cat"])).captions_elsewhere()
    assert not open_data(several(tmp_path / "c", kind, text=words, other=words)).captions_elsewhere()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_column_of_several_with_captions_is_told(tmp_path: Path, kind: str) -> None:
    words = ["a", "b", "c"]
    path = several(tmp_path / "a", kind, caption=words, title=words)
    (note,) = open_data(path).notes
    assert note.endswith("captions come from the column caption, not from title; --caption names another")
    assert not open_data(path, DataOptions(caption="title")).notes
    assert not open_data(several(tmp_path / "b", kind, caption=words, title=[1, 2, 3])).notes


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_conversations_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    cells = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a dog"}]] * 3
    with pytest.raises(PoolError, match="the column 'conversations' for --caption has .*a text or a list of texts"):
        open_data(several(tmp_path / "a", kind, conversations=cells))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_use_no_file_of_captions(tmp_path: Path, kind: str) -> None:
    (tmp_path / "c.csv").write_text("file_name,text\n")
    with pytest.raises(UsageError, match=r"--captions .*c.csv: .* is tables, which does not use it; name the column"):
        open_data(several(tmp_path / "a", kind), DataOptions(captions_file=str(tmp_path / "c.csv")))


def test_a_table_in_a_folder_of_images_may_be_its_file_of_captions(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    pq.write_table(pa.table({"image": ["0.png", "1.png"], "re_caption": ["x y", "z"]}), tmp_path / "recap.parquet")
    made = open_data(str(tmp_path), DataOptions(captions_file=str(tmp_path / "recap.parquet"), caption="re_caption"))
    assert (made.kind, [sample.text for sample in made.samples()]) == ("folder", ["x y", "z"])


def test_one_json_is_named_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "llava.json").write_text("[]")
    with pytest.raises(PoolError, match=r"is one json; give the folder of its images, and --captions .*llava.json"):
        open_data(str(tmp_path / "llava.json"))
