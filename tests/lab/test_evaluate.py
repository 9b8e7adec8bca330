"""Models are evaluated on sets of all kinds, with the numbers of CLIP_benchmark's definitions."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import thresher as th
from thresher.errors import OutputError, PoolError, UsageError
from thresher.evaluation.bootstrap import share_interval
from thresher.io.pictures import open_rgb
from thresher.lab.evaluate import SetSettings, Suite, check_target, encode_texts, evaluate_model, write_results
from thresher.lab.model import spec_of
from thresher.lab.sets import open_set

NAMES = ("red", "green", "blue", "white", "black", "yellow")
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 50, 220), (240, 240, 240), (20, 20, 20), (230, 220, 30))
ROWS = 60


class Mean:
    """Encodes an image as its mean colour and some noise of its pixels, a text as the colour that it names."""

    name, image_dim, text_dim = "mean", 6, 6

    def preprocess(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((4, 4)), np.uint8)

    def tokenize(self, texts: list[str]) -> dict[str, np.ndarray]:
        return {"tokens": np.array([[ord(char) for char in text.ljust(30)[:30]] for text in texts])}

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        near = -np.abs(pixels.mean((1, 2))[:, None] - np.array(COLOURS)).sum(2) / 255
        return (near + 0.2 * np.sin(pixels.sum((1, 2, 3)).astype(float))[:, None] * np.arange(6)).astype(np.float32)

    def encode_texts(self, tokens: dict[str, np.ndarray]) -> np.ndarray:
        rows = []
        for row in tokens["tokens"]:
            text = "".join(map(chr, row))
            own = np.array([name in text for name in NAMES], float)
            rows.append(own + 0.05 * np.cos(np.arange(6) * float(row @ np.arange(1, 31))))
        return np.array(rows, np.float32)

    def weights(self) -> str:
        return "0"


def picture(row: int) -> bytes:
    rng = np.random.default_rng(row)
    pixels = np.clip(np.array(COLOURS[row % 6]) + rng.normal(0, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def captions(row: int) -> list[str]:
    return [f"{NAMES[row % 6]} number {row}", f"a {NAMES[(row * 7) % 6]} thing, {row * 37 % 101}"]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as parquet, as webdatasets of CLIP_benchmark, as folders of classes, and as saved by datasets."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    folder = tmp_path_factory.mktemp("sets")
    cells = [{"bytes": picture(row), "path": None} for row in range(ROWS)]
    names = [NAMES[row % 6] for row in range(ROWS)]
    table = pa.table({"image": cells, "texts": [captions(row) for row in range(ROWS)], "label_name": names})
    pq.write_table(table, folder / "plain.parquet")
    for name, kind in (("classes", "cls"), ("pairs", "txt")):
        for part, rows in (("test", range(ROWS)), ("train", range(100, 140))):
            (folder / name / part).mkdir(parents=True)
            (folder / name / part / "nshards.txt").write_text("2\n")
            for shard in range(2):
                with tarfile.open(folder / name / part / f"{shard}.tar", "w") as tar:
                    for row in rows:
                        if (row % 100 < len(rows) // 2) == (shard == 0):
                            add(tar, f"s{row:04d}.png", picture(row))
                            note = str(row % 6) if kind == "cls" else "\n".join(captions(row))
                            add(tar, f"s{row:04d}.{kind}", note.encode())
    (folder / "classes/classnames.txt").write_text("\n".join(NAMES))
    (folder / "classes/zeroshot_classification_templates.txt").write_text("{c}\na {c} thing")
    (folder / "pairs/dataset_type.txt").write_text("retrieval\n")
    for row in range(ROWS):
        (folder / "folders" / NAMES[row % 6]).mkdir(parents=True, exist_ok=True)
        (folder / "folders" / NAMES[row % 6] / f"{row:03d}.png").write_bytes(picture(row))
    features = Features({"image": Picture(), "label": ClassLabel(names=list(NAMES))})
    hub = Dataset.from_dict({"image": cells, "label": [row % 6 for row in range(ROWS)]}, features=features)
    hub.save_to_disk(str(folder / "saved"))
    hub.to_parquet(folder / "hub.parquet")
    return folder


def metrics(results: list[dict[str, Any]], task: str) -> dict[str, Any]:
    (found,) = (one["metrics"] for one in results if one["task"] == task)
    return found


def evaluated(path: Path, *tasks: str, **more: Any) -> list[dict[str, Any]]:
    settings = SetSettings(data=str(path), tasks=tasks, **more)
    return evaluate_model(Mean(), Suite(name="x", sets=(settings,)))


def slow_classification(templates: list[str]) -> dict[str, float]:
    """The definitions of CLIP_benchmark's zeroshot_classification, written with torch."""
    model = Mean()
    weights = []
    for name in NAMES:
        texts = F.normalize(torch.from_numpy(encode_texts(model, [t.format(c=name) for t in templates])), dim=-1)
        one = texts.mean(0)
        weights.append(one / one.norm())
    pixels = np.stack([model.preprocess(open_rgb(picture(row))) for row in range(ROWS)])
    logits = 100.0 * F.normalize(torch.from_numpy(model.encode_images(pixels)), dim=-1) @ torch.stack(weights, dim=1)
    target = torch.arange(ROWS) % 6
    best = logits.topk(5, 1).indices == target[:, None]
    recalls = [float((logits.argmax(1)[target == c] == c).float().mean()) for c in range(6)]
    return {
        "acc1": float(best[:, 0].float().mean()),
        "acc5": float(best.any(1).float().mean()),
        "mean_per_class_recall": sum(recalls) / 6,
    }


