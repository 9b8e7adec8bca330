"""Which files of a folder are pictures, which hold their captions, and what is told of all others."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture
from thresher.data import DataOptions, open_data
from thresher.data.files import captions_beside, ending_of, stem_of
from thresher.io.pictures import ENDINGS

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9 \u304c") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.jpg", "jpg"),
        ("A.JPG", "jpg"),
        ("a.b.7z", "7z"),
        ("IMG_001", ""),
        ("photo.1", ""),
        ("photo.jpg.1", ""),
        ("photo.jpg_large", ""),
        ("photo.jpg?w=300", ""),
        ("Mr. Smith", ""),
        ("a.", ""),
        ("a.\u00e9", ""),
        ("2024.01.05", ""),
        ("sub.d/IMG", ""),
    ],
)
def test_endings(name: str, ending: str) -> None:
    assert ending_of(name) == ending
    assert stem_of(name) == (name[: -len(ending) - 1] if ending else name)


@pytest.mark.parametrize(
    ("pictures", "texts", "found"),
    [
        (["a.jpg"], ["a.txt", "a.json"], {"a.jpg": "a.txt"}),
        (["a.jpg"], ["a.json", "a.caption"], {"a.jpg": "a.caption"}),
        (["a.jpg"], ["a.TXT"], {"a.jpg": "a.TXT"}),
        (["A.JPG"], ["A.Caption"], {"A.JPG": "A.Caption"}),
        (["a.jpg"], ["a.TXT", "a.Txt"], {}),  # which of them?
        (["a.jpg"], ["a.jpg.txt"], {"a.jpg": "a.jpg.txt"}),
        (["a.jpg"], ["a.jpg.txt", "a.txt"], {"a.jpg": "a.txt"}),
        (["a.jpg", "a.png"], ["a.jpg.txt", "a.png.txt"], {"a.jpg": "a.jpg.txt", "a.png": "a.png.txt"}),
        (["a.jpg", "a.jpg.png"], ["a.jpg.txt"], {"a.jpg.png": "a.jpg.txt"}),
        (["a.jpg", "a.png"], ["a.txt"], {"a.jpg": "a.txt", "a.png": "a.txt"}),
        (["a.b.jpg"], ["a.txt"], {}),
        (["A.jpg"], ["a.txt"], {}),
        (["IMG_1"], ["IMG_1.txt"], {"IMG_1": "IMG_1.txt"}),
        (["a.jpg_large"], ["a.txt"], {"a.jpg_large": "a.txt"}),
        (["a.jpg.1"], ["a.txt"], {"a.jpg.1": "a.txt"}),
        (["a.jpg.1", "a.jpg"], ["a.txt"], {"a.jpg": "a.txt"}),
        ([f"{COMPOSED}.jpg"], [f"{DECOMPOSED}.txt"], {f"{COMPOSED}.jpg": f"{DECOMPOSED}.txt"}),
        ([f"{DECOMPOSED}.jpg"], [f"{COMPOSED}.jpg.TXT"], {f"{DECOMPOSED}.jpg": f"{COMPOSED}.jpg.TXT"}),
        (
            [f"{DECOMPOSED}.jpg", f"{COMPOSED}.jpg"],
            [f"{COMPOSED}.txt"],
            {f"{COMPOSED}.jpg": f"{COMPOSED}.txt"},  # nobody knows whether it is also the other's
        ),
        ([f"{COMPOSED}.jpg"], [f"{DECOMPOSED}.txt", f"{DECOMPOSED}.Txt"], {}),
    ],
)
def test_captions_beside_pictures(pictures: list[str], texts: list[str], found: dict[str, str]) -> None:
    assert captions_beside(pictures, texts) == (found, [name for name in texts if name not in found.values()])
    assert captions_beside(pictures[::-1], texts[::-1])[0] == found


def test_captions_of_jsons_alone() -> None:
    assert captions_beside(["a.jpg", "b.jpg"], ["a.txt", "a.json"], [".json"]) == ({"a.jpg": "a.json"}, ["a.txt"])


# --- what is told -----------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i) if ending_of(path.name) in (*ENDINGS, "") else b"a caption")
    return folder


SMALL = ("a.png", "a.txt")
NOTES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "nothing else": (SMALL, []),
    "system": ((*SMALL, "Thumbs.db", ".DS_Store", "sub/desktop.ini", "__MACOSX/._a.png", "__MACOSX/x.mp4"), []),
    "about": ((*SMALL, "README.md", "LICENSE", "readme.txt"), []),
    "hidden": ((*SMALL, ".git/x.mp4", "._a.png", ".x.mp4"), []),
    "videos": ((*SMALL, "b.mp4", "sub/c.MP4", "d.bin"), ["not read: 3 files (.mp4 2, .bin 1)"]),
    "many": (
        (*SMALL, *(f"x.{letter}x" for letter in "abcdefghij")),
        ["not read: 10 files (.ax 1, .bx 1, .cx 1, .dx 1, .ex 1, .fx 1, .gx 1, .hx 1, 2 other extensions)"],
    ),
    "zip": ((*SMALL, "more.zip"), ["not read: 1 file (.zip 1); unpack {top}/more.zip"]),
    "raw": (
        (*SMALL, "a.CR2", "b.nef", "c.jxl", "c.txt"),
        ["3 images in a format that cannot be read (.cr2 1, .jxl 1, .nef 1): convert to JPEG or PNG"],
    ),
    "captions without a picture": (
        (*SMALL, "b.txt", "sub/c.caption"),
        ["2 caption files without an image of the same name, the first: {top}/b.txt"],
    ),
    "json beside txt": ((*SMALL, "a.json"), []),
    "tables": (
        ("a.png", "labels.csv", "x.json"),
        [
            "not read: 2 files (.csv 1, .json 1)",
            "no captions; if they are in {top}/labels.csv, {top}/x.json, pass --captions FILE",
        ],
    ),
    "classes": (
        ("cat/1.png", "cat/2.png", "dog/1.png"),
        [
            "no captions; the images are in 2 folders that may be classes (cat, dog): thresher embed --only image "
            "needs no captions"
        ],
    ),
    "one name": (
        ("a.png", "a.jpg", "a.txt"),
        [
            "2 images with the name of another but for the extension: their keys include it, and they have the same "
            "NAME.txt"
        ],
    ),
}


def test_pictures_with_another_ending_are_told_of(tmp_path: Path) -> None:
    fill(tmp_path, *SMALL, "b.dat", "c.dat", "d.mp4")
    (tmp_path / "b.dat").write_bytes(picture(1, "JPEG"))
    (tmp_path / "c.dat").write_bytes(picture(1, "JPEG"))
    (tmp_path / "e.lnk").symlink_to(tmp_path / "b.dat")
    told = "not read: 4 files (.dat 2, .lnk 1, .mp4 1); .dat may be images: rename them to .jpg"
    assert list(open_data(str(tmp_path)).notes) == [told]


@pytest.mark.parametrize("case", NOTES)
def test_what_is_not_read_is_told(tmp_path: Path, case: str) -> None:
    names, notes = NOTES[case]
    data = open_data(str(fill(tmp_path / "top", *names)))
    assert data.kind == "folder"
    assert list(data.notes) == [note.format(top=tmp_path / "top") for note in notes]


def test_captions_that_are_not_wanted_are_not_told_of(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.png", "dog/2.png", "b.txt", "metadata.jsonl")
    assert not open_data(str(tmp_path), DataOptions(captions=False)).notes


def test_captions_of_a_table_hide_those_beside(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "a.txt", "c.txt")
    (tmp_path / "METADATA.csv").write_text("file_name,text\na.png,one\ngone.png,two\n")
    (tmp_path / "captions.txt").write_text("image,caption\nb.png,three\n")
    data = open_data(str(tmp_path))
    assert [(sample.key, sample.text) for sample in data.samples()] == [("a", "one"), ("b", "")]
    assert list(data.notes) == [
        "not read: 1 file (.txt 1)",
        f"captions come from {tmp_path}/METADATA.csv; not read: {tmp_path}/captions.txt",
        f"1 caption file next to images not read, because captions come from {tmp_path}/METADATA.csv",
        f"1 name in {tmp_path}/METADATA.csv without an image",
    ]


def test_the_file_that_was_named_is_not_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "top", "a.png")
    (tmp_path / "top" / "told.csv").write_text("file_name,text\na.png,one\n")
    monkeypatch.chdir(tmp_path)
    for path in ("top/told.csv", str(tmp_path / "top" / "told.csv"), "./top/../top/told.csv"):
        assert not open_data("top", DataOptions(captions_file=path)).notes


def test_names_in_a_table_may_be_composed_of_other_letters(tmp_path: Path) -> None:
    fill(tmp_path, f"{DECOMPOSED}/{DECOMPOSED}.png", f"x/{COMPOSED}1.png", f"y/{COMPOSED}1.png")
    told = [f"{COMPOSED}/{COMPOSED}.png,one", f"{DECOMPOSED}1.png,of which?"]
    (tmp_path / "captions.csv").write_text("image,caption\n" + "\n".join(told), encoding="utf-8")
    found = {sample.key: sample.text for sample in open_data(str(tmp_path)).samples()}
    assert found == {f"{DECOMPOSED}/{DECOMPOSED}": "one", f"x/{COMPOSED}1": "", f"y/{COMPOSED}1": ""}


def test_links_to_folders_are_not_followed_but_told(tmp_path: Path) -> None:
    top = fill(tmp_path / "top", *SMALL)
    fill(tmp_path / "other", "b.png")
    (top / "loop").symlink_to(top)
    (top / "other").symlink_to(tmp_path / "other")
    data = open_data(str(top))
    assert [sample.key for sample in data.samples()] == ["a"]
    assert list(data.notes) == [
        f"not followed: 2 symlinks to folders, the first: {top}/loop; give the folder itself to read it"
    ]


# --- by content -------------------------------------------------------------------------------------


def test_every_ending_of_a_picture_in_any_case(tmp_path: Path) -> None:
    names = [f"{i}.{ending}" for i, ending in enumerate((*ENDINGS, *map(str.upper, ENDINGS)))]
    data = open_data(str(fill(tmp_path, *names)))
    assert [sample.key for sample in data.samples()] == [str(i) for i in range(len(names))]


def test_without_an_ending_pictures_are_told_by_their_content(tmp_path: Path) -> None:
    fill(tmp_path, "IMG_1", "photo.jpg.1", "p.jpg_large", "2024.01.05", "x.png", "x.bin")
    (tmp_path / "IMG_1.txt").write_text("one")
    (tmp_path / "notes").write_text("no picture")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "elsewhere").symlink_to(Path(__file__))
    (tmp_path / "gone").symlink_to(tmp_path / "not there")
    os.mkfifo(tmp_path / "pipe")
    data = open_data(str(tmp_path))
    found = {sample.key: sample.text for sample in data.samples()}
    assert found == {"2024.01.05": "", "IMG_1": "one", "p.jpg_large": "", "photo.jpg.1": "", "x": ""}
    assert list(data.notes) == ["not read: 6 files (no extension 5, .bin 1)"]


def test_pictures_without_an_ending_are_a_folder_of_pictures(tmp_path: Path) -> None:
    assert open_data(str(fill(tmp_path, "IMG_1", "deep/er/IMG_2"))).kind == "folder"


# --- tables among pictures --------------------------------------------------------------------------


def downloaded(folder: Path) -> Path:
    """What img2dataset writes with --output_format files, as in open_clip#640."""
    for shard in ("00000", "00001"):
        rows = [{"url": f"http://x/{i}", "caption": f"caption {shard}{i}", "key": f"{shard}{i:04d}",
                 "status": "failed_to_download" if i == 2 else "success"} for i in range(4)]  # fmt: skip
        (folder / shard).mkdir(parents=True)
        for i, row in enumerate(rows):
            if i != 2:
                (folder / shard / f"{row['key']}.jpg").write_bytes(picture(i, "JPEG"))
                (folder / shard / f"{row['key']}.txt").write_text(row["caption"])
                (folder / shard / f"{row['key']}.json").write_text(str(row).replace("'", '"'))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
        (folder / f"{shard}_stats.json").write_text("{}")
    return folder


