"""Members and attributes of tars that a user names, and odd but ordinary tars, in every command."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture, tar_of
from tests.resharding.common import keys_file, listed, pool
from thresher.check.data import doctor
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.data.layouts.webdataset import TarPart
from thresher.data.members import SEVERAL, Members, key_text, value_in
from thresher.errors import PoolError, UsageError
from thresher.resharding import reshard
from thresher.runtime.progress import Silent
from thresher.train.data import open_pairs

Contents = dict[str, Any]
ENCODER = ["--encoder", "tests.resharding.colours:Colours", "--workers", "0", "--quiet"]


def tars(folder: Path, *shards: list[tuple[str, Contents]]) -> str:
    """Tars of samples: key, and content by extension; objects are written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        members = [
            (f"{key}.{ending}", content if isinstance(content, bytes) else json.dumps(content).encode())
            for key, found in samples
            for ending, content in found.items()
        ]
        (folder / f"{number:05d}.tar").write_bytes(tar_of(members, tarfile.GNU_FORMAT))
    return str(folder)


def edited(count: int, first: int = 0) -> list[tuple[str, Contents]]:
    """Samples with two images, captions in other members and attributes, and ids in the json."""
    return [
        (
            f"{i:04d}",
            {
                "edited.png": picture(i + 1_000),
                "input.png": picture(first + i),
                "caption.txt": f"text {first + i}".encode(),
                "json": {"id": 7_000 + first + i, "prompt": f"prompt {first + i}", "more": {"long": ["a", f"l {i}"]}},
            },
        )
        for i in range(count)
    ]


def read(location: str, **named: str) -> list[tuple[str, str, bytes]]:
    return [(s.key, s.text, s.stored()) for s in open_data(location, DataOptions(**named)).samples()]


# --- what is named ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("json:prompt", "prompt 1"),
        ("JSON:more.long", "a"),
        ("json:more.long.1", "l 1"),
        ("caption.txt", "text 1"),
        (".Caption.TXT", "text 1"),
    ],
)
def test_captions_are_those_named(tmp_path: Path, caption: str, text: str) -> None:
    location = tars(tmp_path / "in", edited(3))
    assert read(location, caption=caption, image="input.png")[1] == ("0001", text, picture(1))
    assert read(location, caption=caption, image="edited.png", key="json:id")[1] == ("7001", text, picture(1_001))


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"caption": "txt2"}, r"--caption txt2: none of the 4 samples looked at in .* has it; they have the members "
                              r"edited.png, input.png, caption.txt, json, and json with id, prompt, more"),
        ({"caption": "prompt"}, "Did you mean 'json:prompt'"),
        ({"caption": "json:promt"}, "Did you mean 'json:prompt'"),
        ({"caption": "json:id"}, "none of the 4 samples looked at in .* has text there"),
        ({"caption": "json:"}, "json: names no attribute; give one, such as json:caption"),
        ({"caption": "json"}, "give the extension of a member, such as txt2, or an attribute of the json"),
        ({"caption": "a/txt"}, "give the extension of a member"),
        ({"image": "json:prompt"}, "an image is a member; give its extension, such as input.jpg"),
        ({"image": "jpg"}, "--image jpg: none of the 4 samples looked at"),
        ({"key": "id"}, "the key of a sample in a tar is its name; to use an attribute of its json, give json:NAME"),
        ({"key": "json:nosuch"}, "--key json:nosuch: none of the 4 samples looked at in .* has it"),
        ({"key": "json:more"}, "has a key there .more of its json is a dict; a key is text, or a number without"),
        ({"root": "."}, "--root .: .* is tars, which does not use it"),
        ({"captions_file": __file__}, "is tars, which does not use it; name a member or an attribute with captions"),
    ],
)  # fmt: skip
def test_what_no_sample_has_is_refused_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], named: dict[str, str], says: str
) -> None:
    location = tars(tmp_path / "in", edited(2), edited(2, 2))
    with pytest.raises(UsageError, match=says):
        open_data(location, DataOptions(**named))
    keys = keys_file(tmp_path / "k", ["0001"])
    flags = [word for name, value in named.items() for word in (f"--{name.removesuffix('_file')}", value)]
    out = str(tmp_path / "out")
    for command in (["embed", location, "-o", out, *ENCODER], ["doctor", location],
                    ["reshard", location, keys, "-o", out], ["train", "clip", location, "-o", out]):  # fmt: skip
        assert main([*command, *flags]) == 2
        assert "none of the" in (said := capsys.readouterr().err) or "json" in said or "tars" in said
    assert not (tmp_path / "out").exists()


