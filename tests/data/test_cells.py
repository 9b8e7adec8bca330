"""Images in cells: every form, in every kind of rows, against one table of what each form is."""

from __future__ import annotations

import base64
import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.common import arrow_of, picture
from thresher.data import DataOptions, Sample, open_data
from thresher.data.cells import Roots, is_address, is_base64, name_in, paths_in, picture_of
from thresher.data.samples import SEVERAL, Place
from thresher.errors import PoolError, UsageError
from thresher.io.pictures import open_rgb

NONE = Roots(())
KINDS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]
FORMS = ["csv", "tsv", "jsonl", "parquet", "arrow", "dataset"]


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write(folder: Path, form: str, images: list[Any], **columns: list[Any]) -> str:
    """Rows with images in the column "image" and captions "text", as one file of a form."""
    names = ["image", "text", *columns]
    cells = [images, [f"caption {i}" for i in range(len(images))], *columns.values()]
    found = [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]
    folder.mkdir(exist_ok=True)
    path = folder / f"x.{form}"
    if form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if form == "tsv" else ",", lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    elif form == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif form == "arrow":
        path.write_bytes(arrow_of(pa.Table.from_pylist(found)))
    else:
        path.mkdir()
        (path / "0.arrow").write_bytes(arrow_of(pa.Table.from_pylist(found)))
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "0.arrow"}]}))
        (path / "dataset_info.json").write_text("{}")
    return str(path)


def read(location: str, **options: Any) -> list[Sample]:
    return list(open_data(location, DataOptions(**options)).samples())


# --- base64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_base64_of_every_kind_of_image_is_known_by_its_beginning(kind: str) -> None:
    data = picture(1, kind, size=(40, 30))
    plain = text64(data)
    head = f"data:image/{kind.lower()};base64,"
    for text in (plain, head + plain, f" {plain}\n", base64.encodebytes(data).decode(), head.upper() + plain):
        assert is_base64(text)
        assert picture_of(text, NONE).stored == data
        assert name_in(text) == ""
        assert paths_in(text, Roots(("/a",))) == []
    assert picture_of(base64.urlsafe_b64encode(data).decode(), NONE).stored == data


@given(st.binary(min_size=1, max_size=300))
def test_base64_is_decoded_as_python_does_and_else_refused(data: bytes) -> None:
    head = "data:image/png;base64,"
    assert picture_of(head + text64(data), NONE).stored == data
    for bad in (
        text64(data)[:-1],
        text64(data) + "=",
        "%" + text64(data),
        text64(data)[:2] + "\u00e9" + text64(data)[2:],
    ):
        found = picture_of(head + bad, NONE)
        assert found.stored is None
        assert found.why.startswith("has an image that is not valid base64 (")
        assert not found.missing


@pytest.mark.parametrize(
    "name", ["a.jpg", "/9j/a.jpg", "/9j/" + "photos/" * 9 + "a.jpg", "iVBORw0KGgo", "x" * 5000, "a/b-c_d" * 9, ""]
)
def test_names_are_not_base64(name: str) -> None:
    assert not is_base64(name)


@pytest.mark.parametrize("form", FORMS)
def test_base64_in_every_kind_of_rows(tmp_path: Path, form: str) -> None:
    """OFA, Wukong and LAVIS have images in base64; one here has more characters than Python's reader of csv allows."""
    large = picture(3, "BMP", size=(300, 200))
    assert len(text64(large)) > 131_072
    damaged = text64(picture(2))[:-4] + "%%%%"
    cells = [text64(picture(0)), "data:image/png;base64," + text64(picture(1)), text64(large), damaged]
    location = write(tmp_path, form, cells, id=[7, 8, 9, 10])
    samples = read(location, key="id")
    assert [sample.key for sample in samples] == ["7", "8", "9", "10"]
    assert [sample.stored() for sample in samples[:3]] == [picture(0), picture(1), large]
    assert samples[3].picture is None
    assert samples[3].why.startswith("has an image that is not valid base64")
    assert not samples[3].picture_apart
    named = Path(location).parent / "named"
    assert read(write(named, form, ["a"] * 4, photo=cells), image="photo")[2].stored() == large


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_key_of_a_row_with_its_image_is_its_line(tmp_path: Path, form: str) -> None:
    data = open_data(write(tmp_path, form, [text64(picture(0)), text64(picture(1))]))
    assert [sample.key for sample in data.samples()] == ["line 0", "line 1"]
    (part,) = data.parts
    assert list(part.scan().keys) == ["line 0", "line 1"]
    assert list(part.separate_files(part.scan().start_n)) == [[], []]


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow", "dataset"])
@pytest.mark.parametrize("what", ["paths", "base64", "structs", "bytes"])
def test_of_several_images_the_first_is_used_and_an_empty_list_is_none(tmp_path: Path, form: str, what: str) -> None:
    """Hugging Face's Sequence(Image()), and ``images`` in lines of JSON (data-juicer#600)."""
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    forms: dict[str, list[Any]] = {
        "paths": ["0.png", "1.png"],
        "base64": [text64(picture(0)), text64(picture(1))],
        "structs": [{"bytes": text64(picture(i)) if form == "jsonl" else picture(i), "path": None} for i in range(2)],
        "bytes": [picture(0), picture(1)],
    }
    if (form, what) == ("jsonl", "bytes"):
        pytest.skip("JSON has no bytes")
    first, second = forms[what]
    samples = read(write(tmp_path, form, [[first, second], [second], []]), root=str(tmp_path))
    assert [sample.stored() if sample.picture else None for sample in samples] == [picture(0), picture(1), None]
    assert [sample.notes for sample in samples] == [(SEVERAL,), (), ()]
    assert samples[2].why == "has no image"


