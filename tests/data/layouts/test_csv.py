"""Csv files, against pandas as open_clip uses it."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.common import picture
from thresher.data import DataOptions, open_data
from thresher.errors import ChangedError, PoolError, UsageError
from thresher.testing.data_reader import DATA, pairs

fields = st.text(st.sampled_from("ab \u00fc\u4e2d,;\t\n\"'\\"), max_size=8)


@st.composite
def csvs(draw: st.DrawFn) -> bytes:
    """A csv of paths and titles with quotes, breaks, blank lines (also before the names), short and long rows."""
    delimiter, end = draw(st.sampled_from("\t,")), draw(st.sampled_from(["\n", "\r\n"]))
    columns = draw(st.permutations(["filepath", "title", "more"]))
    file = io.StringIO()
    file.write(draw(st.sampled_from(["", "", end, "  " + end + end])))
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow(columns)
    for _ in range(draw(st.integers(1, 8))):
        writer.writerow([draw(fields) or "x" for _ in columns][: draw(st.sampled_from([3, 3, 3, 2]))])
        file.write(draw(st.sampled_from(["", "", end, end * 2])))
    text = file.getvalue()
    text = text.removesuffix(end) if draw(st.booleans()) else text
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()


@given(csvs(), st.integers(1, 5))
def test_rows_are_those_of_open_clips_reader(tmp_path: Path, data: bytes, per_part: int) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(data)
    delimiter = "\t" if b"\t" in data.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")[0] else ","
    frame = pd.read_csv(path, sep=delimiter, keep_default_na=False, na_filter=False)
    expected = [
        (str(name) or f"line {i}", str(text).strip())
        for i, (name, text) in enumerate(zip(frame["filepath"], frame["title"], strict=True))
    ]
    opened = open_data(str(path), DataOptions(per_part=per_part))
    found = list(opened.samples())
    assert [(s.key, s.text) for s in found] == expected
    assert [s.at for s in found] == list(range(len(expected)))
    assert [part.first for part in opened.parts] == list(range(0, len(expected), per_part))


def test_open_clips_own_data_set_reads_the_same(tmp_path: Path) -> None:
    from open_clip_train.data import CsvDataset

    for name in ("a.png", "b c.png"):
        (tmp_path / name).write_bytes(picture())
    path = tmp_path / "x.csv"
    path.write_text(f'filepath\ttitle\n{tmp_path}/a.png\t"one ""two"""\n\n{tmp_path}/b c.png\tthree, four\n')
    theirs = CsvDataset(
        str(path), lambda image: image.convert("RGB").tobytes(), "filepath", "title", tokenizer=lambda t: t
    )
    ours = list(open_data(str(path)).samples())
    assert [(s.key, s.text) for s in ours] == list(zip(theirs.images, theirs.captions, strict=True))
    assert [s.stored() for s in ours] == [picture()] * 2
    assert len(theirs) == len(ours) == 2


def test_a_caption_may_be_one_that_pandas_takes_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("filepath\ttitle\na\tNone\nb\tNA\nc\n\td\n")
    assert [(s.key, s.text, s.why) for s in open_data(str(path)).samples()] == [
        ("a", "None", "names an image that is not a file: a"),
        ("b", "NA", "names an image that is not a file: b"),
        ("c", "", "names an image that is not a file: c"),
        ("line 3", "d", "has no image"),
    ]


