"""Lines of JSON as raw data."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.data.common import picture
from tests.resharding.common import keys_file
from thresher.data import DataOptions, open_data
from thresher.data.samples import SEVERAL
from thresher.errors import ChangedError, PoolError, UsageError
from thresher.resharding import reshard


def jsonl(folder: Path, *rows: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(3):
        (folder / "images" / f"{i}.jpg").write_bytes(picture(i))
    path = folder / "x.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[tuple[str, str, str]]:
    return [(s.key, s.text, s.why) for s in open_data(str(path), DataOptions(**options)).samples()]


@pytest.mark.parametrize("per_part", [1, 2, 10])
def test_rows_of_paths_and_captions(tmp_path: Path, per_part: int) -> None:
    """datasets#7337, LLaVA's conversations; captions beside them, a blank line, a row without an image."""
    chat = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "two \u00fc"}]
    path = jsonl(
        tmp_path,
        {"image": "images/0.jpg", "text": "zero"},
        "",
        {"image": "images/1.jpg", "caption": ["", "one", "another"]},
        {"id": 7, "image": "images/2.jpg", "conversations": chat},
        {"text": "no image"},
    )
    data = open_data(str(path), DataOptions(per_part=per_part))
    samples = list(data.samples())
    assert data.kind == "jsonl"
    assert [(s.key, s.text) for s in samples] == [
        ("images/0.jpg", "zero"),
        ("images/1.jpg", "one"),
        ("images/2.jpg", "two \u00fc"),
        ("line 3", "no image"),
    ]
    assert [s.stored() for s in samples[:3]] == [picture(i) for i in range(3)]
    assert samples[3].why == "has no image"
    scanned = [part.scan() for part in data.parts]
    assert [key for one in scanned for key in one.keys] == [s.key for s in samples]
    chosen = [s for part, one in zip(data.parts, scanned, strict=True) for s in part.chosen(one.start_n)]
    assert [(s.text, s.stored()) for s in chosen[:3]] == [(s.text, s.stored()) for s in samples[:3]]


def test_images_outside_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "private.jpg").write_bytes(picture(9))
    monkeypatch.chdir(tmp_path / "data")
    names = ["../private.jpg", str(tmp_path / "private.jpg"), "/etc/passwd", "images/0.jpg"]
    path = jsonl(tmp_path / "data", *({"image": name, "text": "x"} for name in names))
    whys = [why[:30] for _, _, why in read(path)]
    assert whys == ["names an image outside " + str(tmp_path)[:7]] * 3 + [""]
    assert [why for _, _, why in read(path, allow_outside=True)][:2] == ["", ""]
    assert [key for key, *_ in read(path)][0] == "%2E%2E/private.jpg"
    assert [bool(why) for _, _, why in read(path, root=str(tmp_path))] == [True, False, True, True]


def test_columns_that_are_named_or_missing(tmp_path: Path) -> None:
    rows = [{"photo": f"images/{i}.jpg", "prompt": f"p{i}", "n": i, "width": 512} for i in range(3)]
    path = jsonl(tmp_path, *rows)
    with pytest.raises(
        PoolError, match=r"no column of image paths .*; it has photo, prompt, n, width; name .* --image"
    ):
        read(path)
    with pytest.raises(PoolError, match=r"no column of captions .*; it has photo, prompt, n, width; name .* --caption"):
        read(path, image="photo")
    assert read(path, image="photo", caption="prompt", key="n") == [(str(i), f"p{i}", "") for i in range(3)]
    assert [text for _, text, _ in read(path, image="photo", captions=False)] == [""] * 3
    for name in ("image", "caption", "key"):
        named = {"image": "photo", "caption": "prompt", name: "phot"}
        with pytest.raises(UsageError, match=rf"no column 'phot' for --{name}; it has photo, .*Did you mean 'photo'"):
            read(path, **named)
    with pytest.raises(
        UsageError, match="--captions .* is a jsonl, which does not use it; name the column with --caption"
    ):
        read(path, captions_file=str(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b'{"image": "a"}\n{', "the line at byte 15 is not JSON"),
        (b"[1]\n", "the line at byte 0 is not a JSON object"),
        (b"{}\n", "has no column of image paths .*; it has no columns"),
        (b'{"image": "\xff"}', "is not valid UTF-8 at byte 11"),
        (b"[" * 100_000, "the line at byte 0 is not JSON .it is nested too deeply"),
        (b'{"image": "' + b"x" * (17 << 20), "the line at byte 0 exceeds 16,777,216 bytes"),
    ],
)
def test_files_that_are_no_lines_of_json(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(PoolError, match=f"x.jsonl: {says}"):
        read(tmp_path / "x.jsonl")


def test_a_file_that_has_changed_is_noticed(tmp_path: Path) -> None:
    row = {"image": "images/0.jpg", "text": "x"}
    data = open_data(str(jsonl(tmp_path, row, row)))
    jsonl(tmp_path, row)
    with pytest.raises(ChangedError, match="has fewer rows than when it was opened"):
        list(data.samples())


@pytest.mark.slow
def test_many_rows_take_little_memory(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"image": f"images/{i}.jpg", "text": f"caption {i}"} for i in range(30_000)))
    tracemalloc.start()
    data = open_data(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.parts) == 3
    assert peak < 1 << 20


def test_of_a_list_of_images_the_first_is_used(tmp_path: Path) -> None:
    """data-juicer#600: ``images`` is a list."""
    path = jsonl(tmp_path, *({"images": [f"images/{i}.jpg" for i in range(n)], "text": f"t{n}"} for n in range(3)))
    assert read(path) == [
        ("line 0", "t0", "has no image"),
        ("images/0.jpg", "t1", ""),
        ("images/0.jpg", "t2", ""),
    ]
    assert [sample.notes for sample in open_data(str(path)).samples()] == [(), (), (SEVERAL,)]


def test_shards_from_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = jsonl(tmp_path / "in", *({"image": f"images/{i}.jpg", "text": f"t{i}", "id": f"k{i}"} for i in range(3)))
    sel = keys_file(tmp_path / "k", ["k0", "k2"])
    done = reshard(str(path), sel, str(tmp_path / "out"), options=DataOptions(key="id"))
    assert (done.form, done.samples) == ("webdataset", 2)
    made = list(open_data(str(tmp_path / "out")).samples())
    assert [(s.key, s.text, s.stored()) for s in made] == [("k0", "t0", picture(0)), ("k2", "t2", picture(2))]
