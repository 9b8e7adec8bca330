"""Folders of pictures, with captions in all the ways that people keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture
from thresher.data import DataOptions, open_data
from thresher.errors import PoolError, UsageError

NAMES = ["a.png", "b.png", "sub/c.jpeg", "sub/d.e.png"]
TEXTS = {name: f"caption {name}, and more" for name in NAMES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (root / name).write_bytes(picture(i))
    return root


def captions(location: Path, **options: str) -> dict[str, str]:
    data = open_data(str(location), DataOptions(**options))
    assert data.kind == "folder"
    return {s.key: s.text for s in data.samples()}


def lines(delimiter: str, head: tuple[str, str] | None, *, quoted: bool) -> str:
    q = '"' if quoted else ""
    rows = [*([head] if head else []), *((name, f"{q}{text}{q}") for name, text in TEXTS.items())]
    return "".join(delimiter.join(row) + "\n" for row in rows)


def coco() -> str:
    images = [{"id": i, "file_name": name} for i, name in enumerate(TEXTS)]
    told = [{"image_id": i, "caption": text} for i, text in enumerate(TEXTS.values())]
    return json.dumps({"images": images, "annotations": [*told, {"image_id": 0, "caption": "a second one"}]})


def table(path: Path) -> None:
    pq.write_table(pa.table({"file_name": list(TEXTS), "text": list(TEXTS.values())}), path)


WAYS: dict[str, tuple[str, str | Callable[[Path], None]]] = {
    "Hugging Face jsonl": (
        "metadata.jsonl",
        "\n\n".join(json.dumps({"file_name": name, "text": text, "n": 1}) for name, text in TEXTS.items()),
    ),
    "Hugging Face csv": ("metadata.csv", lines(",", ("file_name", "text"), quoted=True)),
    "Hugging Face parquet": ("metadata.parquet", table),
    "tsv": ("metadata.tsv", lines("\t", ("filepath", "title"), quoted=False)),
    "Flickr8k": ("captions.txt", lines(",", ("image", "caption"), quoted=False)),
    "Flickr8k, quoted": ("captions.txt", lines(",", ("image", "caption"), quoted=True)),
    "Flickr30k": ("captions.csv", lines(",", ("image_name", "comment"), quoted=False)),
    "Flickr30k, several": (
        "captions.txt",
        "image,caption\n" + "".join(f"{n},{t}\n{n},another\n" for n, t in TEXTS.items()),
    ),
    "no line of names": ("captions.tsv", lines("\t", None, quoted=False)),
    "byte order mark": ("captions.txt", "\ufeff" + lines("\t", ("image", "caption"), quoted=False)),
    "COCO": ("captions.json", coco()),
    "object": ("captions.json", json.dumps({name: [text, "x"] for name, text in TEXTS.items()})),
    "list": ("captions.json", json.dumps([{"image": name, "caption": text} for name, text in TEXTS.items()])),
    "no endings": ("captions.json", json.dumps({os.path.splitext(name)[0]: text for name, text in TEXTS.items()})),
    "no folders": ("captions.json", json.dumps({os.path.basename(name): text for name, text in TEXTS.items()})),
    "other folders": ("captions.json", json.dumps({f"gone/{os.path.basename(n)}": t for n, t in TEXTS.items()})),
    "dots": ("captions.json", json.dumps({f"./{name}": text for name, text in TEXTS.items()})),
}
KEYED = {os.path.splitext(name)[0]: text for name, text in TEXTS.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("told", [False, True])
def test_captions_of_one_file(folder: Path, tmp_path: Path, way: str, told: bool) -> None:
    name, content = WAYS[way]
    path = (tmp_path if told else folder) / name
    if callable(content):
        content(path)
    else:
        path.write_text(content, encoding="utf-8")
    (folder / "a.txt").write_text("not this")
    assert captions(folder, **({"captions_file": str(path)} if told else {})) == KEYED


def test_datasets_reads_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in TEXTS.items())
    )
    found = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "hf"))
    theirs = sorted((row["text"], row["image"].tobytes()) for row in found)
    ours = list(open_data(str(folder)).samples())
    assert sorted(s.text for s in ours) == [text for text, _ in theirs]


def test_every_split_may_have_its_own_captions(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i in range(2):
            (tmp_path / split / f"{i}.png").write_bytes(picture(i))
        told = [json.dumps({"file_name": f"{i}.png", "text": f"{split} {i}"}) for i in range(2)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(told))
    assert captions(tmp_path) == {f"{s}/{i}": f"{s} {i}" for s in ("train", "test") for i in range(2)}


def test_a_caption_is_never_another_pictures(tmp_path: Path) -> None:
    for name in ("x/1.png", "y/1.png", "y/2.png", "z/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    told = {"x/1.png": "x one", "q/2.png": "two", "p/3.png": "three", "r/3.png": "another three"}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    assert captions(tmp_path) == {"x/1": "x one", "y/1": "", "y/2": "two", "z/3": ""}


@pytest.mark.parametrize(
    ("ending", "content", "text"),
    [
        ("txt", b"\xef\xbb\xbf one \n", "one"),
        ("txt", b"caf\xe9", "caf\ufffd"),
        ("txt", "\ufeffcaf\xe9 \u304c \n".encode("utf-16-le"), "caf\xe9 \u304c"),
        ("txt", "\ufeffcaf\xe9\r\n".encode("utf-16-be"), "caf\xe9"),
        ("txt", b"one\r\ntwo\n\n", "one\r\ntwo"),  # the whole file is one caption
        ("TXT", b"one", "one"),
        ("Json", b'{"caption": "one"}', "one"),
        ("png.txt", b"one", "one"),
        ("png.json", b'{"caption": "one"}', "one"),
        ("caption", b"one", "one"),
        ("json", b'{"caption": "one"}', "one"),
        ("json", b'{"text": ["", "one"], "caption": "two"}', "one"),
        ("json", b'["one", "two"]', "one"),
        ("json", b'"one"', "one"),
        ("json", b'{"caption": "\\ud800"}', "\\ud800"),
        ("json", b'{"caption": 3}', ""),
        ("json", b"{", ""),
        ("json", b"[" * 100_000, ""),
    ],
)
def test_captions_beside_the_pictures(folder: Path, ending: str, content: bytes, text: str) -> None:
    (folder / f"a.{ending}").write_bytes(content)
    assert captions(folder) == {"a": text, "b": "", "sub/c": "", "sub/d.e": ""}


def test_keys_are_names_without_endings_where_that_tells_them_apart(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.PNG", "10.png", "9.png", ".hidden.png", "jpg", "c.txt", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture())
    (tmp_path / "state.json").write_text("{}")  # what it tells of state.png
    (tmp_path / "state.png").write_bytes(picture())
    data = open_data(str(tmp_path), DataOptions(per_part=3))
    assert [s.key for s in data.samples()] == ["a.jpg", "a.png", "b", "caf\\udce9", "jpg", "state", "9", "10"]
    assert [s.stored() for s in data.samples()] == [picture()] * 8
    assert [(part.first, part.rows) for part in data.parts] == [(0, 3), (3, 3), (6, 2)]


def test_no_two_pictures_have_one_key(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.jpg.png", "1.png", "01.png", "001.png"):
        (tmp_path / name).write_bytes(picture())
    found = [s.key for s in open_data(str(tmp_path)).samples()]
    assert found == ["a.jpg", "a.jpg.png", "a.png", "001", "01", "1"]


def test_a_table_of_other_things_is_no_fault(tmp_path: Path) -> None:
    """Hugging Face's folders of classes have labels in place of captions."""
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}')
    assert captions(tmp_path) == {"a": ""}
    (tmp_path / "metadata.jsonl").write_text("{")
    assert [s.text for s in open_data(str(tmp_path), DataOptions(captions=False)).samples()] == [""]


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"root": str(tmp_path / "no")}, {"captions_file": str(tmp_path)}):
        with pytest.raises(UsageError, match="there is no such"):
            DataOptions(**wrong)
    with pytest.raises(UsageError, match="0 rows a part: at least 1"):
        DataOptions(per_part=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "is an empty folder"),
        (
            lambda folder: (folder / "readme.md").write_text("x"),
            "no known kind of data; give .*folder of images",
        ),
        (
            lambda folder: (folder / "x.tar.gz").write_text("x"),
            r"has 1 compressed tar \(such as x\.tar\.gz\).*gzip -dk",
        ),
    ],
)
def test_folders_without_pictures(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    make(tmp_path)
    with pytest.raises(PoolError, match=says):
        open_data(str(tmp_path))
    with pytest.raises(PoolError, match="nothing is there"):
        open_data(str(tmp_path / "no"))
    with pytest.raises(PoolError, match="no data was given"):
        open_data("")


def test_a_digest_tells_names_and_captions_from_others(folder: Path) -> None:
    (part,) = open_data(str(folder)).parts
    before = part.stamp()
    assert open_data(str(folder)).parts[0].stamp() == before
    (folder / "deeper").mkdir(exist_ok=True)
    (folder / "deeper" / "one-more.png").write_bytes(b"x")
    assert open_data(str(folder)).parts[0].stamp() != before


def test_pictures_of_kinds_that_are_not_read_are_there_to_be_told_of(tmp_path: Path) -> None:
    for name in ("a.png", "b.HEIC", "c.avif", "d.txt"):
        (tmp_path / name).write_bytes(b"ftypheic")
    assert [sample.key for sample in open_data(str(tmp_path)).samples()] == ["a", "b", "c"]


def test_coco_as_it_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017" / "0001.jpg").write_bytes(b"x")
    told = {"images": [{"id": 7, "file_name": "0001.jpg"}], "annotations": [{"image_id": 7, "caption": "a dog"}]}
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(told))
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    assert [sample.text for sample in open_data(str(tmp_path / "val2017")).samples()] == ["a dog"]