def test_samples_without_it_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = edited(5)
    del samples[1][1]["input.png"], samples[3][1]["json"]["id"]
    samples[4][1]["json"]["id"] = 1.5
    location = tars(tmp_path / "in", samples)
    flags = ["--image", "input.png", "--key", "json:id", "--caption", "json:prompt"]
    assert main(["embed", location, "-o", str(tmp_path / "pool"), *ENCODER, *flags]) == 0
    assert "3 samples skipped" in capsys.readouterr().out
    aside = (tmp_path / "pool" / "set_aside.txt").read_text()
    assert "key 7001: has no input.png (members: edited.png, caption.txt, json)" in aside
    assert "key 0003: has no key: id of its json is nothing; a key is text, or a number without a fraction" in aside
    assert "key 0004: has no key: id of its json is a float" in aside
    found = doctor(location, DataOptions(image="input.png", key="json:id"))
    assert (found["samples"], found["missing"]["count"]) == (5, 3)


def test_a_member_that_only_a_later_tar_has_is_found(tmp_path: Path) -> None:
    plain = [(f"{i}", {"png": picture(i), "txt": b"x"}) for i in range(3)]
    location = tars(tmp_path / "in", *[plain] * 30, [("a", {"png": picture(9), "txt2": b"late"})])
    assert [text for _, text, _ in read(location, caption="txt2") if text] == ["late"]


def test_attributes_and_keys() -> None:
    info = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}]}}
    assert [value_in(info, name) for name in ("a.b", "a.c.0.d", "a.c.1", "a.c.x", "a.b.c", "n", "a.c.²")] == [
        1, 3, None, None, None, None, None
    ]  # fmt: skip
    texts = ["x", 7, True, 10**30, "caf\udce9"]
    assert [key_text(value, "id")[0] for value in texts] == ["x", "7", "true", str(10**30), "caf\\udce9"]
    for value in (None, "", 1.0, ["x"], {"x": 1}):
        key, why = key_text(value, "id")
        assert (key, why[:22]) == ("", "has no key: id of its ")
    with pytest.raises(UsageError):
        Members.of("x", DataOptions(caption="json:"))


# --- through the commands ---------------------------------------------------------------------------


def test_embed_select_and_reshard_go_by_the_same_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """InstructPix2Pix-like shards, whose names begin anew in each tar."""
    location = tars(tmp_path / "in", edited(6), edited(6, 6))
    flags = ["--image", "input.png", "--key", "json:id", "--caption", "json:prompt"]
    assert main(["embed", location, "-o", str(tmp_path / "pool"), *ENCODER, *flags]) == 0, capsys.readouterr().err
    table = pq.read_table(tmp_path / "pool" / "metadata")
    assert table.column("key").to_pylist() == [str(7_000 + i) for i in range(12)]
    assert table.column("text").to_pylist() == [f"prompt {i}" for i in range(12)]
    sel = str(tmp_path / "sel")
    assert main(["select", "random", str(tmp_path / "pool"), "-o", sel, "--keep", "7", "--quiet"]) == 0
    assert main(["export", sel, "--as", "keys", "-o", str(tmp_path / "keys")]) == 0
    keys = (tmp_path / "keys").read_text().split()
    named = {"image": "input.png", "key": "json:id", "caption": "json:prompt"}
    for by, what in (("place", sel), ("key", str(tmp_path / "keys"))):
        for form, shuffle in ((None, None), ("webdataset", 0), ("parquet", None)):
            out = str(tmp_path / f"{by}-{form}")
            done = reshard(location, what, out, form=form, options=DataOptions(**named), shuffle=shuffle)
            assert (done.by, done.samples) == (by, 7)
            expected = [(key, f"prompt {int(key) - 7_000}", picture(int(key) - 7_000)) for key in keys]
            assert sorted(read(out)) == sorted(expected)


def test_a_key_alone_copies_the_members_as_they_are(tmp_path: Path) -> None:
    """Names that two chosen samples have are made different, as for any other key."""
    location = tars(tmp_path / "in", edited(3), edited(3, 3))
    keys = keys_file(tmp_path / "k", ["7001", "7004", "7004", "7005"])
    done = reshard(location, keys, str(tmp_path / "out"), options=DataOptions(key="json:id"))
    assert (done.samples, done.missing) == (4, 0)
    names = [name for name, _ in listed(tmp_path / "out")]
    assert [name.partition(".")[0] for name in names[::4]] == ["0001", "0001-1", "0001-2", "0002"]
    assert {name.partition(".")[2] for name in names} == {"edited.png", "input.png", "caption.txt", "json"}
    again = read(str(tmp_path / "out"), key="json:id", image="input.png")
    assert [key for key, _, _ in again] == ["7001", "7004", "7004", "7005"]


def test_other_names_are_another_plan(tmp_path: Path) -> None:
    location, keys = tars(tmp_path / "in", edited(3)), keys_file(tmp_path / "k", ["0001"])
    named = [DataOptions(image="input.png", caption=f"json:{name}") for name in ("prompt", "more.long")]
    reshard(location, keys, str(tmp_path / "out"), options=named[0])
    with pytest.raises(Exception, match="other data or options"):
        reshard(location, keys, str(tmp_path / "out"), options=named[1])


