"""How the forms of two keys differ, as errors say it; wherever keys of two sides do not match."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture, tar_of
from thresher import Options, PoolError, Selection, UsageError, open_store, select_indices
from thresher.cli.main import main
from thresher.dynamic.stream import StaticKeys, StreamPruner, prune_stream
from thresher.export.keys import read_keys
from thresher.export.webdataset import keep
from thresher.io.key_forms import difference, unlike
from thresher.resharding import reshard

HEX = "1234567890abcdef1234567890abcdef"
UUID = str(uuid.UUID(HEX))


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (HEX, UUID, "the dashes of a UUID: write both alike, such as with key.replace('-', '') in Python"),
        (UUID, HEX.upper(), "the dashes of a UUID and upper case"),
        ("000000012", "7", "leading zeros: write both alike, such as with str(int(key))"),
        ("12", "000000012", "leading zeros"),
        ("a.jpg", "b", "a file extension: write both alike, such as with os.path.splitext(key)[0]"),
        ("x/a.jpg", "b", "a folder and a file extension"),
        ("./a/b", "c/d", "a leading './'"),
        ("./a.JPG", "a", "a leading './' and a file extension"),
        ("x/a", "a", "a folder: write both alike, such as with key.rpartition('/')[2]"),
        ("ABCDEF0123456789", "fedcba9876543210", "upper case: write both alike, such as with key.lower()"),
        ("00012.jpg", "7", "a file extension and leading zeros"),
        ("IMG_1", "img_1", "upper case"),
    ],
)
def test_forms_that_differ(one: str, other: str, says: str) -> None:
    for first, second in ((one, other), (other, one)):
        assert difference(first, second).startswith(f"; these differ by {says}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (HEX, HEX[::-1]), (HEX, "000000012"), ("000000012", "100000007"), ("12", "7"), ("a", "b"), ("Anna", "bob"),
        ("https://x.org/a.jpg", "a"), ("1.5", "2"), ("", "a"), ("", ""), (UUID, UUID[:-1] + "0"), ("v1.0", "v2.1"),
    ],
)  # fmt: skip
def test_forms_that_do_not_differ_or_not_in_a_known_way(one: str, other: str) -> None:
    assert difference(one, other) == difference(other, one) == ""


def test_a_side_without_keys() -> None:
    assert unlike("the pool", iter(["a"]), "the data", iter(())) == "the data has no keys"
    assert unlike("the pool", ["a"], "the data", ["b"]) == "the pool has keys such as 'a', the data such as 'b'"


# --- wherever keys are matched --------------------------------------------------------------------


def pool(folder: Path, keys: Any, name: str = "uid") -> str:
    folder.mkdir(parents=True)
    vectors = np.random.default_rng(0).standard_normal((len(keys), 4)).astype(np.float32)
    found = pa.table({name: keys, "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)})
    pq.write_table(found, folder / "a.parquet")
    return str(folder)


def selected(folder: Path, place: str) -> Path:
    store = open_store(place)
    Selection.everything(store.fingerprint(), place, {}, len(store)).save(folder)
    return folder


@pytest.fixture
def uuids() -> Any:
    """A column of arrow.uuid, whose text has dashes."""
    return pa.array([uuid.UUID(int=i + 7).bytes for i in range(4)], pa.uuid())


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Tars of DataComp: keys of nine digits, and uids without dashes in their json."""
    members = []
    for i in range(4):
        key = f"{i:09d}"
        members += [(f"{key}.jpg", picture(i)), (f"{key}.txt", b"text")]
        members += [(f"{key}.json", json.dumps({"uid": uuid.UUID(int=i + 7).hex}).encode())]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(tar_of(members))
    return str(tmp_path / "shards")