def test_what_img2dataset_writes_as_files(tmp_path: Path) -> None:
    data = open_data(str(downloaded(tmp_path)))
    assert data.kind == "folder"
    assert not data.notes
    assert {sample.key: sample.text for sample in data.samples()} == {
        f"{shard}/{shard}{i:04d}": f"caption {shard}{i}" for shard in ("00000", "00001") for i in (0, 1, 3)
    }


@pytest.mark.parametrize(
    ("columns", "kind", "note"),
    [
        ({"x": [1]}, "folder", "not read: 1 file (.parquet 1)"),
        ({"image": [picture()], "text": ["a"]}, "parquet", "not read: 1 image file next to the parquet files of {top}"),
        ({"image": ["a.png"], "text": ["a"]}, "parquet", ""),
    ],
)
def test_a_table_among_pictures(tmp_path: Path, columns: dict[str, list[object]], kind: str, note: str) -> None:
    fill(tmp_path, *SMALL)
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    data = open_data(str(tmp_path))
    assert data.kind == kind
    assert " ".join(data.notes).startswith(note.format(top=tmp_path))
    assert bool(data.notes) == bool(note)
    forced = open_data(str(tmp_path), DataOptions(reader="folder"))
    assert [sample.text for sample in forced.samples()] == ["a caption"]


