"""A csv from a csv: lines byte for byte."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from thresher.data import DataOptions
from thresher.errors import UsageError
from thresher.resharding import reshard

from .common import keys_file, pool

HEAD = b"filepath\ttitle\r\n"
LINES = [b'a.jpg\t"two\nlines"\r\n', b"b.jpg\tplain\n", b"\n", b'"c\t.jpg"\t"say ""hi"""\n', "d.jpg\tümlaut".encode()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all.csv").write_bytes(b"\xef\xbb\xbf" + HEAD + b"".join(LINES))
    return tmp_path / "in" / "all.csv"


@pytest.mark.parametrize("per_part", [1, 2, 100])
def test_lines_are_copied_as_they_are(data: Path, tmp_path: Path, per_part: int) -> None:
    sel = keys_file(tmp_path / "k", ["d.jpg", "d.jpg", "a.jpg", "nowhere"])
    done = reshard(str(data), sel, str(tmp_path / "out"), options=DataOptions(per_part=per_part))
    made = (tmp_path / "out" / "train.csv").read_bytes()
    assert made == b"\xef\xbb\xbf" + HEAD + LINES[0] + 2 * (LINES[4] + b"\n")
    assert (done.form, done.shards, done.samples, done.missing) == ("csv", 1, 3, 1)
    assert pd.read_csv(tmp_path / "out" / "train.csv", sep="\t")["filepath"].tolist() == ["a.jpg", "d.jpg", "d.jpg"]


def test_the_same_lines_in_another_order(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [f"{i}.jpg\ttitle {i}" for i in range(300)]
    (tmp_path / "in" / "all.csv").write_text("filepath\ttitle\n" + "\n".join(lines))
    sel = keys_file(tmp_path / "k", [f"{i}.jpg" for i in range(0, 300, 2)])
    reshard(str(tmp_path / "in" / "all.csv"), sel, str(tmp_path / "out"), shuffle=1)
    head, *found = (tmp_path / "out" / "train.csv").read_text().splitlines()
    assert head == "filepath\ttitle"
    assert sorted(found) == sorted(lines[::2])
    assert found != lines[::2]


def test_places_tell_apart_captions_of_one_picture(tmp_path: Path) -> None:
    """As in Flickr8k: every picture stands there several times."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all.csv").write_text("filepath,title\n" + "".join(f"a.jpg,title {i}\n" for i in range(5)))
    sel = pool(tmp_path, [("a.jpg", "all.csv", i) for i in range(5)], [1, 4])
    assert reshard(str(tmp_path / "in" / "all.csv"), sel, str(tmp_path / "out")).by == "place"
    assert (tmp_path / "out" / "train.csv").read_text() == "filepath,title\na.jpg,title 1\na.jpg,title 4\n"
    with pytest.raises(UsageError, match="the same key as another chosen sample"):
        reshard(str(tmp_path / "in" / "all.csv"), keys_file(tmp_path / "k", ["a.jpg"]), str(tmp_path / "out2"))


def test_old_line_ends_are_copied(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all.csv").write_bytes(b"filepath\ttitle\ra.jpg\tone\rb.jpg\ttwo\rc.jpg\tthree")
    reshard(str(tmp_path / "in" / "all.csv"), keys_file(tmp_path / "k", ["a.jpg", "c.jpg"]), str(tmp_path / "out"))
    assert (tmp_path / "out" / "train.csv").read_bytes() == b"filepath\ttitle\ra.jpg\tone\rc.jpg\tthree\n"
    assert pd.read_csv(tmp_path / "out" / "train.csv", sep="\t")["title"].tolist() == ["one", "three"]


def test_blank_lines_before_the_names_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all.csv").write_bytes(b"\n\r\nfilepath,title\na.jpg,one\nb.jpg,two\n")
    reshard(str(tmp_path / "in" / "all.csv"), keys_file(tmp_path / "k", ["b.jpg"]), str(tmp_path / "out"))
    assert (tmp_path / "out" / "train.csv").read_bytes() == b"filepath,title\nb.jpg,two\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_csv_without_names_of_columns_gets_them(tmp_path: Path, mark: bytes) -> None:
    """Else the csv that is written could not be read without the option."""
    (tmp_path / "in").mkdir()
    lines = [b"%d.jpg,caption %d\n" % (i, i) for i in range(4)]
    (tmp_path / "in" / "all.csv").write_bytes(mark + b"".join(lines))
    for name, how in (("out", {}), ("shuffled", {"shuffle": 0})):
        sel = keys_file(tmp_path / "k", ["0.jpg", "2.jpg"])
        options = DataOptions(columns="filepath,my title", caption="my title")
        done = reshard(str(tmp_path / "in" / "all.csv"), sel, str(tmp_path / name), options=options, **how)
        assert (done.form, done.samples) == ("csv", 2)
        head, *rest = (tmp_path / name / "train.csv").read_bytes().splitlines(keepends=True)
        assert head == b"filepath,my title\n"
        assert sorted(rest) == [lines[0], lines[2]]
