"""Tars from tars: the same members, byte for byte, as copying them one by one gives."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.data.layouts.webdataset import TarPart
from thresher.errors import OutputError, PoolError, UsageError
from thresher.io.open import open_file
from thresher.io.tar import Window, tar_samples
from thresher.resharding import job, reshard, tars

from .common import hashes, keys_file, listed, plain, pool, tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def slowly(paths: list[Path], times: Counter[str]) -> list[tuple[str, bytes]]:
    """What is to come out: members of chosen samples in order, the copies of a sample after it under free names."""
    samples: list[tuple[str, list[tuple[str, bytes]]]] = []
    for path in paths:
        with tarfile.open(path) as file:
            for one in file:
                folder, slash, base = one.name.rpartition("/")
                key, ending = folder + slash + base.partition(".")[0], base.partition(".")[2]
                if not samples or samples[-1][0] != key:
                    samples.append((key, []))
                samples[-1][1].append((ending, file.extractfile(one).read()))  # type: ignore[union-attr]
    out, chosen = [], {key for key, _ in samples if times[key]}
    for key, found in samples:
        names, number = [key], 0
        while len(names) < times[key]:
            number += 1
            names += [f"{key}-{number}"] if f"{key}-{number}" not in chosen else []
        for name in names[: times[key]]:
            out += [(f"{name}.{ending}", content) for ending, content in found]
    return out


letters = st.text(st.characters(codec="utf-8", exclude_characters="\0/.\\:\n\r", exclude_categories=["Cs"]), min_size=1)
folders = st.sampled_from(["", "a/", "d.e/f/", "x" * 90 + "/", "/".join(["long" * 20] * 4) + "/"])
names = st.one_of(
    st.sampled_from(["a", "a-1", "a-2", "b", "7", "07"]), letters.map(lambda s: s[:40]), letters.map(lambda s: s * 60)
)
keys = st.builds(lambda folder, name: folder + name[:150], folders, names).filter(
    lambda key: not key.startswith("__") and len(key.encode()) < 700
)
contents = st.dictionaries(
    st.sampled_from(["jpg", "txt", "json", "seg.png", "CLS"]), st.binary(max_size=1_100), min_size=1, max_size=3
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    samples=st.dictionaries(keys, contents, min_size=1, max_size=9),
    form=st.sampled_from(FORMATS[1:]),
    cuts=st.lists(st.integers(0, 9), max_size=2),
    per_shard=st.integers(1, 5),
    data=st.data(),
)
def test_like_copying_members_one_by_one(samples, form, cuts, per_shard, data) -> None:
    every = list(samples.items())
    times = Counter({key: data.draw(st.sampled_from([0, 1, 1, 2, 4])) for key in samples})
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        edges = [0, *sorted(min(cut, len(every)) for cut in cuts), len(every)]
        paths = [tar(root / "in" / f"{i}.tar", every[lo:hi], form) for i, (lo, hi) in enumerate(zip(edges, edges[1:]))]  # noqa: B905
        wanted = slowly(paths, times)
        sel = keys_file(root / "keys.txt", times.elements())
        if not wanted:
            with pytest.raises((UsageError, PoolError)):
                reshard(str(root / "in"), sel, str(root / "out"))
            return
        done = reshard(str(root / "in"), sel, str(root / "out"), per_shard=per_shard, workers=2)
        assert listed(root / "out") == wanted
        assert done.samples == times.total() == done.chosen
        sizes = json.loads((root / "out" / "sizes.json").read_text())
        assert sizes == {
            f"{i:08d}.tar": min(per_shard, times.total() - i * per_shard) for i in range(-(-times.total() // per_shard))
        }
        for name, count in sizes.items():
            stats = json.loads((root / "out" / name.replace(".tar", "_stats.json")).read_text())
            assert stats["successes"] == count
        # Ours read it, too, as the samples that were put in.
        again = [key for path in sorted((root / "out").glob("*.tar")) for key in TarPart(str(path)).scan().keys]
        assert Counter(again) == Counter(dict.fromkeys(again, 1))
        assert len(again) == times.total()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 3), per_shard=st.integers(1, 7), data=st.data())
def test_shuffled_is_the_same_samples_for_any_workers(seed, per_shard, data) -> None:
    times = Counter({f"{i:06d}": data.draw(st.sampled_from([0, 1, 3])) for i in range(8)}) + Counter(["000003"])
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for i in range(2):
            tar(root / "in" / f"{i}.tar", plain(4, 4 * i))
        sel = keys_file(root / "keys.txt", times.elements())
        for workers in (1, 2):
            out = root / f"out{workers}"
            reshard(str(root / "in"), sel, str(out), per_shard=per_shard, shuffle=seed, workers=workers)
            (out / "reshard.json").unlink()  # tells where the data and the result are
        assert hashes(root / "out1") == hashes(root / "out2")
        straight = slowly([root / "in" / "0.tar", root / "in" / "1.tar"], times)
        assert sorted(listed(root / "out1")) == sorted(straight)


def test_shuffling_shuffles_over_all_shards(tmp_path: Path) -> None:
    tar(tmp_path / "in" / "0.tar", plain(200))
    sel = keys_file(tmp_path / "keys.txt", [f"{i:06d}" for i in range(200)])
    orders = []
    for seed in (0, 1):
        reshard(str(tmp_path / "in"), sel, str(tmp_path / f"out{seed}"), per_shard=50, shuffle=seed)
        orders.append([int(name[:6]) for name, _ in listed(tmp_path / f"out{seed}") if name.endswith("txt")])
        assert sorted(orders[seed]) == list(range(200))
        assert all(np.ptp(orders[seed][lo : lo + 50]) > 100 for lo in range(0, 200, 50))
    assert orders[0] != orders[1]


def test_headers_stay_as_they_are(tmp_path: Path) -> None:
    source = tar(tmp_path / "in" / "0.tar", [("n" * 120, {"txt": b"long"}), ("é", {"txt": b"pax"})], tarfile.PAX_FORMAT)
    reshard(str(source), keys_file(tmp_path / "k", ["n" * 120, "é", "é"]), str(tmp_path / "out"))
    raw = source.read_bytes()
    with tarfile.open(source) as file:
        end = file.getmembers()[-1].offset_data + 512
    made = (tmp_path / "out" / "00000000.tar").read_bytes()
    assert made[:end] == raw[:end]
    with tarfile.open(tmp_path / "out" / "00000000.tar") as file:
        copy = file.getmembers()[-1]
        assert (copy.name, copy.mtime, copy.mode, copy.uname) == ("é-1.txt", 1001, 0o640, "someone")
    assert len(made) % tarfile.RECORDSIZE == 0


def test_sizes_in_binary_and_contents_of_no_bytes(tmp_path: Path) -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 3
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    tar(tmp_path / "rest.tar", [("none", {"txt": b""}), ("last", {"txt": b"x"})])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(
        bytes(header) + b"abc".ljust(512, b"\0") + (tmp_path / "rest.tar").read_bytes()
    )
    sel = keys_file(tmp_path / "k", ["big", "none", "none", "big"])
    reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    told = [("big.bin", b"abc"), ("big-1.bin", b"abc"), ("none.txt", b""), ("none-1.txt", b"")]
    assert listed(tmp_path / "out") == told


def test_uids_of_datacomp_with_their_repeats(tmp_path: Path) -> None:
    uids = [f"{i:032x}" for i in (5, 2**100 + 3, 7)]
    samples = [(f"{i:09d}", {"jpg": b"j", "json": json.dumps({"uid": uid}).encode()}) for i, uid in enumerate(uids)]
    samples.append(("000000009", {"jpg": b"no json"}))
    tar(tmp_path / "in" / "0.tar", samples)
    rows = [(0, 5), (0, 5), (0, 77), (2**36, 3)]
    np.save(tmp_path / "subset.npy", np.array(rows, "u8,u8"))
    done = reshard(str(tmp_path / "in"), str(tmp_path / "subset.npy"), str(tmp_path / "out"))
    names = [name for name, _ in listed(tmp_path / "out")]
    assert names == [f"{key}.{end}" for key in ("000000000", "000000000-1", "000000001") for end in ("jpg", "json")]
    assert (done.by, done.missing, done.samples, done.chosen) == ("uid", 1, 3, 4)
    assert (tmp_path / "out" / "missing.txt").read_text() == f"{77:032x}\n"


@pytest.mark.parametrize(
    "content",
    [
        b'{"meta": {"uid": "%s"}, "uid": "%s"}',
        b'{"\\u0075id": "%.0s%s"}',
        b'{"caption": "\\"uid\\": \\"%s\\"", "uid":"%s"}',
    ],
)
def test_the_uid_is_that_of_the_json_itself(tmp_path: Path, content: bytes) -> None:
    good, bad = f"{1:032x}", f"{2:032x}"
    tar(tmp_path / "in" / "0.tar", [("a", {"json": content % (bad.encode(), good.encode())})])
    assert reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", [good]), str(tmp_path / "out")).samples == 1
    with pytest.raises(PoolError, match="none of 1 selected key"):
        reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", [bad]), str(tmp_path / "out2"))


def places(paths: list[Path]) -> list[tuple[str, str, int]]:
    rows = []
    for path in paths:
        with open(path, "rb") as file:
            for group in tar_samples(Window(file, str(path)), str(path)):
                rows.append((group.key, path.name, next(iter(group.members.values())).start))
    return rows


def test_known_places_tell_apart_samples_of_one_key(tmp_path: Path) -> None:
    """Nothing else in the tars is read: the rest may even be damaged."""
    paths = [
        tar(tmp_path / "in" / f"{i}.tar", [(key, {"txt": f"{key}{i}".encode()}) for key in "abc"], FORMATS[i])
        for i in (1, 2)
    ]
    rows = places(paths)
    sel = pool(tmp_path, rows, [0, 3, 4], {0: 2, 3: 1, 4: 2})
    with open(paths[0], "r+b") as file:
        file.seek(rows[2][2])
        file.write(b"damaged")
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    assert (done.by, done.samples, done.chosen) == ("place", 5, 5)
    assert listed(tmp_path / "out") == [
        ("a.txt", b"a1"), ("a-1.txt", b"a1"), ("a-2.txt", b"a2"), ("b.txt", b"b2"), ("b-1.txt", b"b2"),
    ]  # fmt: skip


def test_places_and_keys_give_the_same_files(tmp_path: Path) -> None:
    paths = [tar(tmp_path / "in" / f"{i}.tar", plain(5, 5 * i), FORMATS[i]) for i in (0, 1, 2)]
    rows = places(paths)
    sel = pool(tmp_path, rows, [1, 2, 7, 14], {1: 3, 2: 1, 7: 1, 14: 2})
    times = Counter({rows[1][0]: 3, rows[2][0]: 1, rows[7][0]: 1, rows[14][0]: 2})
    assert reshard(str(tmp_path / "in"), sel, str(tmp_path / "a"), shuffle=1, per_shard=3).by == "place"
    by_key = keys_file(tmp_path / "k", times.elements())
    assert reshard(str(tmp_path / "in"), by_key, str(tmp_path / "b"), shuffle=1, per_shard=3).by == "key"
    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "reshard.json"} == {k: v for k, v in b.items() if k != "reshard.json"}


@pytest.mark.parametrize("change", ["moved", "renamed", "cut"])
def test_places_that_do_not_hold_any_more_are_not_trusted(tmp_path: Path, change: str) -> None:
    paths = [tar(tmp_path / "in" / f"{i}.tar", plain(5, 5 * i)) for i in (0, 1)]
    sel = pool(tmp_path, places(paths), [1, 4, 6])
    if change == "moved":  # one sample more stands before the others
        tar(paths[0], [("new", {"txt": b"n"}), *plain(5)])
    elif change == "renamed":
        paths[0].rename(tmp_path / "in" / "other.tar")
    else:
        paths[1].write_bytes(paths[1].read_bytes()[:540])
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    assert done.by == "key"
    found = {name for name, _ in listed(tmp_path / "out") if name.endswith("png")}
    assert found == {"000001.png", "000004.png"} | (set() if change == "cut" else {"000006.png"})
    assert (done.missing, done.aside) == ((1, 1) if change == "cut" else (0, 0))


def test_a_key_of_two_samples_is_refused(tmp_path: Path) -> None:
    for i in range(2):
        tar(tmp_path / "in" / f"{i}.tar", [("same", {"txt": b"x"}), (f"other{i}", {"txt": b"y"})])
    with pytest.raises(UsageError, match=r"1\.tar: the sample at 0 has the same key as another chosen sample"):
        reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["same"]), str(tmp_path / "out"))
    done = reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["other0", "other1"]), str(tmp_path / "out"))
    assert done.samples == 2


def test_unsafe_names_and_links_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as file:
        plain_files = ("../up.txt", "/root.txt", "good.txt")
        for name, kind in [
            *((name, b"0") for name in plain_files),
            ("good.jpg", b"2"),
            ("d", b"5"),
            ("good.json", b"0"),
            ("a/../b.txt", b"0"),
            ("dev.txt", b"3"),
            ("end.txt", b"0"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == b"2" else ""
            content = name.encode() if kind == b"0" else b""
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    keys = ["../up", "/root", "good", "a/../b", "dev", "end"]
    done = reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", keys), str(tmp_path / "out"))
    assert listed(tmp_path / "out") == [(n, n.encode()) for n in ("good.txt", "good.json", "end.txt")]
    assert (done.aside, done.missing) == (3, 1)
    aside = (tmp_path / "out" / "set-aside.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in aside] == ["../up", "/root", "a/../b"]
    assert (tmp_path / "out" / "missing.txt").read_text() == "dev\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "k", "out"]


def test_global_headers_of_a_tar_are_not_copied(tmp_path: Path) -> None:
    """A global header would go on to hold in the shard, for every sample after it."""
    (tmp_path / "in").mkdir()
    header = tarfile.TarInfo.create_pax_global_header({"path": "evil", "comment": "x"})
    for name in ("0", "1"):
        tar(tmp_path / f"{name}.tar", [(f"k{name}", {"txt": name.encode(), "jpg": b"j"})])
        (tmp_path / "in" / f"{name}.tar").write_bytes(header + (tmp_path / f"{name}.tar").read_bytes())
    reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["k0", "k1", "k1"]), str(tmp_path / "out"))
    assert [name for name, _ in listed(tmp_path / "out")] == [
        "k0.txt", "k0.jpg", "k1.txt", "k1.jpg", "k1-1.txt", "k1-1.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cut", "usable", "why"),
    [
        (1, 0, "in the header of a member"),
        (540, 0, "in the member '000003.png'"),
        (1_024, 0, None),  # a sample of a picture alone, then nothing
        (2 * 2_048 + 100, 1, "in the header of a member"),
        (5 * 2_048 - 510, 4, "in the member '000007.txt'"),
    ],
)
def test_of_a_damaged_tar_the_samples_before_the_damage_are_used(
    tmp_path, cut: int, usable: int, why: str | None
) -> None:
    tar(tmp_path / "in" / "0.tar", plain(3))
    bad = tar(tmp_path / "in" / "1.tar", plain(12, 3))
    bad.write_bytes(bad.read_bytes()[:cut])
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(15)])
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    found = listed(tmp_path / "out")
    if why is None:
        assert (found[6][0], len(found), done.aside) == ("000003.png", 7, 0)
        return
    assert done.samples == 3 + usable
    assert (done.missing, done.aside) == (12 - usable, 1)
    assert [name[:6] for name, _ in found] == [f"{i:06d}" for i in range(3 + usable) for _ in range(2)]
    told = (tmp_path / "out" / "set-aside.txt").read_text()
    assert told == f"{bad}\t\tis cut off at byte {cut:,}, {why}\n"


def test_padding_that_a_tar_lacks_at_its_end_is_made_up_for(tmp_path: Path) -> None:
    source = tar(tmp_path / "in" / "0.tar", [("a", {"txt": b"1"}), ("b", {"txt": b"2"})])
    source.write_bytes(source.read_bytes()[: 3 * 512 + 1])
    reshard(str(source), keys_file(tmp_path / "k", ["a", "b", "b"]), str(tmp_path / "out"))
    assert listed(tmp_path / "out") == [("a.txt", b"1"), ("b.txt", b"2"), ("b-1.txt", b"2")]


def test_nothing_usable_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(b"<html>no tar</html>" * 100)
    with pytest.raises(
        PoolError, match=r"none of 1 selected key; .*0\.tar: is not a tar; is the selection of other data\?"
    ):
        reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["a"]), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    from thresher.export.keys import KeySet
    from thresher.resharding import tars
    from thresher.resharding.originals import source_of
    from thresher.resharding.plan import match, planned

    source = tar(tmp_path / "0.tar", plain(3))
    wanted = KeySet.from_keys(["000002"])
    sources = [source_of(TarPart(str(source)))]
    plan, _ = planned(sources, [match(sources[0].part.scan(), wanted)], wanted)
    source.write_bytes(source.read_bytes()[:3_000])
    (tmp_path / "out.tar").touch()
    with pytest.raises(PoolError, match="was changed, run again"):
        tars.write(plan, sources, str(tmp_path / "out.tar"))


@pytest.mark.parametrize("shuffle", [None, 0])
def test_bytes_are_gathered_across_samples_and_tars(tmp_path: Path, monkeypatch, shuffle: int | None) -> None:
    """Whatever is held at a time: less than a header, or several samples."""
    rng = np.random.default_rng(0)
    samples = [(f"{i:06d}", {"bin": rng.bytes(int(rng.integers(0, 3_000))), "txt": b"x"}) for i in range(30)]
    paths = [tar(tmp_path / "in" / f"{i}.tar", samples[10 * i : 10 * i + 10]) for i in range(3)]
    times = Counter({key: i % 4 for i, (key, _) in enumerate(samples)})
    sel = keys_file(tmp_path / "k", times.elements())
    for held in (100, 512, 4_096, 10_000, 1 << 20):
        monkeypatch.setattr(tars, "_COPY", held)
        reshard(str(tmp_path / "in"), sel, str(tmp_path / f"{held}"), per_shard=20, shuffle=shuffle)
        wanted = slowly(paths, times)
        assert (sorted if shuffle == 0 else list)(listed(tmp_path / f"{held}")) == (sorted if shuffle == 0 else list)(
            wanted
        )
    a, b = hashes(tmp_path / "100"), hashes(tmp_path / str(1 << 20))
    assert {**a, "reshard.json": ""} == {**b, "reshard.json": ""}


def test_data_elsewhere(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/resharded/0.tar", tar(tmp_path / "0.tar", plain(4)).read_bytes())
    sel = keys_file(tmp_path / "k", ["000001", "000003", "000003"])
    reshard("memory://resharded", sel, str(tmp_path / "a"))
    reshard(str(tmp_path / "0.tar"), sel, str(tmp_path / "b"))
    assert listed(tmp_path / "a") == listed(tmp_path / "b")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # open_clip leaves sizes.json open
def test_open_clips_loader_reads_what_is_written(tmp_path: Path) -> None:
    from open_clip_train.data import get_wds_dataset

    from thresher.train.open_clip import insert_stage, stages_of

    tar(tmp_path / "in" / "0.tar", plain(20))
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 20, 2)] + ["000004", "000004"])
    reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"), per_shard=5, shuffle=0)
    args = SimpleNamespace(
        train_data=str(tmp_path / "out" / "{00000000..00000002}.tar"), train_data_upsampling_factors=None, seed=0,
        train_num_samples=None, dataset_resampled=False, batch_size=4, workers=0, world_size=1,
    )  # fmt: skip
    info = get_wds_dataset(args, lambda image: torch.tensor(image.size), is_train=True, tokenizer=lambda text: [text])
    insert_stage(stages_of(info.dataloader), lambda samples: samples, ids=False)  # reads tars with any webdataset
    assert info.dataloader.num_samples == 12
    seen = Counter(text for _, texts in info.dataloader for text in texts)
    assert seen == Counter([f"picture {i}" for i in range(0, 20, 2)] + ["picture 4"] * 2)


@pytest.mark.parametrize("where", ["in", "in/below", "."])
def test_shards_are_not_put_among_the_data(tmp_path: Path, where: str) -> None:
    tar(tmp_path / "in" / "0.tar", plain(2))
    with pytest.raises(OutputError, match="data"):
        reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["000000"]), str(tmp_path / where))
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["0.tar"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("way", ["key", "place", "resumed"])
def test_the_headers_of_a_tar_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, workers: int
) -> None:
    """By finding; writing opens a tar once a shard, for what it copies, also where samples get other names."""
    for i in range(3):
        tar(tmp_path / "in" / f"{i}.tar", plain(20, 20 * i))
    chosen = [*range(0, 60, 3), *range(0, 60, 12)]
    sel: str = keys_file(tmp_path / "k", [f"{i:06d}" for i in chosen])
    if way == "place":
        rows = places(sorted((tmp_path / "in").iterdir()))
        sel = pool(tmp_path, rows, range(0, 60, 3), dict.fromkeys(range(0, 60, 12), 2))
    monkeypatch.setattr(job, "_KEPT", 0)
    whole = reshard(str(tmp_path / "in"), sel, str(tmp_path / "whole"), per_shard=10_000, shuffle=1)
    assert (whole.samples, whole.by) == (25, "place" if way == "place" else "key")
    opened: dict[str, list[str]] = {"scan": [], "write": []}

    def counting(into: str):
        def opening(protocol: str, path: str, *_: object):
            opened[into].append(Path(path).name)
            return open_file(protocol, path)

        return opening

    monkeypatch.setattr("thresher.data.layouts.webdataset.open_file", counting("scan"))
    monkeypatch.setattr(TarPart, "lacks_end", lambda _: False)  # reads the last bytes, and no headers
    monkeypatch.setattr(tars, "open_spans", counting("write"))
    out = tmp_path / "out"
    if way == "resumed":
        with monkeypatch.context() as patch:
            patch.setattr(tars, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                reshard(str(tmp_path / "in"), sel, str(out), per_shard=10_000, shuffle=1, workers=workers)
        assert sorted(opened["scan"]) == ["0.tar", "1.tar", "2.tar"]
    reshard(str(tmp_path / "in"), sel, str(out), per_shard=10_000, shuffle=1, workers=workers)
    assert sorted(opened["scan"]) == sorted(opened["write"]) == ["0.tar", "1.tar", "2.tar"]
    assert hashes(out) == hashes(tmp_path / "whole")


def test_what_was_found_counts_only_for_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar of the same size that was written since is another; a damaged memory is none."""
    path = tar(tmp_path / "in" / "0.tar", plain(6))
    sel = keys_file(tmp_path / "k", ["000001", "000004"])

    def killed() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(tars, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))

    found = tmp_path / "out" / ".reshard" / "found.npz"
    killed()
    assert (found.with_name("plan.json").exists(), found.exists()) == (True, False), "finding it took no time"
    monkeypatch.setattr(job, "_KEPT", 0)
    killed()
    found.write_bytes(found.read_bytes()[:-100])
    killed()
    size = path.stat().st_size
    tar(tmp_path / "in" / "0.tar", [*plain(3), *plain(3, 6)])
    assert path.stat().st_size == size
    with pytest.raises(OutputError, match="other data or options"):
        reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    assert reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"), overwrite=True).missing == 1


@pytest.mark.parametrize(
    "name", ["a.jpg", *(f"{'é' * half}{'x' * rest}.j" for half in (48, 49, 255) for rest in range(3))]
)
@pytest.mark.parametrize("size", [0, 1, 8**11, 8**12])
def test_the_size_of_a_header_is_known_before_it_is_made(name: str, size: int) -> None:
    from thresher.resharding.tars import header, header_size

    assert header_size(name) == len(header(name, size))
