"""From raw pictures to training: shards that open_clip's own loader reads, and the commands of the documentation."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.embedding.raw import write_tar
from tests.loaded import loaded, quiet, tiny_model
from thresher import Selection, open_store
from thresher.cli.main import main
from thresher.data import Sample, open_data
from thresher.dynamic.run_folder import Training
from thresher.dynamic.stream import ids_of
from thresher.embedding import pipeline
from thresher.train import open_clip

EMOJI = Path(__file__).parents[1] / "examples" / "twemoji"
ROWS = 120


@pytest.fixture(scope="module")
def emoji() -> list[Sample]:
    return [sample for i, sample in enumerate(open_data(str(EMOJI)).samples()) if i % 32 == 0][:ROWS]


def webdataset(folder: Path, emoji: list[Sample]) -> str:
    for number in range(3):
        here = emoji[number * ROWS // 3 : (number + 1) * ROWS // 3]
        samples = [(s.key, {"webp": s.stored(), "txt": s.text.encode()}) for s in here]
        write_tar(folder / "tars" / f"{number:05d}.tar", samples)
    return f"{folder}/tars/{{00000..00002}}.tar"


def open_clip_csv(folder: Path, emoji: list[Sample]) -> str:
    (folder / "pictures").mkdir()
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, delimiter="\t")
        lines.writerow(["filepath", "title"])
        for sample in emoji:
            path = folder / "pictures" / f"{sample.key}.webp"
            path.write_bytes(sample.stored())
            lines.writerow([path, sample.text])
    return str(folder / "train.csv")


def parquet(folder: Path, emoji: list[Sample]) -> str:
    pictures = [{"bytes": sample.stored(), "path": None} for sample in emoji]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(pictures, kind), "text": [s.text for s in emoji], "id": [s.key for s in emoji]})
    pq.write_table(table, folder / "emoji.parquet")
    return str(folder / "emoji.parquet")


def pictures(folder: Path, emoji: list[Sample]) -> str:
    (folder / "pictures").mkdir()
    for sample in emoji:
        (folder / "pictures" / f"{sample.key}.webp").write_bytes(sample.stored())
        (folder / "pictures" / f"{sample.key}.txt").write_text(sample.text, encoding="utf-8")
    return str(folder / "pictures")


def mds(folder: Path, emoji: list[Sample]) -> str:
    from streaming import MDSWriter

    columns = {"image": "bytes", "caption": "str", "id": "str"}
    with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=40_000, compression="zstd") as out:
        for sample in emoji:
            out.write({"image": sample.stored(), "caption": sample.text, "id": sample.key})
    return str(folder / "mds")


def lance(folder: Path, emoji: list[Sample]) -> str:
    from lance import write_dataset

    columns = {"image": [s.stored() for s in emoji], "caption": [s.text for s in emoji], "id": [s.key for s in emoji]}
    write_dataset(pa.table(columns), str(folder / "emoji.lance"), max_rows_per_file=50)
    return str(folder / "emoji.lance")


@pytest.fixture(scope="module")
def _loaded_once() -> Iterator[None]:
    """The encoder is loaded for the first kind of data and used for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_encoder", functools.cache(pipeline.make_encoder))
        yield


