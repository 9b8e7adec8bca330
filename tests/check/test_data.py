"""What ``doctor`` says of raw data: nothing of good ones, and every fault that was put into others."""

from __future__ import annotations

import io
import json
import re
import shlex
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from thresher.check import data as doctoring
from thresher.check.data import doctor
from thresher.cli.main import main
from thresher.data import DataOptions
from thresher.data.samples import SEVERAL
from thresher.errors import PoolError, UsageError
from thresher.testing.data_reader import DATA, pairs

SHARDS, EACH = 4, 30


def picture(seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def enormous() -> bytes:
    """A PNG whose header says 50,000 x 50,000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animated(size: tuple[int, int] = (20, 20)) -> bytes:
    first, second = (Image.new("RGB", size, colour) for colour in ("red", "blue"))
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second])
    return file.getvalue()


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Row:
    """A sample to be written."""

    key: str
    text: str
    image: bytes | None
    others: dict[str, bytes] = field(default_factory=dict)


def rows(count: int = SHARDS * EACH) -> list[Row]:
    return [Row(f"{i:05d}", f"the picture number {i}", picture(i)) for i in range(count)]


def tars(folder: Path, them: list[Row], shards: int = SHARDS, sizes: bool = True) -> Path:
    folder.mkdir()
    counts = {}
    for shard in range(shards):
        here = them[shard * len(them) // shards : (shard + 1) * len(them) // shards]
        counts[f"{shard:05d}.tar"] = len(here)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for row in here:
                image = {} if row.image is None else {"jpg": row.image}
                for ending, content in {**image, "txt": row.text.encode(), **row.others}.items():
                    member = tarfile.TarInfo(f"{row.key}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    if sizes:
        (folder / "sizes.json").write_text(json.dumps(counts))
    return folder


def parquet(path: Path, them: list[Row], files: int = 1) -> Path:
    path.mkdir()
    for i in range(files):
        here = them[i * len(them) // files : (i + 1) * len(them) // files]
        image = [{"bytes": row.image, "path": None} for row in here]
        table = {"key": [row.key for row in here], "text": [row.text for row in here], "image": image}
        pq.write_table(pa.table(table), path / f"{i}.parquet", row_group_size=17)
    return path


def saved(path: Path, them: list[Row]) -> Path:
    from datasets import Dataset

    image = [{"bytes": row.image, "path": None} for row in them]
    Dataset(pa.table({"text": [row.text for row in them], "image": image})).save_to_disk(path, num_shards=2)
    return path


def pictures(folder: Path, them: list[Row], captions: bool = True) -> Path:
    folder.mkdir()
    for row in them:
        (folder / f"{row.key}.jpg").write_bytes(row.image or b"")
        if captions:
            (folder / f"{row.key}.txt").write_text(row.text)
    return folder


def csv(folder: Path, them: list[Row]) -> Path:
    pictures(folder, them, captions=False)
    (folder / "pairs.csv").write_text("filepath\ttitle\n" + "".join(f"{row.key}.jpg\t{row.text}\n" for row in them))
    return folder / "pairs.csv"


KINDS: dict[str, tuple[Callable[[Path, list[Row]], Path], str]] = {
    "tars": (tars, "webdataset"),
    "parquet": (parquet, "parquet"),
    "saved": (saved, "arrow"),
    "csv": (csv, "csv"),
    "folder": (pictures, "folder"),
}


# --- good data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_with_good_data(kind: str, tmp_path: Path) -> None:
    make, name = KINDS[kind]
    them = rows()
    found = doctor(str(make(tmp_path / "data", them)))
    assert found["warnings"] == []
    assert (found["kind"], found["samples"], found["exact"], found["looked_at"]) == (name, len(them), True, len(them))
    summary = found["pictures"]
    assert (summary["looked_at"], summary["broken"], summary["enormous"]) == (len(them), 0, 0)
    assert (summary["formats"], summary["modes"]) == ({"JPEG": len(them)}, {"RGB": len(them)})
    assert (summary["short_side"], summary["long_side"], summary["aspect"]) == ([16] * 3, [24] * 3, [1.5] * 3)
    lengths = sorted(len(row.text) for row in them)
    assert found["captions"]["characters"] == [lengths[0], lengths[len(them) // 2], lengths[-1]]
    assert found["captions"]["repeated"] == found["captions"]["empty"] == found["missing"]["count"] == 0
    assert (found["keys"] is None) is (kind == "saved")  # where there is no column, rows go by their numbers
    if kind in ("csv", "folder"):
        assert found["bytes"] == sum(len(row.image or b"") for row in them)
    assert found["cost"]["pool_bytes"] == len(them) * 2 * 512 * 2
    assert shlex.split(found["next"])[:5] == ["thresher", "embed", str(found["location"]), "-o", "POOL"]


def test_figures_of_tars(tmp_path: Path) -> None:
    them = [replace(row, others={"json": json.dumps({"uid": f"{i:032x}"}).encode()}) for i, row in enumerate(rows(80))]
    found = doctor(str(tars(tmp_path / "data", [*them, *rows(120)[80:]])))
    assert found["files"] == SHARDS
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "data").glob("*.tar"))
    assert found["keys"] == {"repeated": 0, "unsafe": 0, "uids": 80}
    assert found["members"] == {"jpg": 1.0, "txt": 1.0, "json": round(80 / 90, 3)}  # of three tars
    assert found["tars"]["samples"] == [30, 30, 30]
    assert found["tars"]["sizes_json"] == {"lacks": [], "wrong": []}


def test_figures_of_tables(tmp_path: Path) -> None:
    parquet(tmp_path / "data", rows(50))
    table = pq.read_table(tmp_path / "data" / "0.parquet").append_column("label", pa.array(range(50)))
    pq.write_table(table, tmp_path / "data" / "0.parquet")
    columns = doctor(str(tmp_path / "data"))["columns"]
    assert columns == {"picture": "image", "caption": "text", "key": "key", "uid": None, "others": ["label"]}


def test_odd_pictures_are_counted(tmp_path: Path) -> None:
    them = rows()
    odd = [picture(1, "CMYK"), picture(2, "CMYK"), animated(), sixteen_bit(), picture(3, "RGBA", kind="PNG")]
    for i, content in enumerate(odd):
        them[20 * i] = replace(them[20 * i], image=content)
    found = doctor(str(tars(tmp_path / "data", them)))
    summary = found["pictures"]
    assert {name: summary[name] for name in ("cmyk", "animated", "sixteen_bit", "transparent")} == {
        "cmyk": 2,
        "animated": 1,
        "sixteen_bit": 1,
        "transparent": 1,
    }
    assert summary["formats"] == {"JPEG": 117, "PNG": 2, "GIF": 1}
    assert found["warnings"] == []


# --- faults ---------------------------------------------------------------------------------------


def put(them: list[Row], at: dict[int, dict[str, Any]]) -> list[Row]:
    return [replace(row, **at.get(i, {})) for i, row in enumerate(them)]


ALL = rows()
SAME = {i: {"text": "all the same"} for i in range(40)}
FAULTS: dict[str, tuple[list[Row], str]] = {
    "no picture": (put(ALL, {7: {"image": None}}), r"1 of 120 \(0.8%\) samples cannot be used; the first: 00007 "),
    "broken": (put(ALL, {7: {"image": ALL[7].image[:99]}}), r"1 of 120 \(0.8%\) images cannot .* first: 00007 is no"),
    "a page": (put(ALL, {7: {"image": b"<html>"}}), r"1 of 120 \(0.8%\) images cannot be decoded"),
    "enormous": (put(ALL, {7: {"image": enormous()}}), r"1 of 120 .* more than 134,217,728 pixels"),
    "tiny": (put(ALL, {7: {"image": picture(1, size=(1, 1))}}), r"1 of 120 .* less than 10 pixels"),
    "narrow": (put(ALL, {7: {"image": picture(1, size=(2400, 11))}}), r"1 of 120 .* over 200 times as long"),
    "same": (
        put(ALL, {i: {"image": ALL[0].image} for i in range(9)}),
        r"8 of 120 \(6.7%\) images are byte-for-byte copies",
    ),
    "empty": (put(ALL, {7: {"text": "  "}}), r"1 of 120 \(0.8%\) samples have no caption"),
    "nan": (put(ALL, {7: {"text": "nan"}, 8: {"text": "N/A"}}), r"2 of 120 \(1.7%\) captions say nothing"),
    "names": (
        put(ALL, {7: {"text": "a_b.JPG"}, 8: {"text": "IMG_0123"}}),
        r"2 of 120 .* captions are file names or URLs",
    ),
    "addresses": (put(ALL, {7: {"text": "https://a.b/c"}, 8: {"text": "www.a.b"}}), r"2 of 120 .* file names or URLs"),
    "undecoded": (
        put(ALL, {7: {"text": "a caf\ufffd"}}),
        r"1 of 120 \(0.8%\) captions are not UTF-8: they have U\+FFFD",
    ),
    "repeated": (put(ALL, SAME), r"39 of 120 \(32.5%\) captions repeat an earlier one; 40 are 'all the same'"),
    "keys": (put(ALL, {99: {"key": "00007"}}), r"1 of 120 \(0.8%\) keys repeat an earlier one"),
    "unsafe": (put(ALL, {7: {"key": "../../7"}}), r"1 of 120 \(0.8%\) keys are unsafe paths: they contain \.\."),
    "no captions": (put(ALL, {i: {"text": ""} for i in range(120)}), "no captions were found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_samples_are_reported(fault: str, tmp_path: Path) -> None:
    """Exactly the fault that is there, in tars and in parquet."""
    them, expected = FAULTS[fault]
    for make in (tars, parquet):
        found = doctor(str(make(tmp_path / make.__name__, them)))
        assert len(found["warnings"]) == 1, found["warnings"]
        assert re.search(expected, found["warnings"][0]), found["warnings"]
    assert ("--only image" in found["next"]) is (fault == "no captions")


def test_csvs_whose_pictures_are_gone(tmp_path: Path) -> None:
    path = csv(tmp_path / "data", ALL)
    (path.parent / "00003.jpg").unlink()
    found = doctor(str(path))
    assert [re.sub(" first.*", "", line) for line in found["warnings"]] == [
        "1 of 120 (0.8%) samples cannot be used; the"
    ]
    assert "00003.jpg names an image that is not a file" in found["missing"]["first"]
    assert found["pictures"]["looked_at"] == 119


def cut(path: Path, at: int = 20_800) -> None:
    path.write_bytes(path.read_bytes()[:at])


TARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (cut, r"00001.tar: is cut off at byte 20,800, in .* \([1-9]\d? samples before it\)"),
    "cut off between two samples": (lambda path: cut(path, 19_990), r"00001.tar: does not end in empty blocks"),
    "empty": (lambda path: path.write_bytes(b""), r"00001.tar: is empty, not a tar"),
    "a page": (lambda path: path.write_bytes(b"<html>" * 300), r"00001.tar: is not a tar"),
    "no sample": (lambda path: tarfile.open(path, "w").close(), r"1 tar has no samples: 00001.tar"),
}


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("fault", TARS)
def test_faults_of_tars_are_reported(
    fault: str, scanned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are too many bytes to read them all."""
    harm, expected = TARS[fault]
    folder = tars(tmp_path / "data", ALL, sizes=False)
    harm(folder / "00001.tar")
    if not scanned:
        monkeypatch.setattr(doctoring, "_BYTES", 3 * (folder / "00000.tar").stat().st_size // 2)
    found = doctor(str(folder))
    if fault == "no sample" and not scanned:
        assert found["warnings"] == []  # its ends are those of a good tar
        return
    assert len(found["warnings"]) == 1
    assert re.search(expected if scanned else expected.split(", in")[0], found["warnings"][0])
    assert (found["looked_at"] < 90) is not scanned


def test_of_many_tars_a_few_are_read_and_the_rest_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tars(tmp_path / "data", rows(400), shards=20, sizes=False)
    size = (folder / "00000.tar").stat().st_size
    monkeypatch.setattr(doctoring, "_BYTES", 5 * size)
    found = doctor(str(folder))
    assert not found["exact"]
    assert found["looked_at"] < 120
    assert found["samples"] == pytest.approx(400, rel=0.05)
    assert found["pictures"]["looked_at"] == found["looked_at"]  # fewer than were asked for
    assert any("20 samples are many small files" in line for line in found["warnings"])


def test_tars_for_open_clip(tmp_path: Path) -> None:
    folder = tars(tmp_path / "data", ALL, shards=3)
    sizes = json.loads((folder / "sizes.json").read_text())
    del sizes["00000.tar"]
    (folder / "sizes.json").write_text(json.dumps({**sizes, "00002.tar": 41}))
    assert [line.split(";")[0] for line in doctor(str(folder))["warnings"]] == [
        "3 tars for 4 loader processes (open_clip's --workers): each needs at least one tar",
        "sizes.json is wrong about 1 tar",
        "sizes.json does not list 1 tar",
    ]
    (folder / "sizes.json").write_text("no json")
    assert doctor(str(folder))["tars"]["sizes_json"] is None


def test_damaged_tables_are_reported(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "data", ALL, files=2)
    with open(folder / "1.parquet", "r+b") as file:  # the footer and the keys and captions of some row groups are sound
        file.seek(20_000)
        file.write(bytes(1_000))
    found = doctor(str(folder))
    assert found["samples"] == 120
    assert 60 <= found["pictures"]["looked_at"] < 120
    assert len(found["warnings"]) == 1
    assert found["warnings"][0].startswith(str(folder / "1.parquet"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "arrow", "mds"])
def test_files_without_samples_are_named(kind: str, tmp_path: Path) -> None:
    """Two pairs in seven files: five have none, of which three are named."""
    noun, what = ("tars", "samples") if kind == "webdataset" else ("files", "rows")
    location = DATA[kind](tmp_path / "data", pairs(2), 7)
    (line,) = [line for line in doctor(location)["warnings"] if f" no {what}: " in line]
    assert line.startswith(f"5 {noun} have no {what}: ")
    assert re.fullmatch(r"\S+, \S+, \S+ and 2 more", line.partition(": ")[2])
    assert not any(
        "no rows" in line or "no samples" in line
        for line in doctor(DATA[kind](tmp_path / "x", pairs(2), 1))["warnings"]
    )


def test_a_single_tar_that_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples before the cut are counted; names from files are shown in one line, without control characters."""
    folder = tars(tmp_path / "data", put(ALL, {1: {"key": "a\x1b[2J\nb", "image": None}}), shards=1)
    cut(folder / "00000.tar")
    assert main(["doctor", str(folder / "00000.tar")]) == 0
    out = capsys.readouterr().out
    assert "tars: none is intact; sizes.json: agrees" in out
    assert "is cut off at byte 20,800" in out
    assert r"the first: a\x1b[2J\nb has no image" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("content", [None, b"", b"<html>"])
def test_what_cannot_be_read_at_all_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(PoolError, match="a.tar"):
        doctor(str(tmp_path / "a.tar"))
    with pytest.raises(UsageError, match="at least 1"):
        doctor(str(tmp_path), sample=0)


# --- the sample -----------------------------------------------------------------------------------


def seen(monkeypatch: pytest.MonkeyPatch, location: Path, sample: int) -> list[str]:
    """Which samples are looked at, by key."""
    keys: list[str] = []
    look = doctoring._look

    def noting(one: Any, preprocess: Any) -> Any:
        keys.append(one.key)
        return look(one, preprocess)

    with monkeypatch.context() as patched:
        patched.setattr(doctoring, "_look", noting)
        doctor(str(location), sample=sample, workers=1)
    return keys


@pytest.mark.parametrize("kind", ["tars", "parquet", "folder"])
@pytest.mark.parametrize("sample", [1, 37, 120, 1000])
def test_the_sample_is_spread_over_the_data_and_always_the_same(
    kind: str, sample: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = KINDS[kind][0](tmp_path / "data", ALL)
    keys = seen(monkeypatch, data, sample)
    assert len(keys) == len(set(keys)) == min(sample, 120)
    assert keys == sorted(keys) == seen(monkeypatch, data, sample)
    if sample > 1:
        assert {int(key) // EACH for key in keys} == set(range(SHARDS))


def test_samples_of_several_files_of_odd_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of rows do not end with a file's."""
    folder = parquet(tmp_path / "data", rows(97), files=9)
    for sample in (2, 50, 60, 90, 96):
        keys = seen(monkeypatch, folder, sample)
        assert keys == sorted(set(keys))
        assert 0.8 * sample <= len(keys) <= sample


def test_the_same_data_give_the_same_report(tmp_path: Path) -> None:
    folder = tars(tmp_path / "data", FAULTS["repeated"][0])
    first, second = (doctor(str(folder), sample=50, workers=workers) for workers in (1, 3))
    assert {**first, "cost": None} == {**second, "cost": None}


# --- cost -----------------------------------------------------------------------------------------


class Histogram:
    """An encoder of one's own: how often each brightness is there, and how long the words are."""

    name, image_dim, text_dim = "histogram", 8, 4

    def __init__(self, device: str, precision: str) -> None:
        self.given = (device, precision)

    def preprocess(self, image: Any) -> Any:
        return np.asarray(image.resize((8, 8)))

    def tokenize(self, texts: Any) -> dict[str, Any]:
        return {"length": np.array([[len(text)] * 4 for text in texts])}

    def encode_images(self, pixels: Any) -> Any:
        return np.stack([np.histogram(one, 8, (0, 255))[0] for one in pixels]).astype(np.float32)

    def encode_texts(self, tokens: Any) -> Any:
        return tokens["length"].astype(np.float32)

    def weights(self) -> str:
        return "none"


def test_an_encoder_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctoring, "_SECONDS", 0.02)
    folder = parquet(tmp_path / "data", ALL)
    spec = f"{__name__}:Histogram"
    found = doctor(str(folder), encoder=spec)
    cost = found["cost"]
    assert cost["dims"] == 12
    assert cost["pool_bytes"] == 120 * 12 * 2
    each = [120 / cost[f"{what}_per_second"] for what in ("decoded", "images", "texts")]
    assert cost["embed_seconds"] == pytest.approx(sum(each))
    assert f"--encoder {spec}" in found["next"]
    with pytest.raises(UsageError, match="no encoder 'nonsense'"):
        doctor(str(folder), encoder="nonsense")


def test_what_to_type_next_has_the_options(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    parquet(folder, ALL)
    table = pq.read_table(folder / "0.parquet").rename_columns(["name", "words", "see"])
    pq.write_table(table, folder / "0.parquet")
    found = doctor(str(folder), DataOptions(image="see", caption="words", key="name"))
    assert found["warnings"] == []
    words = shlex.split(found["next"])
    assert words[2] == str(folder)
    assert words[-6:] == ["--image", "see", "--caption", "words", "--key", "name"]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "x.csv").write_text("".join(f"{i}.png,caption {i}\n" for i in range(3)))
    given = DataOptions(columns="filepath,title", root=str(tmp_path), allow_outside=True, reader="csv")
    words = shlex.split(doctor(str(tmp_path / "x.csv"), given)["next"])
    more = ["--columns", "filepath,title", "--root", str(tmp_path), "--reader", "csv", "--allow-outside"]
    assert words[-7:] == more


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_data_without_images_are_captions(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["one", "two"]}), path)
    else:
        path.write_text("text\none\ntwo\n" if kind == "csv" else '{"text": "one"}\n{"text": "two"}\n')
    found = doctor(str(path))
    assert re.search(r"has no column of image.*--only text", found["warnings"][0])
    assert (found["captions"]["empty"], found["pictures"]["looked_at"]) == (0, 0)
    assert found["next"].endswith("--only text")
    for text, error in (("https://a/b.jpg", UsageError), ("", PoolError)):
        if kind == "parquet":
            pq.write_table(pa.table({"n": [1], **({"url": [text]} if text else {})}), path)
        else:
            row = {"n": 1, **({"url": text} if text else {})}
            path.write_text(
                json.dumps(row)
                if kind == "jsonl"
                else "\n".join(map(",".join, zip(*[(k, str(v)) for k, v in row.items()], strict=True)))
            )
        with pytest.raises(error, match="img2dataset --url_list" if text else "no column of image"):
            doctor(str(path))


