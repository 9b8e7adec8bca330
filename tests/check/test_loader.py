"""What ``doctor`` says that open_clip leaves out is what its own pipeline leaves out."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tests.loaded import keys_loaded
from thresher.check.data import doctor
from thresher.cli.main import main

Members = Sequence[tuple[str, bytes]]


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 40)).save(out, kind)
    return out.getvalue()


JPG, PNG, GIF = picture("JPEG"), picture("PNG"), picture("GIF")
META = json.dumps({"caption": "a caption"}).encode()


def tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def pair(key: str, **contents: bytes) -> Members:
    return [(f"{key}.{ending}", content) for ending, content in contents.items()]


TRAINED = {
    "plain": pair("a", jpg=JPG, txt=b"x"),
    "upper": pair("b", JPG=JPG, TXT=b"x"),
    "webp": pair("c", webp=picture("WEBP"), txt=b"x", json=META),
    "other_bytes": pair("d", jpg=GIF, txt=b"x"),
    "two": pair("e", gif=GIF, jpeg=JPG, txt=b"x"),
    "folder": pair("deep/f", png=PNG, txt=b""),
    "apart_json": [*pair("g", jpg=JPG, txt=b"x"), *pair("h", jpg=JPG, txt=b"x"), *pair("g", json=META)],
    "twice": [*pair("i", jpg=JPG, txt=b"x"), *pair("i", jpg=JPG, txt=b"x")],
    "long": pair("l" * 150, jpg=JPG, txt=b"x"),
    "number": pair("n", jpg=JPG, txt=b"x", cls=b"3"),
}
LEFT_OUT = {
    "no_txt": [*pair("a", jpg=JPG, json=META), *pair("b", png=PNG, text=b"x"), *pair("c", jpg=JPG, caption=b"x")],
    "format.gif": pair("d", gif=GIF, txt=b"x"),
    "format.jfif": pair("e", jfif=JPG, json=META),
    "format.bmp": pair("e2", BMP=picture("BMP"), txt=b"x"),
    "format.tiff": pair("e3", tiff=picture("TIFF"), txt=b"x"),
    "no_image": [*pair("f", txt=b"x"), *pair("g", json=META), ("h.seg.jpg", JPG), ("h.txt", b"x")],
    "apart": [(f"p{i}.{ending}", content) for ending, content in (("jpg", JPG), ("txt", b"x")) for i in range(3)],
    "undecodable": [
        *pair("q", jpg=JPG, txt="café".encode("latin-1")),
        *pair("r", jpg=JPG, txt=b"x", json=b"{"),
        *pair("s", jpg=JPG, txt=b"x", cls=b"cat"),
        *pair("t", jpg=JPG, txt=b"x", **{"more.json": b"\xff"}),
        *pair("u", jpg=JPG, txt=b"x", json=b"[" * 100_000),
    ],
}


@pytest.mark.filterwarnings("ignore")  # webdataset's own
@pytest.mark.parametrize("name", [*TRAINED, *LEFT_OUT, "all"])
def test_counts_are_those_of_open_clip(tmp_path: Path, name: str) -> None:
    cases = {**TRAINED, **LEFT_OUT}
    chosen = [cases[name]] if name != "all" else [
        [(f"{case.replace('.', '_')}-{member}", content) for member, content in members]
        for case, members in cases.items()
    ]  # fmt: skip
    tar(tmp_path / "0.tar", [member for members in chosen for member in members] + list(pair("zz", jpg=JPG, txt=b"x")))
    tar(tmp_path / "1.tar", [member for members in reversed(chosen) for member in members])
    told = doctor(str(tmp_path))["open_clip"]
    found = keys_loaded([tmp_path / "0.tar", tmp_path / "1.tar"])
    assert told["trained"] == len(found)
    by_reason = {why: one["count"] for why, one in told["left_out"].items()}
    if name in TRAINED:
        assert by_reason == {}
    elif name != "all":
        keys = {re.match(r"[^.]*", member)[0] for member, _ in LEFT_OUT[name]}  # type: ignore[index]
        assert len(found) == 1
        assert by_reason == {name: 2 * len(keys)}
    else:
        assert by_reason.keys() == LEFT_OUT.keys()
        assert not any(key.startswith(tuple(f"{case.replace('.', '_')}-" for case in LEFT_OUT)) for key in found)


def test_the_report_names_a_key_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(tmp_path / "in put" / "0.tar", [*LEFT_OUT["no_txt"], *LEFT_OUT["format.gif"], *TRAINED["plain"]])
    assert main(["doctor", str(tmp_path / "in put"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert (
        "open_clip trains on 1 of 5 samples: 3 have no .txt, such as a; 1 has its image as .gif, such as d. To" in out
    )
    assert f"thresher reshard '{tmp_path / 'in put'}' SEL -o DIR --trainable" in out
    assert main(["doctor", str(tmp_path / "in put"), "--quiet", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["open_clip"]["left_out"]["format.gif"] == {
        "count": 1, "key": "d", "path": str(tmp_path / "in put" / "0.tar"),
    }  # fmt: skip
    assert shown["reshard"] is None


def test_of_a_folder_it_says_what_reshard_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, (kind, ending) in enumerate([("GIF", "gif"), ("BMP", "bmp"), ("GIF", "jpg"), ("PNG", "gif")]):
        (tmp_path / f"{i}.{ending}").write_bytes(picture(kind))
        (tmp_path / f"{i}.txt").write_text("x")
    assert main(["doctor", str(tmp_path), "--quiet"]) == 0
    assert "reshard --as webdataset converts to PNG: GIF 2, BMP 1\n" in capsys.readouterr().out
    assert doctor(str(tmp_path))["reshard"] == {"images": 4, "converted": {"GIF": 2, "BMP": 1}}
