"""``thresher reference``: losses of rows under models that have not seen them, or under that of a pool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import thresher as th
from tests.pruning.methods.test_negclip import expected
from tests.train.conftest import ROWS, Data, emoji
from tests.train.test_clip import B, Cut, Cutting
from thresher.cli.main import main
from thresher.dynamic.references import References
from thresher.dynamic.run_folder import Training
from thresher.errors import OutputError, UsageError
from thresher.runtime.progress import Lines
from thresher.runtime.random import generator
from thresher.train.data import Pairs
from thresher.train.models import clip_model


def written(path: Path) -> dict[str, float]:
    table = pq.read_table(path)
    return dict(zip(table["key"].to_pylist(), table["loss"].to_pylist(), strict=True))


def slow_losses(model: torch.nn.Module, pixels_BHWC: np.ndarray, tokens_BT: np.ndarray, side: int) -> np.ndarray:
    """Cross-entropy of the scaled cosines in both directions, one pair at a time."""
    clip = clip_model("tiny")
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (clip.mean, clip.std))
    image = (torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255 - mean) / std
    image = torch.nn.functional.interpolate(image, (side, side), mode="bilinear", antialias=True)
    with torch.inference_mode():
        image_BD, text_BD = model.encode_image(image).double(), model.encode_text(torch.from_numpy(tokens_BT)).double()
        scale = float(model.logit_scale.exp())
    image_BD, text_BD = (rows / rows.norm(dim=1, keepdim=True) for rows in (image_BD, text_BD))
    logits = (scale * image_BD @ text_BD.T).numpy()
    losses = []
    for i in range(len(logits)):
        ways = [np.log(np.exp(line).sum()) - logits[i, i] for line in (logits[i], logits[:, i])]
        losses.append(sum(ways) / 2)
    return np.array(losses)


def test_every_row_is_scored_by_the_model_that_has_not_seen_it(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = th.reference(
        data.parquet, tmp_path / "ref.parquet", epochs=2, batch_size=B, folds=3, precision="float32", progress=Lines()
    )
    said = capsys.readouterr().err
    assert said.count("epoch 2: pruned, 100 of 150 rows, ") == 3
    assert "pruned so far" not in said, "the rows of a fold are held out, and scored"
    losses, keys = written(tmp_path / "ref.parquet"), data.table["key"].to_pylist()
    assert list(losses) == keys
    pixels = np.empty((ROWS, 36, 36, 3), np.uint8)
    clip = clip_model("tiny")
    tokens = clip.tokenize(data.table["text"].to_pylist())
    pairs = open_pixels(data, tmp_path)
    pixels[:] = pairs.pixels(range(ROWS))
    seen = np.zeros(ROWS, int)
    for fold in range(3):
        run = Training.load(tmp_path / "ref-run" / f"fold-{fold}")
        trained = run.ledger().seen_N >= 0
        held = np.flatnonzero(~trained)
        assert len(held) == ROWS / 3
        seen[held] += 1
        order = generator(0, "scored", fold).permutation(held)
        clip.model.load_state_dict(torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"])
        clip.model.eval()
        for batch in np.array_split(order, round(len(held) / B)):
            ours = [losses[keys[row]] for row in batch]
            np.testing.assert_allclose(ours, slow_losses(clip.model, pixels[batch], tokens[batch], 32), rtol=2e-4)
    assert (seen == 1).all()
    logs = [Training.load(tmp_path / "ref-run" / f"fold-{fold}").log() for fold in range(3)]
    assert made["gradient_samples"] == sum(entry["samples"] for log in logs for entry in log) == 3 * 2 * (100 // B * B)
    assert made["scored_forwards"] == made["rows"] == ROWS
    assert made["seconds"] > 0
    assert json.loads((tmp_path / "ref.cost.json").read_text()) == {k: v for k, v in made.items() if k != "out"}


def open_pixels(data: Data, tmp_path: Path) -> Pairs:
    from thresher.runtime.progress import Silent
    from thresher.train.data import open_pairs

    (tmp_path / "opened").mkdir()
    return open_pairs(
        str(data.parquet), tmp_path / "opened", side=36, resize=clip_model("tiny").resize, captions=True,
        progress=Silent(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", pytest.param("tars", marks=pytest.mark.slow)])
def test_the_file_is_what_rho_takes(data: Data, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    where, ref = str(getattr(data, kind)), str(tmp_path / "ref.parquet")
    assert main(["reference", where, "-o", ref, "--epochs", "1", "--batch-size", str(B), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert f"cost: {2 * (75 // B * B)} gradient samples, {ROWS} scored forwards, " in out
    assert f"{ROWS} losses written to {ref}" in out
    command = ["train", "clip", where, "-o", str(tmp_path / "run"), "--policy", "rho", "--reference", ref]
    assert main([*command, "--epochs", "2", "--batch-size", str(B)]) == 0
    assert "% pruned so far, about " in capsys.readouterr().err
    ledger = Training.load(tmp_path / "run").ledger()
    assert ledger.references_N is not None
    np.testing.assert_array_equal(ledger.references_N, list(written(tmp_path / "ref.parquet").values()))


@pytest.mark.parametrize("batches", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_is_cut_off_resumes_to_the_identical_file(data: Data, tmp_path: Path, batches: int) -> None:
    """In the first fold and in the second; then the finished file is accepted."""
    how = {"epochs": 2, "batch_size": B, "checkpoint_minutes": 0.0}
    th.reference(data.parquet, tmp_path / "whole.parquet", **how, progress=False)
    with pytest.raises(Cut):
        th.reference(data.parquet, tmp_path / "cut.parquet", **how, progress=Cutting(batches))
    assert not (tmp_path / "cut.parquet").exists()
    th.reference(data.parquet, tmp_path / "cut.parquet", **how, progress=False)
    assert (tmp_path / "cut.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    th.reference(data.parquet, tmp_path / "cut.parquet", **how, progress=False)


@pytest.mark.slow
def test_wrong_captions_have_a_higher_reference_loss(tmp_path: Path) -> None:
    """600 rows of which 120 have the caption of another."""
    table, swapped = emoji(600), np.arange(0, 600, 5)
    texts = np.array(table["text"].to_pylist(), object)
    texts[swapped] = np.roll(texts[swapped], 1)
    column = table.schema.get_field_index("text")
    pq.write_table(table.set_column(column, "text", [texts.tolist()]), tmp_path / "pairs.parquet")
    th.reference(tmp_path / "pairs.parquet", tmp_path / "ref.parquet", epochs=6, batch_size=64, progress=False)
    losses = np.array(list(written(tmp_path / "ref.parquet").values()))
    right = np.setdiff1d(np.arange(600), swapped)
    assert np.median(losses[swapped]) > np.median(losses[right])


def test_the_embeddings_of_a_pool_give_their_losses(
    pool, rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, text = rows(203, seed=1), rows(203, spread=2.0, seed=2)
    store = pool(image, text, {"uid": [f"k{i}" for i in range(203)]})
    where, out = store.layout.location, tmp_path / "ref.parquet"
    command = ["reference", "--from", where, "-o", str(out), "--batch-size", "64", "--seed", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "help from the model that made them" in printed
    assert "cost: 0 gradient samples, 0 scored forwards" in printed
    losses = written(out)
    assert list(losses) == [f"k{i}" for i in range(203)]
    np.testing.assert_allclose(list(losses.values()), -expected(image, text, 0.01, 64, 5, seed=3) / 0.01, rtol=1e-4)
    assert len(References.read(str(out))) == 203
    before = out.read_bytes()
    assert th.reference(None, out, pool=store, batch_size=64, seed=3, progress=False)["rows"] == 203
    assert out.read_bytes() == before
    assert main([*command[:-1], "4"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either DATA to train on, or --from POOL"),
        (("DATA", "--from", "POOL"), "give either DATA to train on, or --from POOL"),
        (("--from", "POOL", "--epochs", "4"), "--epochs: cannot be used with --from"),
        (("--from", "POOL", "--cross-fit", "2", "--image", "x"), "--cross-fit, --image: cannot be used with --from"),
        (("DATA", "--cross-fit", "1"), "1 is not in the range x>=2"),
        (("DATA", "--cross-fit", "80"), "150 rows in 80 folds; give fewer folds"),
        (("TWO",), "2 rows in 2 folds; give more rows: a fold needs two"),
        (("DATA", "-o", "ref.csv"), "use a file name that ends in .parquet"),
    ],
)
def test_what_cannot_work_is_refused(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    two = tmp_path.with_suffix(".two.parquet")
    pq.write_table(pq.read_table(data.parquet).slice(0, 2), two)
    places = {
        "DATA": str(data.parquet),
        "POOL": str(data.parquet),
        "ref.csv": str(tmp_path / "ref.csv"),
        "TWO": str(two),
    }
    given = [places.get(word, word) for word in words]
    assert main(["reference", "-o", str(tmp_path / "ref.parquet"), *given]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [], "nothing is left behind"


def test_another_result_is_not_overwritten(data: Data, tmp_path: Path) -> None:
    out = tmp_path / "ref.parquet"
    pq.write_table(data.table.select(["key"]), out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        th.reference(data.parquet, out, progress=False)
    with pytest.raises(UsageError, match="is trained on all rows"):
        th.reference(data.parquet, tmp_path / "b.parquet", policy="scan", progress=False)
    assert out.read_bytes() == before


def test_keys_must_be_unique(data: Data, pool, rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, out = [f"k{row // 2}" for row in range(ROWS)], str(tmp_path / "ref.parquet")
    pq.write_table(data.table.drop_columns("key").append_column("key", [keys]), tmp_path / "pairs.parquet")
    assert main(["reference", str(tmp_path / "pairs.parquet"), "-o", out]) == 2
    assert "2 rows have the key 'k0'; name a column of unique keys with --key" in capsys.readouterr().err
    store = pool(rows(ROWS, seed=1), rows(ROWS, seed=2), {"uid": keys})
    assert main(["reference", "--from", store.layout.location, "-o", out]) == 2
    assert "the key also belongs to another row" in capsys.readouterr().err.replace("an earlier", "another")
    assert main(["reference", "--from", store.layout.location, "-o", out, "--key", "row"]) == 0
    assert list(written(tmp_path / "ref.parquet")) == [str(row) for row in range(ROWS)]