def test_numbers_that_are_bytes(tmp_path: Path) -> None:
    cells = pa.array([list(picture(0)), None, [], list(picture(1))], pa.list_(pa.uint8()))
    pq.write_table(pa.table({"image": cells, "text": list("abcd")}), tmp_path / "x.parquet")
    samples = read(str(tmp_path))
    assert [sample.stored() if sample.picture else None for sample in samples] == [picture(0), None, None, picture(1)]
    assert not any(sample.notes for sample in samples)


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("struct", [False, True])
def test_one_rule_for_paths(tmp_path: Path, form: str, struct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is read below the folder of the data or --root, after symlinks are resolved, or with --allow-outside."""
    if struct and form in ("csv", "tsv"):
        pytest.skip("a csv has no structs")
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (inside / "a.png").write_bytes(picture(0))
    (outside / "b.png").write_bytes(picture(1))
    (inside / "link.png").symlink_to(outside / "b.png")
    (inside / "good.png").symlink_to("a.png")
    (inside / "none.png").symlink_to("nowhere.png")
    names = ["a.png", "good.png", "../out/b.png", str(outside / "b.png"), "link.png", "none.png", "c.png", "a\tb"]
    names = names[:-1] if form == "tsv" else names
    cells: list[Any] = [{"bytes": None, "path": name} for name in names] if struct else names
    location = write(inside, form, cells)
    if form == "dataset":  # its own folder is that of the data
        for name in ("a.png", "link.png", "good.png", "none.png"):
            os.rename(inside / name, inside / "x.dataset" / name)
        names = ["../../out/b.png" if name == "../out/b.png" else name for name in names]
        rows = pa.Table.from_pylist(
            [{"image": {"bytes": None, "path": name} if struct else name, "text": "x"} for name in names]
        )
        (inside / "x.dataset" / "0.arrow").write_bytes(arrow_of(rows))
    monkeypatch.chdir(inside)

    def kinds(**options: Any) -> list[str]:
        samples = read(location, **options)
        stored = {picture(0): "a", picture(1): "b"}
        return [stored[s.stored()] if s.picture else " ".join(s.why.split()[3:7]).partition(":")[0] for s in samples]

    found = kinds()
    assert found[:2] == ["a", "a"]
    assert all(one.startswith("outside ") for one in found[2:5])
    assert found[5:] == ["that is not a"] * len(names[5:])
    assert kinds(allow_outside=True)[:5] == ["a", "a", "b", "b", "b"]
    assert kinds(root=str(tmp_path))[3] == "b"
    assert "--allow-outside" in read(location)[3].why
    assert "--root" in read(location)[3].why


def test_places_are_those_of_the_first_folder_that_has_the_image(tmp_path: Path) -> None:
    for i, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "both.png").write_bytes(picture(i))
        (tmp_path / name / f"{name}.png").write_bytes(picture(i))
    roots = Roots((str(tmp_path / "one"), str(tmp_path / "two")))
    assert roots.find("both.png") == (Place(str(tmp_path / "one" / "both.png")), "")
    assert roots.find("two.png") == (Place(str(tmp_path / "two" / "two.png")), "")
    assert roots.paths("x") == [str(tmp_path / "one" / "x"), str(tmp_path / "two" / "x")]
    assert roots.find("x") == (None, "names an image that is not a file: x")
    assert Roots(()).find("x") == (None, "names an image by path, which is read only with --root: x")


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "folder"])
@pytest.mark.parametrize("column", ["image", "URL", "link"])
def test_lists_of_addresses_are_refused_with_the_command_that_downloads(tmp_path: Path, form: str, column: str) -> None:
    """clip-retrieval#393: laion-pop is Parquet with addresses only."""
    addresses = [f"https://example.org/{i}.jpg?a=b" for i in range(3)]
    if form == "folder":
        (tmp_path / "a.png").write_bytes(picture())
        lines = [json.dumps({column: address, "text": "x"}) for address in addresses]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        location, given, kind = str(tmp_path), str(tmp_path / "metadata.jsonl"), "jsonl"
    else:
        columns = {} if column == "image" else {column: addresses}
        location = given = write(tmp_path, form, addresses, **columns)
        if columns:
            location = given = _without_image(location, form)
        kind = {"arrow": "parquet", "dataset": "parquet"}.get(form, form)
    command = (
        f"img2dataset --url_list {given} --input_format {kind} --url_col {column} --caption_col text --output_format "
        "webdataset --output_folder OUT"
    )
    with pytest.raises(PoolError if form == "folder" else UsageError) as error:
        open_data(location)
    only = "images with --only image" if form == "folder" else "captions with --only text"
    assert str(error.value).endswith(f", or embed only the {only}")
    assert f"has the addresses of images in the column '{column}', not images" in str(error.value)
    assert command in str(error.value)
    assert ("write the rows as Parquet" in str(error.value)) == (form in ("arrow", "dataset"))
    if form != "folder":
        assert [s.text for s in read(location, pictures=False)] == ["caption 0", "caption 1", "caption 2"]


def _without_image(location: str, form: str) -> str:
    """The same rows without the column "image"."""
    path = Path(location)
    if form in ("csv", "tsv"):
        delimiter = "\t" if form == "tsv" else ","
        with open(path, newline="") as file:
            rows = [row[1:] for row in csv.reader(file, delimiter=delimiter)]
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
    elif form == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "image"}) + "\n" for row in rows))
    elif form == "parquet":
        pq.write_table(pq.read_table(path).drop_columns("image"), path)
    else:
        inner = path / "0.arrow" if form == "dataset" else path
        inner.write_bytes(arrow_of(pa.ipc.open_stream(inner.read_bytes()).read_all().drop_columns("image")))
    return location