def test_a_table_of_captions_is_not_taken_but_told(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    pq.write_table(pa.table({"img_file": ["a.png"], "words": ["one"]}), tmp_path / "t.parquet")
    assert (
        open_data(str(tmp_path)).notes[-1] == f"no captions; if they are in {tmp_path}/t.parquet, pass --captions FILE"
    )
    named = DataOptions(image="img_file", caption="words")
    assert [(s.text, s.stored()) for s in open_data(str(tmp_path), named).samples()] == [("one", picture(0))]


def test_tars_among_pictures(tmp_path: Path) -> None:
    from tests.data.common import sample_tar

    fill(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "0.tar").write_bytes(sample_tar(["x"]))
    data = open_data(str(tmp_path))
    assert data.kind == "webdataset"
    assert list(data.notes) == [
        f"not read: 2 image files next to the tars of {tmp_path} ({tmp_path}/a.png, {tmp_path}/sub/b.png); to read "
        "only these, pass --reader folder"
    ]


def linked(top: Path) -> Path:
    """A folder with nothing but a symlink to a folder of images."""
    fill(top.parent / "elsewhere", "a.png")
    top.mkdir()
    (top / "inner").symlink_to(top.parent / "elsewhere")
    return top


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda top: fill(top, "images.zip", "metadata.jsonl"), r"it has 2 files \(.jsonl 1, .zip 1\); unpack .*s.zip"),
        (lambda top: fill(top, "a.mp4", "b.bin"), r"no known kind of data; it has 2 files \(.bin 1, .mp4 1\)"),
        (
            linked,
            "no known kind of data; not followed: 1 symlink to folders, the first: .*inner; give the folder itself",
        ),
        (lambda top: fill(top, "a.zip") / "a.zip", "a.zip: is an archive; unpack it and give the folder$"),
        (lambda top: fill(top, "a.JPG") / "a.JPG", "a.JPG: is a single image; give the folder that it is in$"),
    ],
)
def test_what_there_is_instead_of_data(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    from thresher.errors import PoolError

    with pytest.raises(PoolError, match=says):
        open_data(str(make(tmp_path / "top")))


@pytest.mark.parametrize("name", ["images", "paths"])
def test_compressed_tars_next_to_tables_are_named(tmp_path: Path, name: str) -> None:
    cells: list[object] = [picture()] if name == "images" else ["a.png"]
    pq.write_table(pa.table({"image": cells, "text": ["a"]}), tmp_path / "t.parquet")
    for packed in ("0.tar.gz", "1.TGZ"):
        (tmp_path / packed).write_bytes(b"\x1f\x8b")
    (note,) = open_data(str(tmp_path)).notes
    assert note.startswith(
        f"not read: 2 compressed tars next to the parquet files of {tmp_path} ({tmp_path}/0.tar.gz, "
    )
    assert note.endswith(f"1.TGZ); decompress them: gzip -dk {tmp_path}/*.tar.gz")


def test_compressed_tars_next_to_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "0.tar.gz").write_bytes(b"\x1f\x8b")
    assert open_data(str(tmp_path)).notes[0] == f"not read: 1 file (.gz 1); unpack {tmp_path}/0.tar.gz"