@pytest.mark.usefixtures("_loaded_once")
@pytest.mark.parametrize(
    "made",
    [
        webdataset,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (open_clip_csv, parquet, pictures, mds, lance)),
    ],
)
@pytest.mark.filterwarnings("ignore")  # open_clip's and webdataset's own
def test_raw_pictures_become_a_pruned_webdataset(
    tmp_path: Path,
    emoji: list[Sample],
    made: Callable[[Path, list[Sample]], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data, pool, dedup, shards = made(tmp_path, emoji), *(str(tmp_path / name) for name in ("pool", "dedup", "shards"))
    for command in (
        ["doctor", data],
        ["embed", data, "-o", pool, "--encoder", "conse", "--workers", "1", "--quiet"],
        ["select", "semdedup", pool, "-o", dedup, "--eps", "0.1", "--clusters", "4", "--quiet"],
        ["reshard", data, dedup, "-o", shards, "--as", "webdataset", "--per-shard", "50", "--quiet"],
    ):
        assert main(command) == 0, f"{command}\n{capsys.readouterr().err}"
    kept = Selection.load(dedup)
    assert 20 < len(kept) < ROWS
    store = open_store(pool).where(kept.mask())
    expected = [text for _, part in store.scan(["text"]) for text in part.column(0).to_pylist()]
    assert set(expected) <= {sample.text for sample in emoji}
    from open_clip import get_tokenizer

    tokenize, sizes = get_tokenizer("ViT-B-32"), json.loads(Path(shards, "sizes.json").read_text())
    assert sum(sizes.values()) == len(kept)
    told = sorted(tuple(tokens.tolist()) for _, _, tokens in loaded([Path(shards, name) for name in sizes], tokenize))
    assert told == sorted(tuple(tokenize([text])[0].tolist()) for text in expected)


@pytest.mark.parametrize("made", [mds, lance])
@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mds_and_lance_are_data_of_every_command(
    tmp_path: Path, emoji: list[Sample], made: Callable[[Path, list[Sample]], str], train: bool
) -> None:
    data, pool, kept, shards = made(tmp_path, emoji), *(str(tmp_path / name) for name in ("pool", "kept", "shards"))
    trained = ["train", "clip", data, "-o", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "16"]
    for command in (
        ["doctor", data],
        ["embed", data, "-o", pool, "--encoder", "tests.toy:Toy", "--workers", "0", "--device", "cpu", "--quiet"],
        ["select", "random", pool, "-o", kept, "--keep", "40", "--quiet"],
        ["reshard", data, kept, "-o", shards, "--as", "parquet", "--workers", "1", "--quiet"],
        *([[*trained, "--workers", "0", "--device", "cpu", "--quiet"]] if train else []),
    ):
        assert main(command) == 0, command
    mask = Selection.load(kept).mask()
    copied = [(sample.key, sample.text, sample.stored()) for sample in open_data(shards).samples()]
    assert copied == [(s.key, s.text, s.stored()) for s, there in zip(emoji, mask, strict=True) if there]


# The commands of docs/train.md, from the data to a training step


SMALLER = {
    "--encoder open_clip:ViT-B-32/laion2b_s34b_b79k": "--encoder tests.toy:Toy --workers 0 --device cpu --quiet",
    "-o run ": "-o run --epochs 1 --batch-size 4 --workers 0 --device cpu --quiet ",
    "--model ViT-B-32": "--model local-dir:{model} --device cpu --precision fp32 --batch-size 4 --workers 0 --epochs 1 "
    "--warmup 0 --logs . --name run",
    "thresher reshard ": "thresher reshard --quiet ",
    "thresher select clip-score ": "thresher select clip-score --quiet ",
}
COUNT = 16


def commands(title: str) -> list[list[str]]:
    """The commands below a title of the section, in their smaller form, as arguments."""
    page = (Path(__file__).parents[1] / "docs" / "train.md").read_text(encoding="utf-8")
    section = page.partition("## From your data to a training step\n")[2].partition("\n## ")[0]
    block = section.partition(f"**{title}")[2].partition("```sh\n")[2].partition("\n```")[0].replace("\\\n", " ")
    for whole, part in SMALLER.items():
        block = block.replace(whole, part)
    return [shlex.split(line) for line in block.splitlines()]


def image(i: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (24, 20, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def caption(i: int) -> str:
    return f"picture number {i} of {'dogs' if i % 3 else 'cats'}"


def two_tars(pattern: str, name: str, endings: Callable[[int], dict[str, bytes]]) -> list[str]:
    """Two tars of samples, and their keys."""
    keys = [name.format(i) for i in range(32)]
    for number in range(2):
        some = range(16 * number, 16 * number + 16)
        write_tar(Path(pattern.format(number)), [(keys[i], endings(i)) for i in some])
    return keys


def img2dataset_files() -> list[str]:
    keys = []
    for folder in range(2):
        rows = []
        Path(f"cc3m-files/{folder:05d}").mkdir(parents=True)
        for i in range(COUNT // 2 + 1):
            key, number = f"{folder:05d}{i:04d}", folder * COUNT + i
            good = i != 4
            rows.append({"url": f"https://e.org/{key}", "caption": caption(number), "key": key,
                         "status": "success" if good else "failed_to_download"})  # fmt: skip
            if good:
                stem = Path(f"cc3m-files/{folder:05d}/{key}")
                stem.with_suffix(".jpg").write_bytes(image(number))
                stem.with_suffix(".txt").write_text(caption(number))
                stem.with_suffix(".json").write_text(json.dumps(rows[-1]))
                keys.append(f"{folder:05d}/{key}")
        pq.write_table(pa.Table.from_pylist(rows), f"cc3m-files/{folder:05d}.parquet")
        Path(f"cc3m-files/{folder:05d}_stats.json").write_text(json.dumps({"count": len(rows), "successes": 8}))
    return keys


def img2dataset_tars() -> list[str]:
    def sample(i: int) -> dict[str, bytes]:
        text = caption(i)
        return {"jpg": image(i), "txt": text.encode(), "json": json.dumps({"caption": text, "status": "ok"}).encode()}

    return two_tars("cc3m/{:05d}.tar", "{:09d}", sample)


def datacomp() -> list[str]:
    uids = [f"{i:05d}" + "ab" * 13 + "c" for i in range(32)]
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids[::2]]
    np.save("subset.npy", np.sort(np.array(halves, np.dtype("u8,u8"))))
    meta = [json.dumps({"uid": uid}).encode() for uid in uids]
    two_tars("datacomp/{:08d}.tar", "{:08d}", lambda i: {"jpg": image(i), "txt": caption(i).encode(), "json": meta[i]})
    return uids[::2]


def hub() -> list[str]:
    Path("hub").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": image(i), "path": f"{i}.jpg"} for i in range(COUNT)], kind)
    keys = [f"row-{i}" for i in range(COUNT)]
    table = pa.table({"image": pictures, "text": [caption(i) for i in range(COUNT)], "id": keys})
    pq.write_table(table, "hub/train-00000-of-00001.parquet")
    return keys


def save_to_disk() -> list[str]:
    import datasets

    rows = {"image": [{"bytes": image(i), "path": None} for i in range(COUNT)],
            "caption": [caption(i) for i in range(COUNT)], "id": [f"row-{i}" for i in range(COUNT)]}  # fmt: skip
    features = {"image": datasets.Image(), "caption": datasets.Value("string"), "id": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk("saved")
    return rows["id"]  # type: ignore[return-value]


def numbered(folder: str) -> list[str]:
    Path(folder).mkdir()
    names = [f"{1000 + i}" for i in range(COUNT)]
    for i, name in enumerate(names):
        Path(folder, f"{name}.jpg").write_bytes(image(i))
    return names


def flickr30k() -> list[str]:
    names = numbered("flickr30k_images")
    lines = [f"{name}.jpg| {c}| {caption(i)} , version {c} .\n" for i, name in enumerate(names) for c in range(5)]
    Path("results.csv").write_text("image_name| comment_number| comment\n" + "".join(lines))
    return names


def llava() -> list[str]:
    names = numbered("images")
    chats = [
        {"id": name, "image": f"{name}.jpg", "conversations": [
            {"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption(i)}]}
        for i, name in enumerate(names)
    ]  # fmt: skip
    Path("chat.json").write_text(json.dumps(chats))
    return names


def mixed() -> list[str]:
    Path("mixed").mkdir()
    kinds = ["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PNG", "PPM", "JPEG"]
    endings = ["jpg", "gif", "bmp", "TIF", "webp", "PNG", "ppm", "jpeg"]
    for i in range(COUNT + 4):
        Path("mixed", f"k{i:02d}.{endings[i % 8]}").write_bytes(image(i, kinds[i % 8]))
        Path("mixed", f"k{i:02d}.txt").write_text(caption(i))
    keys = [f"k{i:02d}" for i in range(COUNT)]
    Path("keys.txt").write_text("\n".join(keys))
    return keys


def polars_frame() -> list[str]:
    import polars

    keys = [f"row-{i}" for i in range(COUNT)]
    columns = {"key": keys, "image": [image(i) for i in range(COUNT)], "caption": [caption(i) for i in range(COUNT)]}
    polars.DataFrame(columns).write_ipc("frame.arrow")
    return keys


def trained(run: Path, keys: Sequence[str]) -> set[str]:
    """Those of some keys that a run trained on; the run has seen no others."""
    if (run / "pruning.jsonl").exists():  # of open_clip
        log = [json.loads(line) for line in (run / "pruning.jsonl").read_text().splitlines()]
        with np.load(run / "pruning-ledger.npz") as ledger:
            seen = set(ledger["hashes"][ledger["seen"] >= 0].tolist())
        hashes = [int(hashed) for hashed, _ in ids_of(keys)]
        assert seen <= set(hashes)
        found = {key for key, hashed in zip(keys, hashes, strict=True) if hashed in seen}
    else:
        training = Training.load(run)
        log = training.log()
        own = [key for _, part in open_store(training.location).keys() for key in part]
        with np.load(run / "ledger.npz") as ledger:
            found = {key for key, seen in zip(own, ledger["seen"].tolist(), strict=True) if seen >= 0}
    assert len(log) == 1
    assert math.isfinite(log[0]["loss"])
    assert log[0]["samples"] == len(found) > 0
    return found


@pytest.mark.filterwarnings("ignore")  # open_clip's and webdataset's own
@pytest.mark.parametrize(
    ("title", "made"),
    [
        ("img2dataset, `--output_format files`", img2dataset_files),
        ("img2dataset, tars", img2dataset_tars),
        ("DataComp shards and a subset of uids", datacomp),
        ("Hugging Face parquet", hub),
        ("Hugging Face `save_to_disk`", save_to_disk),
        ("Flickr30k", flickr30k),
        ("LLaVA", llava),
        ("A folder of images in any format", mixed),
        ("Polars", polars_frame),
    ],
)
def test_the_commands_of_the_documentation_train(
    title: str, made: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    keys, model = made(), tiny_model(tmp_path / "model").removeprefix("local-dir:")
    typed = commands(title)
    assert 1 <= len(typed) <= 3
    with quiet():
        for program, *words in typed:
            arguments = [word.replace("{model}", model) for word in words]
            if program == "thresher":
                assert main(arguments) == 0, f"{words}\n{capfd.readouterr().err}"
            else:
                assert (program, arguments[:2]) == ("python", ["-m", "thresher.train.open_clip"])
                assert open_clip.main(arguments[2:]) == 0, f"{words}\n{capfd.readouterr().err}"
    expected = set(keys)
    if Path("kept").exists():
        kept, pool = Selection.load("kept"), open_store("pool")
        assert [key for _, part in pool.keys() for key in part] == keys
        expected = {keys[row] for row in np.flatnonzero(kept.mask())}
        assert len(expected) == len(keys) // 2
    assert trained(tmp_path / "run", keys) == expected