def test_other_attributes_are_kept_in_new_tars(tmp_path: Path) -> None:
    location = tars(tmp_path / "in", edited(3))
    options = DataOptions(image="input.png", caption="json:prompt")
    reshard(location, keys_file(tmp_path / "k", ["0002"]), str(tmp_path / "out"), options=options)
    (image, _), (name, meta), (text, content) = listed(tmp_path / "out")
    assert (image, name, text, content) == ("0002.png", "0002.json", "0002.txt", b"prompt 2")
    assert json.loads(meta) == {"key": "0002", "caption": "prompt 2", "id": 7_002, "prompt": "prompt 2",
                                "more": {"long": ["a", "l 2"]}}  # fmt: skip


def test_keys_in_json_that_repeat_or_are_unsafe(tmp_path: Path) -> None:
    samples = [
        (f"{i}", {"png": picture(i), "txt": b"x", "json": {"id": key}}) for i, key in enumerate(["a", "../b", "a"])
    ]
    location = tars(tmp_path / "in", samples)
    found = doctor(location, DataOptions(key="json:id"))
    assert found["keys"] == {"repeated": 1, "unsafe": 1, "uids": 0}
    with pytest.raises(UsageError, match="has the same key as another chosen sample"):
        reshard(location, keys_file(tmp_path / "k", ["a"]), str(tmp_path / "out"), options=DataOptions(key="json:id"))
    options = DataOptions(key="json:id", image="png")
    reshard(location, keys_file(tmp_path / "k", ["../b"]), str(tmp_path / "out"), options=options)
    assert [name for name, _ in listed(tmp_path / "out")] == [
        f"%2E%2E%2Fb.{ending}" for ending in ("png", "json", "txt")
    ]


def test_training_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pairs = open_pairs(
        tars(tmp_path / "in", edited(4)), tmp_path / "run", side=8, resize="squash", captions=True, progress=Silent(),
        options=DataOptions(image="input.png", key="json:id", caption="json:prompt"),
    )  # fmt: skip
    assert pairs.keys() == [str(7_000 + i) for i in range(4)]
    assert list(pairs.captions) == [f"prompt {i}" for i in range(4)]
    assert pairs.encoded(2) == picture(2)


# --- odd but ordinary tars --------------------------------------------------------------------------


def test_captions_at_an_unusual_place_are_named_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """open_clip#637, and MetaCLIP#59, whose texts are pairs."""
    for name, texts, place in (("a", "a red dog", "json:words"), ("b", [["alt", "a red dog"]], "json:words.0.1")):
        samples = [
            (f"{i}", {"json": {"words": texts, "url": "http://x/1"}, "jpg": picture(i, "JPEG")}) for i in range(3)
        ]
        location = tars(tmp_path / name, samples)
        says = f"json with words, url; name one, such as --caption {place}"
        assert main(["embed", location, "-o", str(tmp_path / "pool"), "--encoder",
                     "tests.data.test_members:Both", "--workers", "0", "--quiet"]) == 2  # fmt: skip
        assert f"{says}, or pass --only image" in capsys.readouterr().err
        assert any(says in warning for warning in doctor(location)["warnings"])
        assert main(["train", "clip", location, "-o", str(tmp_path / "run"), "--quiet"]) == 2
        assert says in capsys.readouterr().err
        done = reshard(location, keys_file(tmp_path / "k", ["1"]), str(tmp_path / f"out-{name}"))
        assert done.samples == 1, "resharding needs no captions"
        assert [text for _, text, _ in read(location, caption=place)] == ["a red dog"] * 3


def grey(_: Any) -> np.ndarray:
    return np.zeros((2, 2, 3), np.uint8)


def tokens(texts: list[str]) -> dict[str, np.ndarray]:
    return {"ids": np.ones((len(texts), 1), np.int64)}


class Both:
    """An encoder of images and captions, to which all are the same."""

    name, image_dim, text_dim = "both", 2, 2

    def __init__(self, device: str = "auto", precision: str = "auto") -> None:
        self.preprocess, self.tokenize = grey, tokens

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        return np.ones((len(pixels), 2), np.float32)

    def encode_texts(self, tokens: dict[str, np.ndarray]) -> np.ndarray:
        return np.ones((len(tokens["ids"]), 2), np.float32)

    def weights(self) -> str:
        return "1"


def test_classes_instead_of_captions_are_images_alone(tmp_path: Path) -> None:
    """clip-retrieval#153: jpg and cls; an image without any text is no error."""
    location = tars(tmp_path / "in", [(f"{i}", {"cls": b"1", "jpg": picture(i, "JPEG")}) for i in range(3)])
    assert open_data(location).captions_elsewhere() == ""
    assert [text for _, text, _ in read(location)] == [""] * 3


