"""The stage for webdataset: what a slow filter lets through, before anything is decoded."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import pickle
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import open_clip_train.data as their_data
import pytest
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.ahead_fs import Ahead, memory
from tests.objects import s3_environment
from tests.resharding.common import tar
from tests.tar_indexes import slow_index
from thresher import Selection, build
from thresher.errors import PoolError, UsageError
from thresher.export.keys import KeySet
from thresher.export.webdataset import keep, read_kept
from thresher.export.write import export
from thresher.train.open_clip import insert_stage, stages_of

N, SHARDS = 48, 4
__all__ = ["memory"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # webdataset leaves that to the interpreter
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def uid(i: int) -> str:
    return f"{i:05d}" + "ab" * 13 + "c"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tars of pictures of one colour, numbers 0 to N-1, as DataComp has them: key, caption, json with uid."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * N // SHARDS, (shard + 1) * N // SHARDS):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (i, i, i)).save(picture, "PNG")
                about = json.dumps({"uid": uid(i).upper() if i % 2 else uid(i), "url": "x"}).encode()
                for ending, content in (("png", picture.getvalue()), ("txt", b"the %d" % i), ("json", about)):
                    info = tarfile.TarInfo(f"{i:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [str(folder / f"{shard:05d}.tar") for shard in range(SHARDS)]


@pytest.fixture
def subset(
    pool: Callable[..., Any], rows: Callable[..., Any], select: Callable[..., Selection], tmp_path: Path
) -> Callable[..., tuple[str, Counter[int]]]:
    """Save a selection, of rows known by keys or uids, and return its folder and how often each number is used."""

    def make(name: Callable[[int], str] = "{:09d}".format, *, repeats: bool = False) -> tuple[str, Counter[int]]:
        store = pool(rows(N), rows(N, seed=1), {"uid": [name(i) for i in range(N)]})
        found = select(store, build(*(("scs", {"draws": 60}) if repeats else ("random", {"keep": "50%"}))))
        found.save(tmp_path / "subset")
        times = found.mask().astype(int) if found.repeats is None else found.repeats
        return str(tmp_path / "subset"), +Counter(dict(enumerate(times.tolist())))

    return make


def numbers(samples: Any) -> Counter[int]:
    """How often a picture comes, by its colour."""
    return Counter(int(np.asarray(image)[0, 0, 0]) for image, _ in samples)


def pipeline(shards: list[str], stage: Any, *before: Any) -> Any:
    return wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        *before,
        stage,
        wds.shuffle(10),
        wds.decode("pil"),
        wds.to_tuple("png", "txt"),
    )


# Against a slow filter


def slow(samples: list[dict[str, Any]], wanted: dict[str, int], by: str) -> list[dict[str, Any]]:
    """All that comes through, by a dictionary."""
    found = []
    for sample in samples:
        try:
            own = json.loads(sample["json"])["uid"]
        except (KeyError, TypeError, ValueError):
            own = None
        named = own.lower() if isinstance(own, str) else None
        uids = {one for one in wanted if len(one) == 32 and not set(one) - set("0123456789abcdef")}
        key = named if by == "uid" or (by == "auto" and uids and named in wanted) else sample["__key__"]
        found += [sample] * wanted.get(key, 0)
    return found


names = st.sampled_from(["a", "b", "", "a.b", "\udcff", uid(0), uid(1), uid(2)])
members = st.one_of(
    st.none(),
    st.sampled_from([b"", b"{", b"[1]", b"{}", b"null", b'{"uid": null}', b"\xff"]),
    st.builds(lambda name: json.dumps({"uid": name}).encode(), names | st.sampled_from([uid(0).upper()])),
)


@given(
    st.lists(st.tuples(names, members), max_size=12),
    st.dictionaries(names, st.integers(1, 3), min_size=1, max_size=5),
    st.sampled_from(["auto", "key", "uid"]),
)
def test_what_comes_through_is_what_a_slow_filter_lets_through(
    given: list[tuple[str, bytes | None]], wanted: dict[str, int], by: Any
) -> None:
    samples = [
        {"__key__": key, "png": bytes([i]), **({} if contents is None else {"json": contents})}
        for i, (key, contents) in enumerate(given)
    ]
    stage = keep(KeySet.from_counts(wanted.items()), by=by)
    expected = slow(samples, wanted, by)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(stage(iter(samples))) == expected
    assert (stage.seen, stage.kept) == (len(samples), len(expected))


def test_a_pool_may_know_some_samples_by_uids_and_others_by_keys() -> None:
    """Such is a pool of tars in which a json is damaged: none of the others may be lost for it."""
    samples = [{"__key__": f"{i}", "json": json.dumps({"uid": uid(i)}).encode()} for i in range(5)]
    samples[3]["json"] = b"{"
    chosen = KeySet.from_keys([uid(0), uid(2), "3"])
    assert [sample["__key__"] for sample in keep(chosen)(samples)] == ["0", "2", "3"]


def test_a_json_is_read_decoded_or_not_and_may_be_anything() -> None:
    stage = keep(KeySet.from_keys([uid(1)]))
    contents = [
        {"uid": uid(1)},
        {"uid": uid(2)},
        json.dumps({"uid": uid(1)}),
        "[" * 100_000,
        b"[" * 100_000,
        7,
        [uid(1)],
    ]
    samples = [{"__key__": str(i), "json": content} for i, content in enumerate(contents)]
    assert [sample["__key__"] for sample in stage(samples)] == ["0", "2"]


def test_a_repeated_sample_comes_in_a_row_and_each_is_its_own() -> None:
    stage, came = keep(KeySet.from_counts([("a", 3), ("b", 1)])), []
    for sample in stage([{"__key__": "a", "x": 1}, {"__key__": "c", "x": 1}, {"__key__": "b", "x": 1}]):
        sample["x"] += 1  # as wds.map_dict does, in place
        came.append(sample)
    assert came == [{"__key__": "a", "x": 2}] * 3 + [{"__key__": "b", "x": 2}]


def test_samples_are_taken_one_by_one() -> None:
    stage = keep(KeySet.from_keys(str(i) for i in range(0, 100, 2)))
    found = itertools.islice(stage({"__key__": str(i)} for i in itertools.count()), 3)
    assert [sample["__key__"] for sample in found] == ["0", "2", "4"]
    assert (stage.seen, stage.kept) == (5, 3)


def test_a_stream_of_other_data_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = keep(KeySet.from_keys(["x"]))
    with pytest.warns(UserWarning, match="none of 2 samples has one of 1 kept key; the first has 'a'"):
        assert not list(stage([{"__key__": "a"}, {"__key__": "b"}]))
    with pytest.warns(UserWarning, match="none of 1 sample .*; the first has no uid"):
        assert not list(keep(KeySet.from_keys(["x"]), by="uid")([{"__key__": "x"}]))
    assert not list(stage([]))
    assert list(stage([{"__key__": "a"}, {"__key__": "x"}])) == [{"__key__": "x"}]
    monkeypatch.setattr("thresher.export.webdataset._LOOKED", 10)
    with pytest.warns(UserWarning, match="none of 10 samples") as caught:
        next(itertools.islice(stage({"__key__": "a" if i < 50 else "x"} for i in itertools.count()), 1))
    assert len(caught) == 1
    for n in (9, 10, 11):
        with pytest.warns(UserWarning, match=f"none of {min(n, 10)} samples?") as caught:
            assert not list(stage([{"__key__": "a"}] * n))
        assert len(caught) == 1


def test_an_endless_stream_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.txt").write_text("x1\nx2\n")
    about = json.dumps({"uid": uid(7)})
    endless = ({"__key__": f"{i:09d}", "jpg": b"", "json": about} for i in itertools.count())
    with pytest.raises(UsageError) as caught:
        next(keep(tmp_path / "keys.txt", patience=30)(endless))
    assert str(caught.value) == (
        f"none of 30 samples has one of 2 kept keys; the first has '000000000' and the uid '{uid(7)}'; members: "
        'jpg, json; the selection has keys such as \'x1\'. Give a selection of these data, or by="key" or by="uid". '
        "If its samples come later, raise patience="
    )
    stage = keep(KeySet.from_keys(["x", "1"]), patience=30)
    assert sum(1 for _ in itertools.islice(stage({"__key__": str(i % 20)} for i in itertools.count()), 9)) == 9
    monkeypatch.setattr("thresher.export.webdataset._PASSES", 2)
    monkeypatch.setattr("thresher.export.webdataset.PATIENCE", 7)
    stage = keep(KeySet.from_keys(["x"]))  # as webdataset's with_epoch does
    with pytest.warns(UserWarning, match="none of 3 samples"):
        assert [list(stage([{"__key__": "a"}] * 3)) for _ in range(2)] == [[], []]
    with pytest.raises(UsageError, match="none of 1 sample has one of"):
        list(stage([{"__key__": "a"}] * 3))
    with pytest.raises(UsageError, match="patience=0; give 1 or more"):
        keep(KeySet.from_keys(["x"]), patience=0)


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    one = KeySet.from_keys(["a"])
    with pytest.raises(UsageError, match=r"by='uuid'; give one of auto, key, uid. Did you mean 'uid'\?"):
        keep(one, by="uuid")  # type: ignore[arg-type]
    (tmp_path / "keys.txt").write_text("\n")
    with pytest.raises(UsageError, match="has no keys, so no sample would be kept"):
        keep(tmp_path / "keys.txt")
    with pytest.raises(PoolError, match="neither a selection folder nor a file of keys"):
        keep("nothing.txt")
    for sample, there in (({"png": b""}, "it has png"), ((1, 2), "no fields: it is <class 'tuple'>")):
        with pytest.raises(UsageError, match=f"a sample without __key__; it has .*{there.split('it has ')[-1]}"):
            list(keep(one)([sample]))


# In pipelines


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("known", ["{:09d}".format, uid])
def test_a_pipeline_gives_the_selection(
    subset: Callable[..., Any], shards: list[str], known: Callable[[int], str], repeats: bool
) -> None:
    folder, times = subset(known, repeats=repeats)
    stage = keep(folder)
    dataset = pipeline(shards, stage)
    assert numbers(dataset) == times
    assert (stage.seen, stage.kept) == (N, times.total())
    assert numbers(dataset) == times
    assert (stage.seen, stage.kept) == (2 * N, 2 * times.total())
    fluid = wds.WebDataset(shards, shardshuffle=False).compose(keep(folder)).decode("pil").to_tuple("png", "txt")
    assert numbers(fluid) == times


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_share_the_shards_and_the_selection(
    subset: Callable[..., Any], shards: list[str], start: str
) -> None:
    folder, times = subset(uid, repeats=True)
    stage = keep(folder)
    loader = torch.utils.data.DataLoader(
        pipeline(shards, stage), batch_size=None, num_workers=2, multiprocessing_context=start
    )
    assert numbers(loader) == times
    assert stage.seen == 0  # they count for themselves


def test_a_stage_is_sent_as_its_arrays() -> None:
    stage = keep(KeySet.from_keys(f"{i:09d}" for i in range(10_000)))
    sent = pickle.dumps(stage)
    assert len(sent) < 9.1 * 10_000 + 1_000
    again = pickle.loads(sent)
    assert [one["__key__"] for one in again([{"__key__": "000000012"}, {"__key__": "x"}])] == ["000000012"]


def test_pictures_that_are_not_kept_are_never_decoded(
    subset: Callable[..., Any], shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, times = subset()
    opened, own = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **more: opened.append(given) or own(*given, **more))
    assert numbers(pipeline(shards, keep(folder))) == times
    assert len(opened) == len(times) < N


def test_damaged_pictures_do_no_harm_where_they_are_not_kept(subset: Callable[..., Any], shards: list[str]) -> None:
    folder, times = subset()

    def damage(sample: dict[str, Any]) -> dict[str, Any]:
        return sample if int(sample["__key__"]) in times else {**sample, "png": b"no picture"}

    assert numbers(pipeline(shards, keep(folder), wds.map(damage))) == times


@pytest.mark.parametrize("workers", [0, 2])
def test_no_handler_of_webdataset_hides_that_a_stream_is_refused(shards: list[str], workers: int) -> None:
    dataset = wds.DataPipeline(
        wds.ResampledShards(shards),
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        keep(KeySet.from_keys(["x"]), patience=100),
        wds.shuffle(10),
        wds.decode("pil", handler=wds.warn_and_continue),
        wds.to_tuple("png", "txt", handler=wds.warn_and_continue),
    )
    with pytest.raises(UsageError, match="none of 100 samples has one of 1 kept key; .* raise patience="):
        next(iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)))


# In open_clip's


@pytest.fixture
def theirs(shards: list[str]) -> Callable[..., Any]:
    """open_clip's own data for training from webdataset."""

    def make(samples: int, **more: Any) -> Any:
        given = {"train_data": "::".join(shards), "train_num_samples": samples, "dataset_resampled": False}
        args = argparse.Namespace(
            **given, train_data_upsampling_factors=None, seed=0, batch_size=4, workers=0, world_size=1
        )
        vars(args).update(more)
        return their_data.get_wds_dataset(
            args,
            lambda image: torch.tensor(np.asarray(image)[0, 0, 0]),
            True,
            floor=True,
            tokenizer=lambda text: [text],
        )

    return make


