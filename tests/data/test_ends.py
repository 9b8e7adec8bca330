"""Files that were cut off between two samples: every command that reads all samples says so, and reads what is left."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from tests.ahead_fs import Ahead, memory
from tests.data.common import arrow_of, outcome, picture, sample_tar, table, tar_of
from tests.embedding.test_pipeline import TOY
from tests.resharding.common import keys_file
from tests.resharding.test_notes import Said
from thresher.check.data import doctor
from thresher.data import open_data
from thresher.embedding.pipeline import embed
from thresher.lab.corpus import index_of
from thresher.lab.sets import open_set
from thresher.resharding import reshard
from thresher.train.data import open_pairs

__all__ = ["memory"]  # the fixture


def cut(content: bytes, kind: str) -> bytes:
    """A tar without its empty blocks, or a stream without its last mark."""
    if kind == "arrow":
        return content[:-8]
    with tarfile.open(fileobj=io.BytesIO(content)) as file:
        return content[: max(one.offset_data + -(-one.size // 512) * 512 for one in file)]


def data_of(top: Path, kind: str, cut_off: tuple[int, ...]) -> Path:
    """Six files of two samples, of which some are cut off."""
    (top / "data").mkdir()
    for number in range(6):
        keys = [f"{number}{i}" for i in range(2)]
        content = sample_tar(keys) if kind == "tar" else arrow_of(table(keys), rows=1)
        content = cut(content, kind) if number in cut_off else content
        (top / "data" / f"{number}.{kind}").write_bytes(content)
    return top / "data"


@pytest.mark.parametrize("kind", ["tar", "arrow"])
def test_every_command_says_which_files_may_be_cut_off(tmp_path: Path, kind: str) -> None:
    data = str(data_of(tmp_path, kind, (1, 4)))
    unit = "tars" if kind == "tar" else "files"
    note = f"2 {unit} do not have the end mark of the format and may be cut off: "
    found, errors = outcome(data)
    assert (len(found), errors) == (12, []), "it may be that a program left the mark out"
    (said,) = open_data(data).without_end()
    assert said == f"{note}{tmp_path}/data/1.{kind}, {tmp_path}/data/4.{kind}"

    made = embed(data, tmp_path / "pool", TOY)
    assert said in made.notes
    assert (made.rows, made.damaged) == (12, 0)
    assert embed(data, tmp_path / "pool", TOY).notes == made.notes, "also if nothing is left to do"
    done = reshard(data, keys_file(tmp_path / "k", ["00", "41"]), str(tmp_path / "out"))
    assert said in done.notes
    told, folder = Said(), tmp_path / "run"
    folder.mkdir()
    open_pairs(data, folder, side=8, resize="shortest", captions=True, progress=told)
    assert f"{data}: {said}" in told.lines
    for read in (
        lambda: index_of(data, captions=True),
        lambda: open_set(data, text="txt" if kind == "tar" else "text"),
    ):
        with pytest.warns(UserWarning, match=note):
            read()
    warnings = doctor(data)["warnings"]
    assert sum("cut off" in warning for warning in warnings) == (2 if kind == "tar" else 1)


@pytest.mark.parametrize("kind", ["tar", "arrow"])
def test_whole_files_are_not_mentioned(tmp_path: Path, kind: str) -> None:
    data = str(data_of(tmp_path, kind, ()))
    assert open_data(data).without_end() == ()
    assert not any("end mark" in note for note in embed(data, tmp_path / "pool", TOY).notes)
    assert not any("cut off" in warning for warning in doctor(data)["warnings"])


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("read", ["samples", "scan", "nothing"])
def test_the_end_of_a_remote_tar_that_was_read_is_not_requested_again(tmp_path: Path, read: str) -> None:
    data = data_of(tmp_path, "tar", (1, 4))
    for path in data.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/data/{path.name}", path.read_bytes())
    found = open_data("ahead://data")
    for part in found.parts:
        if read != "nothing":
            assert len(list(part.samples()) if read == "samples" else part.scan().keys) == 2
    Ahead.counts.clear()
    (said,) = found.without_end()
    assert said.startswith("2 tars do not have the end mark")
    assert said.endswith("/1.tar, /data/4.tar")
    assert Ahead.counts["requests"] == (6 if read == "nothing" else 0)


@pytest.mark.usefixtures("memory")
def test_embed_and_reshard_request_every_remote_tar_once_for_its_headers(tmp_path: Path) -> None:
    """After a look at the first samples of each, and at all samples of one to estimate how many there are."""
    for path in data_of(tmp_path, "tar", (4,)).iterdir():
        fsspec.filesystem("memory").pipe_file(f"/data/{path.name}", path.read_bytes())
    assert any("/data/4.tar" in note for note in embed("ahead://data", tmp_path / "pool", TOY).notes)
    assert Ahead.counts["requests"] <= 6 + 1 + 6 * 2  # and for the images
    Ahead.counts.clear()
    done = reshard("ahead://data", keys_file(tmp_path / "k", ["00", "41"]), str(tmp_path / "out"))
    assert any("/data/4.tar" in note for note in done.notes)
    assert Ahead.counts["requests"] <= 6 + 2  # and for the samples


def test_many_files_are_counted_and_one_is_singular(tmp_path: Path) -> None:
    data = data_of(tmp_path, "tar", tuple(range(6)))
    (said,) = open_data(str(data)).without_end()
    assert said.startswith("6 tars do not have")
    assert said.endswith("more")
    (said,) = open_data(str(data / "3.tar")).without_end()
    assert said == f"1 tar does not have the end mark of the format and may be cut off: {data}/3.tar"


def test_files_of_the_file_format_and_with_other_ends(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(arrow_of(table(["0", "1"]), stream=False))
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table(["0"]).schema, options=pa.ipc.IpcWriteOptions(use_legacy_format=True)) as writer:
        writer.write_table(table(["0", "1"]))
    (tmp_path / "b.arrow").write_bytes(file.getvalue())
    (tmp_path / "c.tar").write_bytes(sample_tar(["0"]) + bytes(10_240))
    for path in tmp_path.iterdir():
        assert open_data(str(path)).without_end() == (), path


def test_a_second_stream_is_not_left_out(tmp_path: Path) -> None:
    one = arrow_of(table(["0", "1"]))
    (tmp_path / "a.arrow").write_bytes(one + arrow_of(table(["2", "3"])))
    found, errors = outcome(tmp_path / "a.arrow")
    assert found == {}
    assert errors == [
        f"{tmp_path}/a.arrow: another stream begins at byte {len(one):,}, after the end of the first, and is not read; "
        "save one stream per file"
    ]


@pytest.mark.parametrize("kind", ["cls", "txt"])
def test_an_evaluation_set_of_clip_benchmark_says_it_too(tmp_path: Path, kind: str) -> None:
    (tmp_path / "test").mkdir()
    members = [(f"{i}.{ending}", picture(i) if ending == "png" else b"0") for i in range(2) for ending in ("png", kind)]
    (tmp_path / "test" / "0.tar").write_bytes(cut(tar_of(members), "tar"))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("a thing\n")
    (tmp_path / "dataset_type.txt").write_text("retrieval" if kind == "txt" else "")
    with pytest.warns(UserWarning, match="1 tar does not have the end mark of the format and may be cut off: .*0.tar"):
        assert len(open_set(str(tmp_path))) == 2


def test_tars_without_samples_are_named(tmp_path: Path) -> None:
    data = data_of(tmp_path, "tar", ())
    (data / "6.tar").write_bytes(tar_of([]))
    for _ in range(2):
        assert f"1 file has no samples: {data}/6.tar" in embed(str(data), tmp_path / "pool", TOY).notes