def test_a_name_with_dots_says_what_to_type(tmp_path: Path) -> None:
    location = tars(tmp_path / "in", [("x/a.b", {"jpg": picture(0, "JPEG"), "txt": b"a caption"})])
    (sample,) = open_data(location).samples()
    assert sample.key == "x/a"
    assert sample.why == (
        "has no image (members: b.jpg, b.txt): the extension begins at the first dot of a name, as in webdataset; "
        "--image b.jpg names it"
    )
    assert "--caption b.txt" in open_data(location).captions_elsewhere()
    assert read(location, image="b.jpg", caption="b.txt") == [("x/a", "a caption", picture(0, "JPEG"))]


def test_members_that_are_no_samples_do_not_count(tmp_path: Path) -> None:
    """Upper-case extensions, ./ and folders, files of macOS and checksums, json before the image, two images."""
    members = [
        ("./s/._a.JPG", b"x"), ("./s/a.json", b'{"title": "of the json"}'), ("./s/a.JPEG", picture(0, "JPEG")),
        ("__MACOSX/s/._a.JPG", b"x"), ("./s/.b.jpg.crc", b"x"), ("./s/b.TXT", b"of the member"),
        ("./s/b.PNG", picture(1)), ("./s/b.JPG", picture(2, "JPEG")),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    for number, fmt in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        (tmp_path / "in" / f"{number}.tar").write_bytes(tar_of(members, fmt))
    (tmp_path / "in" / "2.tar").write_bytes(tar_of([]))
    expected = [("./s/a", "of the json", picture(0, "JPEG")), ("./s/b", "of the member", picture(2, "JPEG"))]
    assert read(str(tmp_path / "in")) == expected * 2
    found = doctor(str(tmp_path / "in"))
    assert (found["samples"], found["missing"]["count"], found["tars"]["empty"]) == (4, 0, ["2.tar"])
    assert found["notes"] == {SEVERAL: 2}
    assert (
        "2 of 4 (50.0%) samples have several images; the first of jpg, png, jpeg, webp and other formats is used, as "
        "in open_clip; --image names another"
    ) in found["warnings"]
    assert main(["embed", str(tmp_path / "in"), "-o", str(tmp_path / "pool"), *ENCODER]) == 0
    assert pq.read_table(tmp_path / "pool" / "metadata").num_rows == 4
    one = TarPart(str(tmp_path / "in" / "0.tar"))
    sel = pool(tmp_path / "p", [(s.key, "0.tar", s.at) for s in one.samples()], [0, 1])
    assert reshard(str(tmp_path / "in"), sel, str(tmp_path / "out")).samples == 2


# --- compressed tars --------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["tar.gz", "TGZ", "tar.bz2", "tar.xz", "tar.zst"])
def test_compressed_tars_are_never_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    """datasets#6931, datasets#7732."""
    location = tars(tmp_path / "in", edited(2))
    for i in (1, 2):
        (tmp_path / "in" / f"0000{i}.{ending}").write_bytes(b"x")
    with pytest.raises(
        PoolError, match=rf"has 1 tar and 2 compressed tars \(such as 00001.{ending}\).* -dk .*/\*\.{ending}"
    ):
        open_data(location)
    for command in (["embed", location, "-o", str(tmp_path / "out"), *ENCODER], ["doctor", location],
                    ["reshard", location, keys_file(tmp_path / "k", ["0"]), "-o", str(tmp_path / "out")],
                    ["train", "clip", location, "-o", str(tmp_path / "out")]):  # fmt: skip
        assert main(command) == 2
        assert "2 compressed tars" in capsys.readouterr().err
    assert len(open_data(f"{location}/*.tar").parts) == 1
    (tmp_path / "in" / "00000.tar").unlink()
    with pytest.raises(PoolError, match="has 2 compressed tars"):
        open_data(location)
    for i in (1, 2):  # decompressed beside them
        (tmp_path / "in" / f"0000{i}.tar").write_bytes(tar_of([]))
    assert len(open_data(location).parts) == 2


def test_doctor_does_not_say_that_samples_without_a_key_have_no_image(tmp_path: Path) -> None:
    members = [(f"{i}.{kind}", data) for i, info in enumerate((b"{}", b'{"id": 7}'))
               for kind, data in (("png", picture(i)), ("txt", b"a caption"), ("json", info))]  # fmt: skip
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    warnings = doctor(str(tmp_path), DataOptions(key="json:id"))["warnings"]
    assert warnings[0].startswith(
        "1 of 2 (50.0%) samples cannot be used; the first: 0 has no key: id of its json is no"
    )
    assert not any("no image" in warning for warning in warnings)