def test_where_pictures_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current folder, as open_clip does; then beside the csv; with a root only there."""
    here, beside, root = (tmp_path / name for name in ("here", "beside", "root"))
    for i, folder in enumerate((here, beside, root)):
        folder.mkdir()
        (folder / "all.png").write_bytes(picture(i))
        (folder / f"{folder.name}.png").write_bytes(picture(i))
    (tmp_path / "out.png").write_bytes(picture(9))
    path = beside / "x.tsv"
    names = ["all.png", "here.png", "beside.png", "root.png", "../out.png", str(tmp_path / "out.png")]
    path.write_text("filepath\ttitle\n" + "".join(f"{name}\tx\n" for name in names))
    monkeypatch.chdir(here)

    def seen(**how: Any) -> list[bytes | None]:
        data = open_data(str(path), DataOptions(**how))
        with monkeypatch.context() as patch:
            patch.chdir("/")
            return [s.stored() if s.picture else None for s in data.samples()]

    out = picture(9)
    assert seen() == [picture(0), picture(0), picture(1), None, None, None]
    assert seen(root=os.path.relpath(root)) == [picture(2), None, None, picture(2), None, None]
    assert seen(allow_outside=True) == [picture(0), picture(0), picture(1), None, out, out]
    assert seen(root=os.path.relpath(root), allow_outside=True) == [picture(2), None, None, picture(2), out, out]
    why = [s.why for s in open_data(str(path)).samples()][-1]
    assert re.fullmatch(r"names an image outside .*here and .*beside: .*out.png; if you trust the file, pass .*", why)


def test_columns_may_be_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("url,title,words\nu,t,w\n")
    with pytest.raises(
        PoolError,
        match=r"has no column of image paths \(filepath, .*\); it has url, title, words; name one with --image COLUMN",
    ):
        open_data(str(path))
    (sample,) = open_data(str(path), DataOptions(image="url", caption="words")).samples()
    assert (sample.key, sample.text) == ("u", "w")
    with pytest.raises(UsageError, match=r"no column 'word' for --caption.*Did you mean 'words'"):
        open_data(str(path), DataOptions(image="url", caption="word"))
    path.write_text("filepath\na\n")
    with pytest.raises(
        PoolError, match=r"has no column of captions \(title, .*\); it has filepath; name one with --caption COLUMN"
    ):
        open_data(str(path))
    assert [s.text for s in open_data(str(path), DataOptions(captions=False)).samples()] == [""]


def test_a_csv_that_has_changed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("filepath\ttitle\n" + "a\tb\n" * 10)
    data = open_data(str(path))
    path.write_text("filepath\ttitle\n" + "a\tb\n" * 3)
    with pytest.raises(ChangedError, match="has fewer rows than when it was opened"):
        list(data.samples())


@pytest.mark.slow
def test_many_lines_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("filepath\ttitle\n" + "".join(f"p/{i}.jpg\tcaption {i}\n" for i in range(100_000)))
    tracemalloc.start()
    data = open_data(str(path))
    assert sum(1 for part in data.parts[-1:] for _ in part.samples()) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.parts) == 10
    assert peak < 1 << 20


def test_a_quote_that_is_never_closed_is_an_error_not_one_long_caption(tmp_path: Path) -> None:
    for name, delimiter, first in (("a.csv", "\t", "filepath\ttitle\n"), ("captions.txt", ",", "image,caption\n")):
        lines = [f"{i}.png{delimiter}{chr(34) if i == 2 else ''}caption {i}\n" for i in range(6)]
        (tmp_path / name).write_text(first + "".join(lines))
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    begin = len("filepath\ttitle\n") + 2 * len("0.png\tcaption 0\n")
    with pytest.raises(PoolError, match=rf"a.csv: the quote that opens in the row at byte {begin} is never closed"):
        open_data(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").unlink()
    with pytest.raises(PoolError, match="captions.txt: the quote that opens in the row at byte .* is never closed"):
        open_data(str(tmp_path))


def test_keys_do_not_climb(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.csv").write_text("filepath\ttitle\n../in/a.png\tone\n")
    (sample,) = open_data(str(tmp_path / "lists" / "a.csv"), DataOptions(allow_outside=True)).samples()
    assert sample.key == "%2E%2E/in/a.png"
    assert sample.stored() == b"x"
    (tmp_path / "lists" / "a.csv").write_text(
        "filepath\ttitle\na..b/..c/d...png\tone\n/x/../y.png\ttwo\n..\\z\tthree\n"
    )
    keys = [sample.key for sample in open_data(str(tmp_path / "lists" / "a.csv")).samples()]
    assert keys == ["a..b/..c/d...png", "/x/%2E%2E/y.png", "%2E%2E\\z"]


def test_a_column_is_never_guessed_and_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("file_name,width,height,prompt\na.png,512,512,a dog\n")
    with pytest.raises(
        PoolError, match=r"no column of captions .*; it has file_name, width, height, prompt; .*--caption"
    ):
        open_data(str(path))
    (sample,) = open_data(str(path), DataOptions(caption="prompt")).samples()
    assert (sample.key, sample.text) == ("a.png", "a dog")
    path.write_text("a.png,a dog\nb.png,a cat\n")
    with pytest.raises(
        PoolError,
        match="first line is a row, not the names of its columns: a.png,a dog; name the columns, .*--columns filepath,",
    ):
        open_data(str(path))


def test_keys_may_be_a_column(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("filepath,title,id\na.png,a dog,7\nb.png,a cat,\nc.png,a cow,../x\n")
    opened = open_data(str(path), DataOptions(key="id"))
    assert [s.key for s in opened.samples()] == ["7", "b.png", "%2E%2E/x"]
    assert list(opened.parts[0].scan().keys) == ["7", "b.png", "%2E%2E/x"]
    with pytest.raises(UsageError, match="no column 'ids' for --key; it has filepath, title, id.*Did you mean 'id'"):
        open_data(str(path), DataOptions(key="ids"))
    with pytest.raises(
        UsageError, match="--captions .* is a csv, which does not use it; name the column with --caption"
    ):
        open_data(str(path), DataOptions(captions_file=str(path)))


@pytest.mark.parametrize(
    "content",
    [
        "image_name| comment_number| comment\na.png| 0| a dog , running .\n",  # Flickr30k
        "filepath;title\na.png;a dog , running .\n",
        "filepath|title\na.png|a dog , running .\n",
        "Filepath\tTitle\ra.png\ta dog , running .\r",
    ],
)
def test_other_delimiters_and_line_ends(tmp_path: Path, content: str) -> None:
    """open_clip#789: which delimiter a csv has."""
    path = tmp_path / "x.csv"
    path.write_text(content, newline="")
    assert [(s.key, s.text) for s in open_data(str(path)).samples()] == [("a.png", "a dog , running .")]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("per_part", [1, 10])