def slow_retrieval(k: int) -> dict[str, float]:
    """The definitions of CLIP_benchmark's zeroshot_retrieval, written with torch."""
    model = Mean()
    pixels = np.stack([model.preprocess(open_rgb(picture(row))) for row in range(ROWS)])
    images = F.normalize(torch.from_numpy(model.encode_images(pixels)), dim=-1)
    texts = F.normalize(
        torch.from_numpy(encode_texts(model, [text for row in range(ROWS) for text in captions(row)])), dim=-1
    )
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.arange(ROWS).repeat_interleave(2)] = True

    def hits(scores: torch.Tensor, positive: torch.Tensor) -> float:
        return float(positive.gather(1, scores.topk(k, dim=1).indices).any(1).float().mean())

    return {
        f"image_retrieval_recall@{k}": hits(scores, positive),
        f"text_retrieval_recall@{k}": hits(scores.T, positive.T),
    }


def test_zero_shot_has_the_numbers_of_clip_benchmark(sets: Path) -> None:
    found = metrics(evaluated(sets / "classes", "zero-shot"), "zero-shot")
    expected = slow_classification(["{c}", "a {c} thing"])
    assert 0.2 < expected["acc1"] < 1
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_retrieval_has_the_numbers_of_clip_benchmark(sets: Path, k: int) -> None:
    found = metrics(evaluated(sets / "pairs", "retrieval"), "retrieval")
    expected = slow_retrieval(k)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_all_kinds_of_sets_have_the_same_numbers(sets: Path) -> None:
    how = {"templates": ("{}", "a {} thing")}
    expected = metrics(evaluated(sets / "classes", "zero-shot"), "zero-shot")
    for name in ("plain.parquet", "folders", "saved", "hub.parquet"):
        found = metrics(evaluated(sets / name, "zero-shot", **how), "zero-shot")
        assert {**found, "main_metric_interval": 0} == pytest.approx({**expected, "main_metric_interval": 0}), name
    pairs = metrics(evaluated(sets / "pairs", "retrieval"), "retrieval")
    assert metrics(evaluated(sets / "plain.parquet", "retrieval"), "retrieval") == pairs


def test_knn_and_probes_are_fitted_on_the_train_split_else_on_half(sets: Path) -> None:
    results = evaluated(sets / "classes", "knn", "probe")
    assert [one["rows"] for one in results[:2]] == [60, 60]
    assert results[1]["metrics"]["lp_acc1"] > 0.5
    halves = evaluated(sets / "plain.parquet", "knn", "probe")
    assert [one["rows"] for one in halves[:2]] == [30, 30]
    assert halves[0]["metrics"].keys() >= {"knn_acc1", "knn_acc5", "knn_mean_per_class_recall", "main_metric"}
    pq.write_table(pq.read_table(sets / "plain.parquet").slice(0, 20), sets / "fit.parquet")
    given = evaluated(sets / "plain.parquet", "knn", train=str(sets / "fit.parquet"))
    assert [one["rows"] for one in given] == [60]