def test_reshard_says_that_uuids_differ_by_dashes(
    tmp_path: Path, uuids: Any, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sel = selected(tmp_path / "sel", pool(tmp_path / "pool", uuids))
    assert main(["reshard", shards, str(sel), "-o", str(tmp_path / "out"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "has none of 4 selected keys" in said
    assert (
        f"keys such as '{uuid.UUID(int=7)}', the first sample has '000000000' and the uid '{uuid.UUID(int=7).hex}'"
        in said
    )
    assert "these differ by the dashes of a UUID: write both alike, such as with key.replace('-', '')" in said
    (tmp_path / "keys.txt").write_text("1\n2\n")
    with pytest.raises(PoolError, match=r"such as '1', the first sample has '000000000'.*leading zeros"):
        reshard(shards, str(tmp_path / "keys.txt"), tmp_path / "out")


def test_streams_say_how_keys_differ(tmp_path: Path) -> None:
    hexes, dashes = [[form(uuid.UUID(int=i + 7)) for i in range(4)] for form in (lambda u: u.hex, str)]
    samples = [{"__key__": f"{i:09d}", "jpg": b"", "json": json.dumps({"uid": uid})} for i, uid in enumerate(hexes)]
    (tmp_path / "dashes.txt").write_text("\n".join(dashes))
    with pytest.warns(UserWarning, match="such as .*; these differ by the dashes of a UUID"):
        assert not list(keep(tmp_path / "dashes.txt")(samples))
    (tmp_path / "ints.txt").write_text("1\n2\n")
    with pytest.warns(UserWarning, match="these differ by leading zeros"):
        assert not list(keep(tmp_path / "ints.txt")(samples))
    pruner = StreamPruner(policy=StaticKeys.of_keys(dashes, 4), batch_size=1, epochs=1, samples=4, scratch=tmp_path)
    stage = prune_stream(pruner, patience=3)
    with pytest.raises(UsageError, match="these differ by the dashes of a UUID"):
        list(stage(samples))


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (["000000012"], [12], r"the pool has keys such as '000000012', the metadata such as '12'; .* leading zeros"),
        ([12], ["000000012"], "leading zeros"),
        (["a.jpg"], ["a"], "a file extension"),
        ([HEX], [UUID], "the dashes of a UUID"),
        ([HEX], [HEX.upper()], "upper case"),
        (["./a"], ["a"], r"a leading '\./'"),
    ],
)
def test_joins_say_how_keys_differ(tmp_path: Path, ours: Any, theirs: Any, says: str) -> None:
    place = pool(tmp_path / "pool", pa.array(ours))
    pq.write_table(pa.table({"uid": theirs, "aes": [0.5]}), tmp_path / "scores.parquet")
    with pytest.raises(UsageError, match=f"{says}.*give the matching column with --key"):
        open_store(place, Options(metadata=str(tmp_path / "scores.parquet")), scratch=str(tmp_path / "scratch"))


def test_scores_say_how_keys_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = pool(tmp_path / "pool", pa.array([f"{i:09d}" for i in range(4)]))
    (tmp_path / "scores.csv").write_text("uid,aes\n0,1\n1,2\n2,3\n3,4\n")
    words = ["select", "clip-score", place, "-o", str(tmp_path / "s"), "--keep", "2", "--cache", str(tmp_path / "c")]
    assert main([*words, "--column", str(tmp_path / "scores.csv")]) == 2
    said = capsys.readouterr().err
    assert "the pool has keys such as '000000000', the file such as '0'; these differ by leading zeros" in said


def test_rows_of_datasets_and_explanations_say_how_keys_differ(
    tmp_path: Path, uuids: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sel = selected(tmp_path / "sel", pool(tmp_path / "pool", uuids))
    with pytest.raises(
        UsageError, match=f"the dataset has keys such as '{HEX}', the selection such as .*dashes of a UUID"
    ):
        select_indices(sel, keys=iter([HEX]))
    with pytest.raises(UsageError, match=r"none of the 1 key is one of 4 kept keys; is this other data\?$"):
        select_indices(read_keys(sel), keys=[HEX])
    assert main(["explain", str(sel), uuid.UUID(int=7).hex]) == 2
    assert f"such as '{uuid.UUID(int=7)}'); these differ by the dashes of a UUID" in capsys.readouterr().err
    assert main(["export", str(sel), "--as", "datacomp", "-o", str(tmp_path / "s.npy")]) == 2
    assert "these differ by the dashes of a UUID" in capsys.readouterr().err