def test_names_of_columns_may_be_given(tmp_path: Path, mark: bytes, per_part: int) -> None:
    """OFA's and Wukong's tsv have no first line of names: uid, image in base64, caption."""
    image = base64.b64encode(picture(0)).decode()
    path = tmp_path / "x.tsv"
    path.write_bytes(mark + f"7\t{image}\ta dog\n8\t{image}\ta cat\n".encode())
    shown = rf"x.tsv: its first line is a row, .*: 7.t{re.escape(image[:20])}.*a dog; .* --columns column1,image,title"
    with pytest.raises(PoolError, match=shown):
        open_data(str(path))
    told = DataOptions(columns="id, image, caption", key="id", per_part=per_part)
    data = open_data(str(path), told)
    assert [(s.key, s.text, s.stored()) for s in data.samples()] == [
        ("7", "a dog", picture(0)),
        ("8", "a cat", picture(0)),
    ]
    assert data.parts[0].scan().start_n[0] == len(mark)
    with pytest.raises(UsageError, match="--columns names 2 columns .image, caption., but the first line has 3"):
        open_data(str(path), DataOptions(columns="image,caption"))
    with pytest.raises(UsageError, match="no column 'title' for --caption; it has id, image, caption"):
        open_data(str(path), DataOptions(columns="id,image,caption", caption="title"))
    for wrong in ("", "a,", "a,b,a"):
        with pytest.raises(UsageError, match="give a different name for each column"):
            DataOptions(columns=wrong)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "webdataset", "folder", "arrow"])
def test_names_of_columns_are_for_a_csv(tmp_path: Path, kind: str) -> None:
    location = DATA[kind](tmp_path / "data", pairs(3), 1)
    with pytest.raises(UsageError, match=f"--columns a,b: .* is data of the reader {kind}, which does not use it"):
        open_data(location, DataOptions(columns="a,b"))


