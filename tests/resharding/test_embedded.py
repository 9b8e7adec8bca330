"""From raw data through a pool and a selection to new shards, as a user goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.cli.main import main
from thresher.data import open_data
from thresher.resharding import reshard

from .common import picture, plain, tar


def raw(folder: Path, kind: str) -> str:
    """25 pictures of any kind of data, in several files; tars and tables have every key twice."""
    folder.mkdir()
    if kind == "tars":
        for name, first in (("a/0", 0), ("a/1", 10), ("b/1", 20)):
            samples = [(key, {**found, "txt": f"{name} {key}".encode()}) for key, found in plain(8, 0)]
            tar(folder / f"{name}.tar", samples[: 5 + first // 10])
        return "::".join(str(folder / f"{name}.tar") for name in ("a/0", "a/1", "b/1"))
    if kind == "parquet":
        for part in range(2):
            rows = {"image": [picture(i) for i in range(9)], "text": [f"{part} {i}" for i in range(9)]}
            pq.write_table(pa.table({**rows, "key": [f"k{i}" for i in range(9)]}), folder / f"{part}.parquet")
        return str(folder)
    for i in range(12):
        (folder / f"{i}.png").write_bytes(picture(i))
    if kind == "folder":
        (folder / "captions.txt").write_text("".join(f"{i}.png\tpicture {i}\n" for i in range(12)))
        return str(folder)
    lines = "".join(f"{i % 12}.png\tcaption {i}\n" for i in range(24))
    (folder / "all.csv").write_text("filepath\ttitle\n" + lines)
    return str(folder / "all.csv")


@pytest.mark.parametrize("kind", ["tars", "parquet", "csv", "folder"])
def test_the_samples_of_the_selection_come_out(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    data, pool, sel = raw(tmp_path / "in", kind), str(tmp_path / "pool"), str(tmp_path / "sel")
    embed = ["embed", data, "-o", pool, "--encoder", "tests.resharding.colours:Colours", "--workers", "0", "--quiet"]
    assert main(embed) == 0, capsys.readouterr().err
    assert main(["select", "random", pool, "-o", sel, "--keep", "50%", "--quiet", "--key", "row"]) == 0
    mask = np.load(tmp_path / "sel" / "mask.npy")
    texts = [sample.text for sample in open_data(data).samples()]
    done = reshard(data, sel, str(tmp_path / "out"))
    assert done.by == "place"
    out = str(tmp_path / "out" / "train.csv") if kind == "csv" else str(tmp_path / "out")
    found = [sample.text for sample in open_data(out).samples()]
    assert found == [text for text, kept in zip(texts, mask, strict=True) if kept]
    if kind not in ("folder", "tars"):
        again = reshard(data, sel, str(tmp_path / "tars"), form="webdataset", shuffle=0)
        assert (again.samples, again.by) == (mask.sum(), "place")
        assert sorted(sample.text for sample in open_data(str(tmp_path / "tars")).samples()) == sorted(found)


def test_numbers_of_rows_are_not_taken_for_keys(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They might even be keys, of other samples."""
    data, pool, sel = raw(tmp_path / "in", "folder"), str(tmp_path / "pool"), str(tmp_path / "sel")
    embed = ["embed", data, "-o", pool, "--encoder", "tests.resharding.colours:Colours", "--workers", "0", "--quiet"]
    assert main(embed) == 0
    assert main(["select", "random", pool, "-o", sel, "--keep", "50%", "--quiet", "--key", "row"]) == 0
    (tmp_path / "in" / "0.png").unlink()
    capsys.readouterr()
    assert main(["reshard", data, sel, "-o", str(tmp_path / "out"), "--quiet"]) == 2
    assert "its rows are identified by their numbers, which are not keys" in capsys.readouterr().err
    assert main(["select", "random", pool, "-o", sel, "--keep", "50%", "--quiet", "--overwrite"]) == 0
    assert reshard(data, sel, str(tmp_path / "out")).by == "key"


def test_a_pool_that_was_moved_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, pool, sel = raw(tmp_path / "in", "folder"), tmp_path / "pool", str(tmp_path / "sel")
    asked = ["--encoder", "tests.resharding.colours:Colours", "--workers", "0", "--quiet"]
    assert main(["embed", data, "-o", str(pool), *asked]) == 0
    assert main(["select", "random", str(pool), "-o", sel, "--keep", "50%", "--quiet"]) == 0
    pool.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["reshard", data, sel, "-o", str(tmp_path / "out"), "--quiet"]) == 2
    assert "say where it is with --pool" in capsys.readouterr().err
    moved = ["--pool", str(tmp_path / "elsewhere")]
    assert main(["reshard", data, sel, "-o", str(tmp_path / "out"), "--quiet", *moved]) == 0
    assert "found by place" in capsys.readouterr().out
    assert main(["reshard", sel, data, "-o", str(tmp_path / "again")]) == 2
    assert "is a selection, not data; type thresher reshard DATA SEL" in capsys.readouterr().err


def test_files_of_one_name_that_a_pool_grew_by(tmp_path: Path) -> None:
    """As every download of img2dataset begins with 00000.tar and 000000000."""
    pool, sel = str(tmp_path / "pool"), str(tmp_path / "sel")
    asked = ["--encoder", "tests.resharding.colours:Colours", "--workers", "0", "--quiet"]
    for name in ("a", "b"):
        samples = [(key, {**found, "txt": f"{name} {key}".encode()}) for key, found in plain(8, 0)]
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "00000.tar", samples)
        assert main(["embed", str(tmp_path / name), "-o", pool, *asked]) == 0
    assert main(["select", "random", pool, "-o", sel, "--keep", "50%", "--quiet", "--key", "row"]) == 0
    data = f"{tmp_path}/a::{tmp_path}/b"
    done = reshard(data, sel, str(tmp_path / "out"))
    mask = np.load(tmp_path / "sel" / "mask.npy")
    assert (done.by, done.samples) == ("place", mask.sum())
    texts = [sample.text for sample in open_data(data).samples()]
    found = [sample.text for sample in open_data(str(tmp_path / "out")).samples()]
    assert found == [text for text, kept in zip(texts, mask, strict=True) if kept]