def came(data: Any, epochs: int = 1) -> Counter[int]:
    found: Counter[int] = Counter()
    for epoch in range(epochs):
        data.set_epoch(epoch)
        for images, texts in data.dataloader:
            assert [f"the {i}" for i in images.tolist()] == list(texts)
            found.update(images.tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [False, True])
def test_open_clips_pipeline_gives_the_selection(
    subset: Callable[..., Any], theirs: Callable[..., Any], repeats: bool, tmp_path: Path
) -> None:
    folder, times = subset(repeats=repeats)
    stage = keep(folder)
    assert stage.keys.total % 4 == 0  # or a part of a batch is dropped, as open_clip has it
    data = theirs(stage.keys.total)
    before = list(stages_of(data.dataloader))
    insert_stage(stages_of(data.dataloader), stage, ids=False)
    assert len(stages_of(data.dataloader)) == len(before) + 1
    assert data.dataloader.num_samples == times.total()
    assert came(data, 2) == times + times
    assert (stage.seen, stage.kept) == (2 * N, 2 * times.total())


@pytest.mark.slow
def test_open_clips_workers_and_shards_drawn_with_replacement(
    subset: Callable[..., Any], theirs: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, times = subset(uid)
    export(Selection.load(folder), "datacomp", tmp_path / "subset.npy")
    with caplog.at_level(logging.WARNING):
        data = theirs(64, workers=2, dataset_resampled=True)
        insert_stage(stages_of(data.dataloader), keep(tmp_path / "subset.npy"), ids=False)
        found = came(data)
    assert found.total() == 64
    assert found.keys() <= times.keys()
    assert not caplog.text


# --- only the kept samples of tars ------------------------------------------------------------------


def at_address(shards: list[str], *, indexed: bool = True) -> list[str]:
    """Copy tars, and indexes of them, to memory that is read ahead."""
    fs = fsspec.filesystem("memory")
    for path in map(Path, shards):
        fs.pipe_file(f"/d/{path.name}", path.read_bytes())
        if indexed:
            fs.pipe_file(f"/d/{path.stem}.idx", slow_index(path).encode())
    return [f"ahead://d/{Path(path).name}" for path in shards]


def plain_samples(samples: Any) -> list[dict[str, Any]]:
    """Samples without where they are from."""
    return [{name: one for name, one in sample.items() if not name.startswith("__url")} for sample in samples]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("repeats", "by_uid"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_only_kept_samples_are_read_and_they_are_those_of_keep(
    shards: list[str], subset: Callable[..., Any], repeats: bool, by_uid: bool
) -> None:
    folder, times = subset(uid if by_uid else "{:09d}".format, repeats=repeats)
    whole = wds.DataPipeline(wds.SimpleShardList(shards), wds.tarfile_to_samples(), keep(folder))
    wanted = plain_samples(whole)
    assert Counter(int(sample["__key__"]) for sample in wanted) == times
    for urls in (shards, at_address(shards, indexed=False), at_address(shards)):
        stage = read_kept(folder)
        assert plain_samples(wds.DataPipeline(wds.SimpleShardList(urls), stage)) == wanted
        assert (stage.seen, stage.kept) == (N, sum(times.values()))
        assert [sample["__url__"] for sample in stage(urls[:1])] == urls[:1] * len(list(keep(folder)(
            wds.DataPipeline(wds.SimpleShardList(shards[:1]), wds.tarfile_to_samples())
        )))  # fmt: skip


@pytest.mark.usefixtures("memory")
def test_few_kept_samples_are_few_bytes(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", [(f"{i:04d}", {"jpg": bytes(20_000), "txt": b"x"}) for i in range(200)])
    (tmp_path / "keys.txt").write_text("0003\n0150\n0151\n")
    urls, size = at_address([str(path)]), path.stat().st_size
    Ahead.counts.clear()
    found = list(read_kept(str(tmp_path / "keys.txt"))(urls))
    assert [one["__key__"] for one in found] == ["0003", "0150", "0151"]
    assert all(one["jpg"] == bytes(20_000) for one in found)
    assert Ahead.counts["bytes"] < 0.2 * size
    fsspec.filesystem("memory").rm("/d/0.idx")
    assert len(list(read_kept(str(tmp_path / "keys.txt"))(urls))) == 3
    assert Ahead.counts["bytes"] > size


@pytest.mark.usefixtures("memory")
def test_an_index_that_turns_out_wrong_after_some_samples(tmp_path: Path) -> None:
    """None is read twice, none is left out, and it is said."""
    path = tar(tmp_path / "0.tar", [(f"{i:04d}", {"jpg": bytes([i]) * 700, "txt": b"x"}) for i in range(100)])
    (tmp_path / "keys.txt").write_text("".join(f"{i:04d}\n" for i in range(0, 100, 3)))
    urls = at_address([str(path)])
    lie = slow_index(path).replace(" 700 0063.jpg", " 699 0063.jpg")
    fsspec.filesystem("memory").pipe_file("/d/0.idx", lie.encode())
    stage = read_kept(str(tmp_path / "keys.txt"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = list(stage(urls))
    assert [one["__key__"] for one in found] == [f"{i:04d}" for i in range(0, 100, 3)]
    assert all(one["jpg"] == bytes([int(one["__key__"])]) * 700 for one in found)
    assert (stage.seen, stage.kept) == (100, 34)
    assert [str(one.message) for one in said] == [
        f"/d/0.idx: is not used, because it does not fit the tar at byte {63 * 2560:,}; write it again, or remove it"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:bucket/0.idx. is not used:UserWarning")
def test_kept_samples_on_s3_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "0.tar", [(f"{i:04d}", {"jpg": bytes(30_000), "txt": b"x"}) for i in range(100)])
    (tmp_path / "keys.txt").write_text("0003\n0050\n0051\n0099\n")
    stage = read_kept(str(tmp_path / "keys.txt"))
    with s3_environment(monkeypatch):
        fs = fsspec.filesystem("s3")
        fs.put(str(path), "bucket/0.tar")
        for index in (None, slow_index(path), "v1.2 3\nx"):
            if index is not None:
                fs.pipe_file("bucket/0.idx", index.encode())
            dataset = wds.DataPipeline(wds.SimpleShardList(["s3://bucket/0.tar"]), wds.split_by_worker, stage)
            loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
            assert [one["__key__"] for one in loader] == ["0003", "0050", "0051", "0099"]


def test_workers_read_kept_samples_of_their_tars(shards: list[str], subset: Callable[..., Any]) -> None:
    folder, times = subset()
    stage = pickle.loads(pickle.dumps(read_kept(folder)))
    dataset = wds.DataPipeline(wds.SimpleShardList(shards), wds.split_by_worker, stage, wds.shuffle(8))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert Counter(int(sample["__key__"]) for sample in loader) == times


def test_tars_of_other_data_and_sources_that_are_none(shards: list[str], tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("x\n")
    stage = read_kept(str(tmp_path / "keys.txt"), patience=2 * N)
    with pytest.warns(UserWarning, match=r"none of 48 samples has one of 1 kept key; the first has '000000000'"):
        assert list(stage(shards)) == []
    with pytest.raises(UsageError, match="none of 48 samples"):
        list(stage(shards))
    for source in ("pipe:cat 0.tar", {"url": "pipe:cat 0.tar"}, {"path": "0.tar"}, 3):
        with pytest.raises(UsageError, match="is not the path or address of a tar"):
            list(stage([source]))
    with pytest.raises(PoolError, match="no such file"):
        list(stage([str(tmp_path / "gone.tar")]))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shards[0]).read_bytes()[:2600])
    with pytest.raises(PoolError, match="is cut off at byte 2,600"):
        list(stage([str(cut)]))