@pytest.mark.parametrize(
    ("first", "columns"),
    [
        ("in/a.png", "filepath"),
        ("in/noending", "filepath"),
        ("https://example.org/a,one two", "url,title"),
        ("one two\tin/noending", "title,filepath"),
        ("1\timage\tin/a.png\ta caption that is long", "column1,column2,filepath,title"),
    ],
)
def test_a_first_line_that_is_a_row_is_shown(tmp_path: Path, first: str, columns: str) -> None:
    """A file without names of columns would lose its first row."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "noending"):
        (tmp_path / "in" / name).write_bytes(picture())
    for name in ("x.csv", "x.txt"):
        (tmp_path / name).write_text(f"{first}\n{first}\n")
        with pytest.raises(PoolError) as error:
            open_data(str(tmp_path / name))
        shown = first.replace("\t", "\\t")
        assert f"first line is a row, not the names of its columns: {shown}; name" in str(error.value)
        assert str(error.value).endswith(f"--columns {columns}")


def test_a_file_with_the_name_of_a_column_is_not_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("filepath", "title"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "x.csv").write_text("filepath,title\ntitle,one\n")
    assert [s.text for s in open_data("x.csv").samples()] == ["one"]


def test_rows_with_more_cells_than_columns_are_not_cut_off(tmp_path: Path) -> None:
    """Without quotes, "a dog, running" would become "a dog"."""
    (tmp_path / "a.png").write_bytes(picture())
    path = tmp_path / "x.csv"
    path.write_text('filepath,title\na.png,a dog, running\na.png,"a dog, running"\na.png,a cat,,\na.png\n')
    found = [(s.text, s.picture is not None, s.why) for s in open_data(str(path)).samples()]
    why = "has 3 cells, but there are 2 columns; put quotes around a cell with the delimiter"
    assert found == [("", False, why), ("a dog, running", True, ""), ("a cat", True, ""), ("", True, "")]


@pytest.mark.parametrize("ending", [".csv.gz", ".tsv.zst", ".jsonl.gz", ".ndjson.bz2", ".csv.zip", ".txt.xz"])
def test_compressed_lists_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    for name, quote in (("x", ""), ("x y", "'")):
        (tmp_path / f"{name}{ending}").write_bytes(b"\x1f\x8b")
        with pytest.raises(
            PoolError,
            match=rf"{name}{ending}: is compressed, .*: (gunzip -k|zstd -d|bunzip2 -k|unxz -k|unzip) {quote}/",
        ):
            open_data(str(tmp_path / f"{name}{ending}"))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_several_lists_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    """Spark writes a folder of files with the name of one."""
    (tmp_path / f"all.{ending}").mkdir()
    for i in range(3):
        (tmp_path / f"all.{ending}" / f"{i}.{ending}").write_text("filepath,title\na,b\n")
    for where in (tmp_path / f"all.{ending}", tmp_path / f"all.{ending}" / f"*.{ending}"):
        with pytest.raises(PoolError, match=f"{ending}: is 3 files; give one of them, or join them into one file"):
            open_data(str(where))


def test_paths_of_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/0.png", "a\\1.png", "a/1.png"):
        (tmp_path / name).write_bytes(picture(len(name)))
    (tmp_path / "x.csv").write_text("filepath,title\na\\0.png,x\na\\1.png,y\n..\\up.png,z\n")
    (tmp_path.parent / "up.png").write_bytes(picture())
    samples = list(open_data(str(tmp_path / "x.csv")).samples())
    found = [sample.picture.path if sample.picture else None for sample in samples]  # type: ignore[union-attr]
    assert found == [str(tmp_path / "a/0.png"), str(tmp_path / "a\\1.png"), None], "a name as it is comes first"
    assert "outside" in samples[2].why
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "names.csv").write_text("file_name,text\nC:\\data\\0.png,x\n.\\1.png,y\n")
    folder = open_data(str(tmp_path / "pictures"), DataOptions(captions_file=str(tmp_path / "names.csv")))
    assert [sample.text for sample in folder.samples()] == ["x", "y"]


def test_the_column_of_several_with_captions_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("filepath,caption,text\na.png,x,y\n")
    assert open_data(str(path)).notes == (
        f"{path}: captions come from the column text, not from caption; --caption names another",
    )
    for options in (DataOptions(caption="caption"), DataOptions(captions=False)):
        assert open_data(str(path), options).notes == ()