def test_the_caption_column_of_the_command_is_not_guessed(tmp_path: Path) -> None:
    columns = {"URL": ["http://a/b c.jpg"], "alt": ["one"], "llava caption": ["two"], "width": [3]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"--caption_col COLUMN .*\(COLUMN: one of alt, llava caption\)"):
        open_data(str(tmp_path))
    with pytest.raises(UsageError, match="--url_col URL --caption_col 'llava caption' "):
        open_data(str(tmp_path), DataOptions(caption="llava caption"))


@pytest.mark.parametrize("form", FORMS)
def test_some_addresses_among_images_are_counted(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    samples = read(write(tmp_path, form, ["a.png", "https://example.org/a.png"]), root=str(tmp_path))
    assert samples[0].stored() == picture()
    assert samples[1].why == "has the address of an image, not an image: https://example.org/a.png"
    assert not samples[1].picture_apart
    assert is_address("s3://bucket/a.png")
    assert not any(map(is_address, ("a://", "C:/a.png", "a.png", None, 3, "see https://example.org")))


# --- captions alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_captions_without_images(tmp_path: Path, form: str) -> None:
    location = _without_image(write(tmp_path, form, ["a", "b"]), form)
    with pytest.raises(
        PoolError, match=r"no column of image.*--image COLUMN, or embed only the captions with --only text"
    ):
        open_data(location)
    assert [sample.text for sample in read(location, pictures=False)] == ["caption 0", "caption 1"]
    with pytest.raises(UsageError, match="no column 'tex' for --image"):
        open_data(location, DataOptions(pictures=False, image="tex"))
    named = {"pictures": False, "caption": "txt"}
    with pytest.raises(UsageError, match="no column 'txt' for --caption"):
        open_data(location, DataOptions(**named))


def test_images_of_a_table_are_not_read_for_its_captions(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [picture()], "text": ["a"], "key": ["k"]}), tmp_path / "x.parquet")
    (part,) = open_data(str(tmp_path), DataOptions(pictures=False)).parts
    assert part.roles() == {"picture": None, "caption": "text", "key": "key", "uid": None}
    (sample,) = part.samples()
    assert (sample.key, sample.text, sample.picture) == ("k", "a", None)
    open_rgb(read(str(tmp_path))[0].stored())
