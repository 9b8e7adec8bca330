"""The Hugging Face Hub: commits, splits, requests, access, and answers that are wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import TOKEN, Hub, Repo, at_hand
from thresher import Options, Selection, api, open_store
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.errors import AccessError, PoolError, ThresherError, UnreachedError, UsageError
from thresher.io.hub import pinned, split_of
from thresher.io.places import place
from thresher.pool.store import reopen
from thresher.testing.data_reader import pairs

NAME = "hf://datasets/org/emoji"
ROWS = 12


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine with nothing in it."""
    with at_hand(monkeypatch) as server:
        yield server


def parquet(start: int, rows: int = ROWS, seed: int = 0) -> bytes:
    """A table of images, captions, keys and vectors."""
    rng = np.random.Generator(np.random.Philox(seed + start))
    vectors = rng.standard_normal((rows, 8)).astype(np.float32)
    some = pairs(rows)
    table = pa.table(
        {
            "image": [{"bytes": pair.picture, "path": None} for pair in some],
            "text": [pair.text for pair in some],
            "key": [f"k{start + i:04d}" for i in range(rows)],
            "image_embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), 8),
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=5)
    return out.getvalue()


def dataset(files: int = 3) -> dict[str, bytes]:
    names = {f"data/train-{i:05d}-of-{files:05d}.parquet": parquet(ROWS * i) for i in range(files)}
    return {"README.md": b"# A dataset", ".gitattributes": b"", **names}


def test_opening_asks_for_one_listing_and_each_footer_once(hub: Hub) -> None:
    hub.datasets["org/emoji"] = Repo()
    hub.datasets["org/emoji"].push(dataset(5))
    for what in (open_data, open_store):
        for location in (NAME, f"{NAME}/data/train-*.parquet", f"{NAME}@main/data"):
            hub.requests.clear()
            fsspec.get_filesystem_class("hf").clear_instance_cache()
            opened = what(location)
            assert hub.counted("/tree/") == 1, hub.requests
            assert hub.counted("/resolve/") == 5, hub.requests
            assert len(hub.requests) <= 9, hub.requests  # and the dataset itself: its commit, and for a split its card
            assert len(opened) == 5 * ROWS if what is open_store else len(opened.parts) == 5  # type: ignore[arg-type]


def test_a_selection_names_the_commit_and_a_push_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    repo = hub.datasets["org/emoji"] = Repo()
    first = repo.push(dataset())
    assert main(["select", "random", NAME, "-o", str(tmp_path / "subset"), "--keep", "50%", "--quiet"]) == 0
    recorded = json.loads((tmp_path / "subset" / "selection.json").read_text())
    assert f"{NAME}@{first}" in json.dumps(recorded)
    keys = tmp_path / "keys.txt"
    assert main(["export", str(tmp_path / "subset"), "--as", "keys", "-o", str(keys), "--quiet"]) == 0
    before = keys.read_bytes()
    second = repo.push({"data/train-00000-of-00003.parquet": parquet(0, seed=9)})
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    keys.unlink()
    assert main(["export", str(tmp_path / "subset"), "--as", "keys", "-o", str(keys), "--quiet"]) == 0
    assert keys.read_bytes() == before
    assert (open_store(NAME).layout.location, first != second) == (f"{NAME}@{second}", True)
    with pytest.raises(UsageError, match="another pool or has changed"):
        reopen(Selection.load(tmp_path / "subset"), NAME)


def test_data_says_which_commit_is_read_and_reshards_it(hub: Hub, tmp_path: Path) -> None:
    repo = hub.datasets["org/emoji"] = Repo()
    commit = repo.push(dataset())
    data = open_data(NAME)
    assert data.location == f"{NAME}@{commit}"
    assert data.notes[0].startswith(f"read at commit {commit}")
    assert open_data(data.location).notes == ()
    assert [sample.key for sample in data.samples()] == [f"k{i:04d}" for i in range(3 * ROWS)]
    (tmp_path / "keys.txt").write_text("k0001\nk0030\n")
    done = api.reshard(NAME, str(tmp_path / "keys.txt"), str(tmp_path / "out"), workers=1)
    assert (done.samples, done.missing) == (2, 0)
    local = tmp_path / "local"
    local.mkdir()
    for name, body in dataset().items():
        if name.endswith(".parquet"):
            (local / name.rpartition("/")[2]).write_bytes(body)
    assert api.doctor(NAME, sample=3)["samples"] == 3 * ROWS
    again = api.reshard(str(local), str(tmp_path / "keys.txt"), str(tmp_path / "out2"), workers=1)
    assert again.samples == 2
    for one in (tmp_path / "out").glob("*.parquet"):
        assert one.read_bytes() == (tmp_path / "out2" / one.name).read_bytes()


def test_splits_and_configurations(hub: Hub) -> None:
    repo = hub.datasets["org/emoji"] = Repo()
    repo.push({**dataset(2), "data/test-00000-of-00001.parquet": parquet(900), "extra/deep/er/x.parquet": parquet(950)})
    for what in (open_data, open_store):
        with pytest.raises(UsageError, match=r"has the splits train, test; choose one with --reader hub:split=NAME"):
            what(NAME)
    assert len(open_store(NAME, Options(reader="hub:split=test"))) == ROWS
    assert len(open_store(NAME, Options(reader="hub:split=all"))) == 3 * ROWS
    assert len(list(open_data(NAME, DataOptions(reader="hub:split=train")).samples())) == 2 * ROWS
    assert len(list(open_data(NAME, DataOptions(reader="hub:split=all")).samples())) == 3 * ROWS
    with pytest.raises(UsageError, match=r"has no split 'tests'; it has train, test. Did you mean 'test'"):
        open_data(NAME, DataOptions(reader="hub:split=tests"))
    repo.card = {
        "configs": [
            {"config_name": "small", "data_files": [{"split": "train", "path": "data/test-*"}]},
            {"config_name": "deep", "data_files": "extra/**/*.parquet"},
        ]
    }
    with pytest.raises(
        UsageError, match="has the configurations small, deep; choose one with --reader hub:config=NAME"
    ):
        open_store(NAME)
    for config, first in (("small", "k0900"), ("deep", "k0950")):
        store = open_store(NAME, Options(reader=f"hub:config={config}"))
        assert next(iter(store.scan(["key"])))[1].column("key")[0].as_py() == first
    with pytest.raises(UsageError, match="--reader hub reads a whole dataset"):
        open_store(f"{NAME}/data", Options(reader="hub"))


@pytest.mark.parametrize(
    ("names", "configs", "wanted"),
    [
        (["a.parquet", "b.parquet"], None, {"train": ["a.parquet", "b.parquet"]}),
        (["train.parquet", "dev.parquet"], None, {"train": ["train.parquet"], "validation": ["dev.parquet"]}),
        (["test/0.parquet", "training/0.parquet"], None, {"test": ["test/0.parquet"], "train": ["training/0.parquet"]}),
        (["d/my.split-00000-of-00001-ab12.parquet"], None, {"my.split": ["d/my.split-00000-of-00001-ab12.parquet"]}),
        (["default/train/0000.parquet"], None, {"train": ["default/train/0000.parquet"]}),
        (["default/partial-train/0000.parquet"], None, {"train": ["default/partial-train/0000.parquet"]}),
        (["x/a.parquet", "y.parquet"], [{"data_files": "x/*"}], {"train": ["x/a.parquet"]}),
        (["a.parquet", "x/b/c.parquet"], [{"data_dir": "x", "data_files": "**"}], {"train": ["x/b/c.parquet"]}),
        (["a.parquet", "x/a.parquet"], [{"data_dir": "./", "data_files": "a*"}], {"train": ["a.parquet"]}),
        (["en/a.parquet", "test/train-a.parquet", "test/b_dev.parquet"], [{"data_dir": "/test/"}],
         {"train": ["test/train-a.parquet"], "validation": ["test/b_dev.parquet"]}),
        (["a.parquet"], [{"data_files": [{"split": "s", "path": one} for one in ("a*", "*")]}], {"s": ["a.parquet"]}),
        (["a.parquet", "b.parquet"], [{"config_name": "x"}], {"train": ["a.parquet", "b.parquet"]}),
        (["a.parquet", "b.parquet"], [{"data_files": {"split": "s", "path": ["[b]*"]}}], {"s": ["b.parquet"]}),
        (["a.parquet"], "no list", {"train": ["a.parquet"]}),
        (["a.parquet"], [7, {"data_files": [{"split": []}, 3]}, {"data_files": {"x": 1}}], {"train": ["a.parquet"]}),
        (["a.parquet"], [{"data_files": "*" * 5_000 + "b"}], {"train": ["a.parquet"]}),
    ],
)  # fmt: skip
def test_files_of_splits(names: list[str], configs: Any, wanted: dict[str, list[str]]) -> None:
    for split, files in wanted.items():
        assert split_of("x", [*names, "README.md"], configs, None, split) == (split, files)
    with pytest.raises(UsageError, match=f"it has {', '.join(wanted)}"):
        split_of("x", names, configs, None, "nothing")


def test_configurations_that_are_folders_are_not_mixed() -> None:
    names = ["en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet"]
    configs = [{"config_name": name, "data_dir": name} for name in ("en", "de")]
    with pytest.raises(UsageError, match="has the configurations en, de; choose one"):
        split_of("x", names, configs, None, None)
    assert split_of("x", names, configs, "de", None) == ("train", names[1:])


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_says_what_to_type_and_no_token(
    hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.datasets["org/emoji"] = Repo(private=status == 401, gated=status == 403)
    repo.push(dataset())
    token = "" if status == 401 else TOKEN
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": token or False})
    with pytest.raises(AccessError, match="hf auth login") as error:
        open_data(NAME)
    assert ("gated" in str(error.value)) == (status == 403)
    assert hub.counted("/resolve/") <= 3  # denied access is not tried again
    assert main(["inspect", NAME]) != 0
    written = "".join(capsys.readouterr())
    assert "hf auth login" in written
    assert TOKEN not in written + str(error.value)
    assert "Traceback" not in written


def test_a_token_opens_a_private_dataset(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.datasets["org/emoji"] = Repo(private=True)
    hub.datasets["org/emoji"].push(dataset())
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": TOKEN})
    store = open_store(NAME)
    assert len(store) == 3 * ROWS
    assert TOKEN not in repr(store) + json.dumps(store.layout.stamps) + store.layout.location


def test_errors_of_an_illegal_token_do_not_show_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.datasets["org/emoji"] = Repo()
    hub.datasets["org/emoji"].push(dataset())
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": f"{TOKEN}\n x"})
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever the library raises
        open_store(NAME)
    assert isinstance(error.value, ThresherError), error.value
    assert TOKEN not in str(error.value)


def test_missing_things_are_named(hub: Hub) -> None:
    hub.datasets["org/emoji"] = Repo()
    hub.datasets["org/emoji"].push(dataset())
    for location in (f"{NAME}@nothing", f"{NAME}/nothing", f"{NAME}/data/nothing*.parquet", f"{NAME}@{'a' * 40}"):
        for what in (open_data, open_store):
            with pytest.raises(PoolError) as error:
                what(location)
            assert "\n" not in str(error.value), error.value
    with pytest.raises((AccessError, PoolError), match="no such repository, or it is private"):
        open_data("hf://datasets/org/nothing")
    for wrong in ("hf://datasets/emoji", "hf://", "hf://datasets/a@b@c/d@e/f"):
        with pytest.raises((PoolError, UsageError)):
            pinned(wrong)


@pytest.mark.slow
def test_a_server_that_fails_is_asked_again(hub: Hub) -> None:
    hub.datasets["org/emoji"] = Repo()
    hub.datasets["org/emoji"].push(dataset())
    failed: set[str] = set()

    def once(path: str) -> int:
        if path in failed:
            return 0
        failed.add(path)
        return 429 if len(failed) % 2 else 503

    hub.fails = once
    assert len(open_store(NAME)) == 3 * ROWS
    assert len(failed) >= 5


def test_a_server_that_stays_down_is_not_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRESHER_NETWORK_TRIES", "1")
    hub.datasets["org/emoji"] = Repo()
    hub.fails = lambda path: 503
    with pytest.raises(UnreachedError, match="retry later"):
        open_store(NAME)


@pytest.mark.parametrize(
    "lie",
    [
        lambda answer: {**answer, "sha": "not a commit"} if "sha" in answer else answer,
        lambda answer: {**answer, "sha": None} if "sha" in answer else answer,
        lambda answer: {**answer, "siblings": [{"rfilename": "../../x.parquet"}]} if "siblings" in answer else answer,
        lambda answer: {**answer, "siblings": [{"rfilename": "gone.parquet"}]} if "siblings" in answer else answer,
        lambda answer: [{**one, "size": 10**15} for one in answer] if isinstance(answer, list) else answer,
        lambda answer: [{**one, "size": 3} for one in answer] if isinstance(answer, list) else answer,
        lambda answer: [{**one, "path": f"../{one['path']}"} for one in answer] if isinstance(answer, list) else answer,
        lambda answer: [] if isinstance(answer, list) else answer,
        lambda answer: "text",
    ],
)  # fmt: skip
def test_wrong_answers_are_one_line(hub: Hub, lie: Any) -> None:
    hub.datasets["org/emoji"] = Repo()
    hub.datasets["org/emoji"].push(dataset())
    hub.lies = lie
    for what in (open_data, open_store):
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        with pytest.raises(ThresherError) as error:
            what(NAME)
        assert "\n" not in str(error.value)


def test_buckets(hub: Hub) -> None:
    hub.buckets["org/files"] = {"some/a.parquet": parquet(0), "some/b.parquet": parquet(50), "x.txt": b""}
    store = open_store("hf://buckets/org/files/some")
    assert (len(store), store.layout.location) == (2 * ROWS, "hf://buckets/org/files/some")
    assert [sample.key for sample in open_data("hf://buckets/org/files/some/b.parquet").samples()][0] == "k0050"
    assert len(open_store("hf://buckets/org/files/some/*.parquet")) == 2 * ROWS
    with pytest.raises(PoolError):
        open_store("hf://buckets/org/nothing/some")


def test_patterns_of_pools_on_disk(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(0))
    store = open_store(str(tmp_path / "train-*.parquet"))
    assert (len(store), store.layout.location) == (2 * ROWS, str(tmp_path / "train-*.parquet"))
    with pytest.raises(PoolError, match="found: nothing"):
        open_store(str(tmp_path / "none-*.parquet"))


@pytest.mark.slow
def test_the_environment_names_the_server(hub: Hub, tmp_path: Path) -> None:
    hub.datasets["org/emoji"] = Repo(private=True)
    hub.datasets["org/emoji"].push(dataset())
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "thresher", "select", "random", NAME, "-o", str(tmp_path / "s"), "--keep", "4"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "s" / "selection.json").read_text()


def test_results_on_the_hub_are_commits_with_the_marker_last(hub: Hub, tmp_path: Path) -> None:
    repo = hub.datasets["org/results"] = Repo()
    repo.push({"README.md": b""})
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.parquet").write_bytes(parquet(0))
    out = "hf://datasets/org/results"
    words = ["select", "random", str(tmp_path / "pool"), "--keep", "50%", "--quiet", "-o"]
    assert main([*words, f"{out}/subset"]) == 0
    assert main([*words, str(tmp_path / "subset")]) == 0
    _, files = repo.at("main") or ("", {})
    written = {name.removeprefix("subset/"): body for name, body in files.items() if name.startswith("subset/")}
    local = {
        path.relative_to(tmp_path / "subset").as_posix(): path.read_bytes()
        for path in (tmp_path / "subset").rglob("*")
        if path.is_file()
    }
    assert written == local
    first = next(i for i, one in enumerate(repo.commits.values()) if "subset/selection.json" in one)
    assert [*repo.commits.values()][first].keys() >= {f"subset/{name}" for name in local}  # the others came before
    commit = repo.refs["main"]
    assert len(Selection.load(f"{out}@{commit}/subset")) == ROWS // 2
    assert main(["export", f"{out}/subset", "--as", "keys", "-o", f"{out}/keys.txt", "--quiet"]) == 0
    assert (repo.at("main") or ("", {}))[1]["keys.txt"].count(b"\n") == ROWS // 2


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://datasets", "hf://datasets/emoji", "hf://datasets//x", "hf://datasets/../..", "hf://buckets/org", "hf://buckets/../x",
     "hf://datasets/org/em oji", "hf://datasets/org/emoji@", "hf://-/x"],
)  # fmt: skip
def test_addresses_that_are_none_are_said_to_be_none(hub: Hub, address: str) -> None:
    """Without a request, and not as damage."""
    for command in (["doctor", address], ["inspect", address]):
        assert main(command) == 2
    with pytest.raises(PoolError, match="is not an address of the Hub; give hf://datasets/OWNER/NAME"):
        open_data(address)
    assert hub.requests == []


