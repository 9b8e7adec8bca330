"""Pictures of any data as webdataset tars: stored bytes, captions and the rest as json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.data import open_data
from thresher.errors import UsageError
from thresher.io.pictures import as_png
from thresher.resharding import reshard
from thresher.resharding.convert import safe_name

from .common import hashes, keys_file, listed, picture


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, content in listed(folder):
        key, _, ending = name.partition(".")
        found.setdefault(key, {})[ending] = content
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures at several depths, with captions beside them."""
    for i, name in enumerate(["a.png", "b/c d.jpg", "b/c.e.webp", "é.gif", "z.png"]):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG"}.get(name[-3:], path.suffix[1:].upper())
        path.write_bytes(picture(i, kind))
        path.with_suffix(".txt").write_text(f"caption {i}")
    return tmp_path / "in"


@pytest.mark.parametrize("shuffle", [None, 3])
def test_from_raw_pictures_to_tars(pictures: Path, tmp_path: Path, shuffle: int | None) -> None:
    (pictures / "z.png").write_bytes(b"<svg/>")
    keys = ["a", "b/c d", "b/c.e", "é", "é", "z", "gone"]
    sel = keys_file(tmp_path / "k", keys)
    done = reshard(str(pictures), sel, str(tmp_path / "out"), per_shard=2, shuffle=shuffle)
    found = samples_of(tmp_path / "out")
    assert set(found) == {"a", "b%2Fc%20d", "b%2Fc%2Ee", "%C3%A9", "%C3%A9-1"}
    assert found["b%2Fc%20d"]["jpg"] == (pictures / "b" / "c d.jpg").read_bytes()
    assert found["b%2Fc%2Ee"]["webp"] == (pictures / "b" / "c.e.webp").read_bytes()
    assert found["%C3%A9-1"]["png"] == as_png((pictures / "é.gif").read_bytes())
    assert json.loads(found["b%2Fc%2Ee"]["json"]) == {"key": "b/c.e", "caption": "caption 2"}
    assert json.loads(found["%C3%A9-1"]["json"])["key"] == "é-1"
    assert found["a"]["txt"] == b"caption 0"
    assert (done.samples, done.missing, done.aside, done.form) == (5, 1, 1, "webdataset")
    assert (done.converted, done.renamed, done.captioned, done.blank, done.left_out) == (2, 0, 0, 0, {})
    assert "\tz\tis not in a supported image format" in (tmp_path / "out" / "set-aside.txt").read_text()
    assert sum(json.loads((tmp_path / "out" / "sizes.json").read_text()).values()) == 5
    again = [(sample.key, sample.text) for sample in open_data(str(tmp_path / "out")).samples()]
    assert dict(again)["b%2Fc%20d"] == "caption 1"
    assert not (tmp_path / "out" / ".reshard").exists()


@pytest.mark.parametrize("shuffle", [None, 0])
def test_from_parquet_to_tars(tmp_path: Path, shuffle: int | None) -> None:
    (tmp_path / "in").mkdir()
    for part in range(2):
        rows = range(10 * part, 10 * part + 10)
        table = pa.table(
            {
                "image": [{"bytes": picture(i), "path": None} if i != 4 else None for i in rows],
                "text": [f"text {i}" for i in rows],
                "uid": [f"{i:032x}" for i in rows],
                "score": [float("nan") if i == 3 else i / 2 for i in rows],
                "vector": [[1.0, 2.0]] * 10,
            }
        )
        pq.write_table(table, tmp_path / "in" / f"{part}.parquet", row_group_size=3)
    times = Counter({f"{i:032x}": 1 for i in (0, 3, 4, 11)}) + Counter({f"{19:032x}": 3})
    sel = keys_file(tmp_path / "k", times.elements())
    for workers in (1, 2):
        done = reshard(
            str(tmp_path / "in"), sel, str(tmp_path / f"out{workers}"), form="webdataset", per_shard=2, shuffle=shuffle,
            workers=workers,
        )  # fmt: skip
        (tmp_path / f"out{workers}" / "reshard.json").unlink()
    assert hashes(tmp_path / "out1") == hashes(tmp_path / "out2")
    found = samples_of(tmp_path / "out1")
    wanted = [f"{i:032x}" for i in (0, 3, 11, 19)] + [f"{19:032x}-1", f"{19:032x}-2"]
    assert list(found) == wanted if shuffle is None else sorted(found) == sorted(wanted)
    assert found[wanted[2]]["png"] == picture(11)
    told = json.loads(found[wanted[2]]["json"])
    assert told == {"key": wanted[2], "uid": wanted[2], "caption": "text 11", "score": 5.5}
    assert json.loads(found[wanted[1]]["json"])["score"] is None
    assert (done.samples, done.aside, done.missing) == (6, 1, 0)


def test_from_csv_to_tars(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
    rows = "".join(f"{i}.png\ttitle {i}\n" for i in range(5))
    (tmp_path / "in" / "all.csv").write_text("filepath\ttitle\n" + rows)
    sel = keys_file(tmp_path / "k", ["1.png", "3.png", "4.png"])
    done = reshard(str(tmp_path / "in" / "all.csv"), sel, str(tmp_path / "out"), form="webdataset")
    found = samples_of(tmp_path / "out")
    assert {key: (one["png"], one["txt"]) for key, one in found.items()} == {
        "1%2Epng": (picture(1), b"title 1"), "3%2Epng": (picture(3), b"title 3"),
    }  # fmt: skip
    assert (done.samples, done.aside) == (2, 1)
    assert "4.png" in (tmp_path / "out" / "set-aside.txt").read_text()


def test_tars_are_made_into_tables(tmp_path: Path) -> None:
    from .common import plain, tar

    tar(tmp_path / "in" / "0.tar", plain(5))
    sel = keys_file(tmp_path / "k", ["000001", "000003", "000003"])
    for name, more in (("out", {}), ("mixed", {"shuffle": 1})):
        done = reshard(str(tmp_path / "in"), sel, str(tmp_path / name), form="parquet", **more)
        assert (done.samples, done.form) == (3, "parquet")
        found = [(sample.key, sample.text, sample.stored()) for sample in open_data(str(tmp_path / name)).samples()]
        wanted = [(f"00000{key}", f"picture {int(key[0])}", picture(int(key[0]))) for key in ("1", "3", "3-1")]
        assert sorted(found) == wanted
    with pytest.raises(UsageError, match=r"--as csv: .* is webdataset; allowed: webdataset, parquet"):
        reshard(str(tmp_path / "in"), sel, str(tmp_path / "csv"), form="csv")


@given(st.lists(st.text(max_size=300), unique=True, max_size=20))
def test_safe_names_are_safe_and_their_own(keys: list[str]) -> None:
    names = [safe_name(key) for key in keys]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 180 and not set(name) & set("./\\\0\n\t ") for name in names)