def test_results_are_lines_with_intervals_and_averages(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(
        f'name = "mine"\n[[set]]\ndata = "{sets}/classes"\ntasks = ["zero-shot"]\n[[set]]\ndata = "{sets}/pairs"\n'
    )
    suite = Suite.load(str(tmp_path / "suite.toml"))
    results = evaluate_model(Mean(), suite)
    assert [one["key"] for one in results] == ["classes/zero-shot/cls", "pairs/retrieval", "average"]
    mains = [one["metrics"]["main_metric"] for one in results[:2]]
    assert results[2]["metrics"]["main_metric"] == pytest.approx(sum(mains) / 2)
    assert mains == [results[0]["metrics"]["acc1"], results[1]["metrics"]["mean_recall@1"]]
    low, high = results[0]["metrics"]["main_metric_interval"]
    assert low < mains[0] < high
    json.dumps(results, allow_nan=False)


def test_the_interval_is_that_of_drawing_the_rows_again() -> None:
    rng = np.random.default_rng(0)
    hits = np.arange(200) < 60
    drawn = np.array([hits[rng.integers(0, 200, 200)].mean() for _ in range(10_000)])
    assert share_interval(0.3, 200) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)
    assert share_interval(0.0, 50) == (0.0, 0.0)
    with pytest.raises(UsageError, match="give a share and a level"):
        share_interval(1.5, 10)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classes/test/nshards.txt", "many", "expected the number of tars"),
        ("classes/classnames.txt", "red\ngreen", "has the class 5, but 2 names"),
        ("classes/classnames.txt", None, "has no classnames.txt"),
        ("classes/test/nshards.txt", "3", "2.tar"),
        ("classes/test/nshards.txt", "9" * 5_000, "expected the number of tars"),
    ],
)
def test_a_damaged_webdataset_says_what_is_wrong(
    file: str, content: str | None, message: str, sets: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(sets / "classes", tmp_path / "classes")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(PoolError, match=message):
        open_set(str(tmp_path / "classes"))


@pytest.mark.parametrize(
    ("cells", "message"),
    [([], "its tars have no samples"), (["9" * 5_000], "has the class '9+'; expected a whole number")],
    ids=["no samples", "a class of thousands of digits"],
)
def test_a_webdataset_without_usable_classes_says_so(cells: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("red\ngreen")
    with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
        for row, cell in enumerate(cells):
            add(tar, f"s{row}.png", picture(row))
            add(tar, f"s{row}.cls", cell.encode())
    with pytest.raises(PoolError, match=message):
        open_set(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "features"),
    [
        ([0, 1], {"label": None}),
        ([0, 1], {"label": [{"names": ["a", "b"]}]}),
        (["\u00b2", "\u00b3"], {"label": {"names": ["a"]}}),
    ],
    ids=["no feature", "a list", "digits that are no numbers"],
)
def test_labels_without_known_names_stay_as_they_are(labels: list[Any], features: Any, tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": picture(row), "path": None} for row in range(2)], "label": labels})
    schema = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": schema}), tmp_path / "set.parquet")
    assert open_set(str(tmp_path / "set.parquet")).labels["label"].names == tuple(map(str, labels))


def test_a_row_without_a_group_is_named(tmp_path: Path) -> None:
    from datasets import Dataset

    cells = [{"bytes": picture(row), "path": None} for row in range(3)]
    rows = {"image": cells, "text": ["red", "green", "blue"], "set": ["a", None, "a"]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="row 1 has no 'set'; give every row a group"):
        open_set(str(tmp_path / "saved"), group="set")


def test_images_without_captions_are_counted(tmp_path: Path) -> None:
    """Retrieval needs a caption of every image."""
    from datasets import Dataset

    cells = [{"bytes": picture(row), "path": None} for row in range(3)]
    Dataset.from_dict({"image": cells, "text": ["red", "", "blue"], "label": [0, 1, 1]}).save_to_disk(
        str(tmp_path / "saved")
    )
    with pytest.warns(UserWarning, match="1 of 3 images have no caption; retrieval is not measured"):
        assert open_set(str(tmp_path / "saved")).texts == ()


def test_what_a_set_lacks_is_said(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot do retrieval with mean: the set has no captions"):
        evaluated(sets / "folders", "retrieval")
    with pytest.raises(UsageError, match="cannot do knn with mean: the set has no labels; name a column"):
        evaluated(sets / "pairs", "knn")
    with pytest.raises(UsageError, match="no column 'nothing'"):
        evaluated(sets / "plain.parquet", labels=("nothing",))
    with pytest.raises(UsageError, match="no task 'zero'"):
        SetSettings(data="x", tasks=("zero",))
    with pytest.raises(UsageError, match=r"template 'a photo' has no \{\}"):
        SetSettings(data="x", templates=("a photo",))
    pq.write_table(pa.table({"image": [{"bytes": b"no image", "path": None}], "text": ["a"]}), tmp_path / "bad.parquet")
    with pytest.raises(PoolError, match="bad: row 0 is not a readable image"):
        evaluated(tmp_path / "bad.parquet", "retrieval")
    (tmp_path / "suite.toml").write_text("[[set]]\ndat = 'x'")
    with pytest.raises(UsageError, match="set 1 has no parameter 'dat'"):
        Suite.load(str(tmp_path / "suite.toml"))
    (tmp_path / "suite.toml").write_text("[[set]]\ndata = 'x'\n" * 2**16)
    with pytest.raises(UsageError, match="not a readable suite .it has more than 1,048,576 bytes"):
        Suite.load(str(tmp_path / "suite.toml"))
    (tmp_path / "suite.toml").write_text("name = " + "9" * 5_000)
    with pytest.raises(UsageError, match="not valid TOML .an integer has too many digits"):
        Suite.load(str(tmp_path / "suite.toml"))


def test_a_column_of_captions_that_is_not_there_is_named_by_the_option_of_evaluate(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", picture(0))
        add(tar, "a.txt", b"red")
    with pytest.raises(UsageError, match="^--text title: none of the 1 samples .*'?txt'?"):
        open_set(str(tmp_path), text="title")


def test_models_are_named_by_their_folders(tmp_path: Path) -> None:
    log = tmp_path / "logs/run"
    (log / "checkpoints").mkdir(parents=True)
    (log / "params.txt").write_text("lr: 0.001\nmodel: ViT-B-32\nname: x\n")
    for epoch in (2, 10, 9):
        (log / f"checkpoints/epoch_{epoch}.pt").write_text("")
    assert spec_of(str(log)) == f"open_clip:ViT-B-32/{log}/checkpoints/epoch_10.pt"
    assert spec_of("timm:resnet18") == "timm:resnet18"
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="is neither the folder of a run of thresher train"):
        spec_of(str(tmp_path / "run"))
    (tmp_path / "run/training.json").write_text("{}")
    assert spec_of(str(tmp_path / "run")) == f"run:{tmp_path}/run"
    with pytest.raises(UsageError, match=r"weights alone do not say their architecture; type open_clip:ARCH/"):
        spec_of(str(log / "checkpoints/epoch_9.pt"))


def test_a_trained_model_has_the_numbers_of_its_trainer(tmp_path: Path) -> None:
    from tests.train.conftest import emoji

    table = emoji(120).append_column("label_name", pa.array([["even", "odd"][row % 2] for row in range(120)]))
    pq.write_table(table.slice(0, 60), tmp_path / "train.parquet")
    pq.write_table(table.slice(60), tmp_path / "held.parquet")
    log = th.train_clip(
        tmp_path / "train.parquet", tmp_path / "run", epochs=1, batch_size=20, evals=tmp_path / "held.parquet",
        templates=("{}",), precision="float32", progress=False,
    )  # fmt: skip
    own = log[-1]["eval"]["held"]
    out = tmp_path / "eval_results.jsonl"
    how = {"templates": "{}", "tasks": ["retrieval", "zero-shot"], "progress": False, "out": out}
    results = th.evaluate_model(str(tmp_path / "run"), tmp_path / "held.parquet", **how)
    assert metrics(results, "retrieval")["text_retrieval_recall@1"] == pytest.approx(own["image_to_text_R@1"])
    assert metrics(results, "retrieval")["image_retrieval_recall@5"] == pytest.approx(own["text_to_image_R@5"])
    assert metrics(results, "zero-shot")["acc1"] == pytest.approx(own["zero_shot_label_name_top1"])
    assert [json.loads(line) for line in out.read_text().splitlines()] == results


def test_endings_in_capitals(sets: Path, tmp_path: Path) -> None:
    shutil.copy(sets / "plain.parquet", tmp_path / "PLAIN.PARQUET")
    (tmp_path / "folder").mkdir()
    shutil.copy(sets / "plain.parquet", tmp_path / "folder" / "A.PARQUET")
    expected = open_set(str(sets / "plain.parquet"))
    for path in (tmp_path / "PLAIN.PARQUET", tmp_path / "folder"):
        found = open_set(str(path))
        assert (len(found), found.texts, list(found.labels)) == (len(expected), expected.texts, list(expected.labels))
    (tmp_path / "SUITE.TOML").write_text('name = "x"\n[[set]]\ndata = "NOTHING.PARQUET"\n')
    with pytest.raises(UsageError, match=r"run nowhere|nowhere"):  # it is a suite: the model is loaded first
        th.evaluate_model("run:nowhere", tmp_path / "SUITE.TOML")
    with pytest.raises(UsageError, match="is a suite, which has its own labels"):
        th.evaluate_model("run:nowhere", tmp_path / "SUITE.TOML", labels=["kind"])


def test_results_that_cannot_be_written_are_known_before_the_work(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("notes.txt", "exists and is not a file of results; choose another name"),
        ("list.json", "exists and is not a file of results"),
        ("", "is a folder; give a file"),
        ("file/below.jsonl", "cannot be written"),
    ):
        with pytest.raises(OutputError, match=message):
            th.evaluate_model("run:nowhere", sets / "plain.parquet", out=tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    check_target(tmp_path / "new.jsonl")
    write_results([{"key": "a", "metrics": {}}], tmp_path / "new.jsonl")
    check_target(tmp_path / "new.jsonl")


def few(path: Path, labels: list[str | None], texts: list[str] | None = None) -> str:
    cells = [{"bytes": picture(row), "path": None} for row in range(len(labels))]
    columns = {"image": cells, "label": labels} if texts is None else {"image": cells, "text": texts}
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("labels", "measured"),
    [(["red"], ["zero-shot"]), (["red", "green"], ["zero-shot", "knn"]), (["red"] * 6, ["zero-shot", "knn"])],
)
def test_what_few_rows_and_classes_allow_is_measured_and_the_rest_named(
    tmp_path: Path, labels: list[Any], measured: list[str]
) -> None:
    path = few(tmp_path / "x.parquet", labels)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluated(Path(path))
    assert [one["task"] for one in found if one["task"]] == measured
    left = [str(one.message) for one in said if "is not measured" in str(one.message)]
    assert [text.split(" of label")[0] for text in left] == [
        f"{path}: {t}" for t in ("knn", "probe") if t not in measured
    ]
    with pytest.raises(UsageError, match=f"^{path}: probe of label: .*two (classes|groups) or more"):
        evaluated(Path(path), "probe")


def test_classes_without_training_rows_are_counted(tmp_path: Path) -> None:
    path = few(tmp_path / "x.parquet", [f"class {row}" for row in range(12)])
    with pytest.warns(
        UserWarning, match="knn of label: of the 6 tested, 6 without training rows of their class count as wrong"
    ):
        evaluated(Path(path), "knn")


def test_captions_of_several_images_are_counted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="12 of 12 captions are also those of other images, .*--group"):
        evaluated(Path(few(tmp_path / "x.parquet", ["red"] * 12, ["red thing"] * 12)))
    few(tmp_path / "y.parquet", ["red"] * 12, [f"red {row}" for row in range(12)])
    assert evaluated(tmp_path / "y.parquet")


def test_the_seed_of_the_halves_may_be_negative(sets: Path) -> None:
    one, other = (evaluate_model(Mean(), Suite(name="x", sets=(SetSettings(data=str(sets / "plain.parquet"),
                  tasks=("knn",)),)), seed=seed)[0]["rows"] for seed in (-1, 1))  # fmt: skip
    assert one == other == ROWS // 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "classnames.txt",
            "a\n\nb\n",
            r"classnames.txt: line 2 is blank, so that the classes after it would be others",
        ),
        ("classnames.txt", "a\n", "has the class 1, but 1 name in classnames.txt; classes count from 0"),
        ("zeroshot_classification_templates.txt", "a photo of {c}\na photo\n", r"'a photo' has no \{c\} for the name"),
        ("test/nshards.txt", None, "a webdataset of CLIP_benchmark has the number of its tars in .*test/nshards.txt"),
    ],
)
def test_odd_files_of_a_webdataset_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for row in range(4):
            add(tar, f"{row}.png", picture(row))
            add(tar, f"{row}.cls", str(row % 2).encode())
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("a\nb\n\n")
    assert len(open_set(str(tmp_path))) == 4
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises((PoolError, UsageError), match=message):
        open_set(str(tmp_path))