def test_several_images_are_counted(tmp_path: Path) -> None:
    cells = [[{"bytes": picture(i), "path": None}] * (1 + i % 2) for i in range(8)]
    pq.write_table(pa.table({"image": cells, "text": [f"caption {i}" for i in range(8)]}), tmp_path / "x.parquet")
    found = doctor(str(tmp_path))
    assert found["notes"] == {SEVERAL: 4}
    assert "4 of 8 (50.0%) samples have several images; the first is used" in found["warnings"]


def test_captions_that_are_missing_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(picture(0))
    (tmp_path / "a" / "x.csv").write_text("filepath,label\n0.png,1\n")
    for location, says in (("a", "pass --captions FILE"), ("a/x.csv", "it has filepath, label; name one with --cap")):
        told = [warning for warning in doctor(str(tmp_path / location))["warnings"] if "caption" in warning]
        assert len(told) == 1
        assert says in told[0]


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tars(tmp_path / "good", ALL), tars(tmp_path / "bad", FAULTS["empty"][0])
    assert main(["doctor", str(good), "--strict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{good}: 120 samples, webdataset, 4 tars, ")
    assert not [line for line in lines if line.startswith("  !")]
    assert lines[-1].startswith("  next: thresher embed ")
    assert main(["doctor", str(bad)]) == 0
    assert "  ! 1 of 120 (0.8%) samples have no caption" in capsys.readouterr().out.splitlines()
    assert main(["doctor", str(bad), "--strict"]) == 1
    capsys.readouterr()
    assert main(["doctor", str(bad), "--strict", "--json", "--sample", "10"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"]["looked_at"] == 10
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
    assert "nothing is there" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_on_every_kind_of_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also on data of which no picture can be decoded."""
    make = KINDS[kind][0]
    for name, them in (("good", rows(8)), ("bad", [replace(row, image=b"no", text="") for row in rows(8)])):
        assert main(["doctor", str(make(tmp_path / name, them))]) == 0
        assert "8 samples" in capsys.readouterr().out


def test_captions_in_a_file_of_their_own_are_seen(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i, kind="PNG"))
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{i}.png,number {i}\n" for i in range(3)))
    found = doctor(str(tmp_path))
    assert found["captions"]["empty"] == 0
    assert "--only image" not in found["next"]
    (tmp_path / "captions.txt").write_text("image,caption\nanother.png,not here\n")
    found = doctor(str(tmp_path))
    assert found["captions"]["empty"] == 3
    assert any("names none of the 3 images" in warning for warning in found["warnings"])


def test_the_most_repeated_caption_may_be_unknown_but_is_never_empty(tmp_path: Path) -> None:
    count = 560  # more than the captions that are kept as text
    texts = [f"caption {i}" for i in range(count)] + ["again", "again"]
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12)).save(buffer, "png")
    picture = {"bytes": buffer.getvalue(), "path": None}
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image": [picture] * len(texts), "text": texts}), path)
    assert doctor(str(path), sample=3)["captions"]["most_repeated"] == {"count": 2, "text": None}
    pq.write_table(pa.table({"image": [picture] * len(texts), "text": texts[::-1]}), path)
    assert doctor(str(path), sample=3)["captions"]["most_repeated"] == {"count": 2, "text": "again"}
    assert doctor(str(path), sample=3)["captions"]["empty"] == 0