@pytest.mark.parametrize(
    "rest", ["", "/", "/tree/main", "/tree/main/data", "/blob/main/a.parquet", "/viewer", "?row=3", "/viewer/a/b?p=1#x"]
)
def test_a_page_of_the_hub_is_not_its_data(hub: Hub, rest: str) -> None:
    for host in ("https://huggingface.co", "http://hf.co"):
        with pytest.raises(PoolError, match="is a page of the Hub; give hf://datasets/org/emoji"):
            open_data(f"{host}/datasets/org/emoji{rest}")
    file = "https://huggingface.co/datasets/org/emoji/resolve/main/a.tar"
    assert pinned(file) == file


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("hf://buckets/org/files/x", "hf sync"),
        (f"hf://datasets/org/results@{'a' * 40}/x", "a commit never changes"),
        ("hf://datasets/org/results", "a whole repository"),
        ("hf://datasets", "is not an address of the Hub"),
    ],
)
def test_places_on_the_hub_that_cannot_be_written(hub: Hub, tmp_path: Path, out: str, why: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(0))
    with pytest.raises(UsageError, match=why):
        place(out)
    assert main(["select", "random", str(tmp_path), "--keep", "50%", "-o", out]) == 2
    assert hub.requests == []


def test_a_push_is_noticed_by_the_same_command(hub: Hub, tmp_path: Path) -> None:
    repo = hub.datasets["org/emoji"] = Repo()
    repo.push(dataset())
    how: dict[str, Any] = {"encoder": "tests.toy:Toy", "workers": 0, "progress": False}
    first = api.embed(NAME, tmp_path / "pool", **how)
    assert len(api.embed(NAME, tmp_path / "pool", **how)) == len(first) == 3 * ROWS
    repo.push({"README.md": b"another", "data/train-00003-of-00003.parquet": parquet(3 * ROWS)})
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    assert len(api.embed(NAME, tmp_path / "pool", **how)) == 4 * ROWS  # only the new file is embedded
    repo.push({"data/train-00001-of-00003.parquet": parquet(ROWS, seed=4)})
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    with pytest.raises(UsageError, match=r"data/train-00001-of-00003.parquet: has changed since it was embedded"):
        api.embed(NAME, tmp_path / "pool", **how)


@pytest.mark.slow
def test_training_reads_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.datasets["org/emoji"] = Repo()
    hub.datasets["org/emoji"].push(dataset())
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "workers": 0, "progress": False, "device": "cpu"}
    log = api.train_clip(NAME, tmp_path / "run", **settings)
    assert log[0]["total"] == 3 * ROWS
