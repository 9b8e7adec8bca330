"""From raw pictures to shards that open_clip's own loader reads: one command each, for every kind of data."""

from __future__ import annotations

import csv
import functools
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.embed.raw import write_tar
from thresher import Selection, open_store
from thresher.cli.main import main
from thresher.data import Sample, open_data
from thresher.embed import pipeline

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


def loaded(shards: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every sample as open_clip's trainer gets it, with its own pipeline, not resampled."""
    from open_clip import get_tokenizer
    from open_clip_train.data import get_wds_dataset

    from thresher.train.open_clip import insert_stage, stages_of

    sizes = json.loads((shards / "sizes.json").read_text())
    last = max(sizes).removesuffix(".tar")
    args = Namespace(
        train_data=f"{shards}/{{00000000..{last}}}.tar", val_data=None, train_num_samples=None, val_num_samples=None,
        dataset_resampled=False, train_data_upsampling_factors=None, seed=0, workers=1, batch_size=1, world_size=1,
        rank=0,
    )  # fmt: skip

    def pixels(picture: object) -> np.ndarray:
        return np.asarray(picture.convert("RGB").resize((8, 8)))  # type: ignore[attr-defined]

    info = get_wds_dataset(args, pixels, is_train=True, tokenizer=get_tokenizer("ViT-B-32"))
    assert info.dataloader.num_samples == sum(sizes.values())
    insert_stage(stages_of(info.dataloader), iter, ids=False)  # nothing, but for webdataset's marks of where tars end
    return [(np.asarray(image[0]), np.asarray(tokens[0])) for image, tokens in info.dataloader]


@pytest.fixture(scope="module")
def _loaded_once() -> Iterator[None]:
    """The encoder is loaded for the first kind of data and used for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_encoder", functools.cache(pipeline.make_encoder))
        yield


@pytest.mark.usefixtures("_loaded_once")
@pytest.mark.parametrize("made", [webdataset, open_clip_csv, parquet, pictures])
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

    tokenize = get_tokenizer("ViT-B-32")
    found = loaded(Path(shards))
    told = sorted(tuple(tokens.tolist()) for _, tokens in found)
    assert told == sorted(tuple(tokenize([text])[0].tolist()) for text in expected)
