"""``Selection.filter`` and ``to_table``: every kind of dataset, by key and by row, against a slow reference."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import thresher as th
from thresher.pool.memory import from_arrays

N = 60
KEYS = [f"k{i}" for i in range(N)]


@pytest.fixture
def kept(rows: Callable[..., np.ndarray], select: Any) -> th.Selection:
    table = {"key": KEYS, "text": [f"caption {i}" for i in range(N)], "width": list(range(N))}
    store = from_arrays(rows(N), rows(N, seed=3), table=table)
    made: th.Selection = select(store, th.SemDeDup(eps=0.05, clusters=3), th.ClipScore(keep=20))
    return made


@pytest.fixture
def repeated(rows: Callable[..., np.ndarray], select: Any) -> th.Selection:
    store = from_arrays(rows(N), rows(N, seed=3), keys=KEYS)
    made: th.Selection = select(store, th.SoftCapSampling(draws=2 * N, temperature=0.1))
    assert made.repeats is not None
    assert made.repeats.max() > 1
    return made


def frames() -> dict[str, tuple[Callable[[dict[str, list[Any]]], Any], Callable[[Any], list[Any]]]]:
    """Kind -> how to make a dataset of columns, and how to read its column "n" back."""
    import datasets as hf
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    return {
        "pandas": (pd.DataFrame, lambda frame: frame["n"].tolist()),
        "pandas index": (
            lambda c: pd.DataFrame(c).set_index("key") if "key" in c else pd.DataFrame(c),
            lambda frame: frame["n"].tolist(),
        ),
        "polars": (pl.DataFrame, lambda frame: frame["n"].to_list()),
        "lazy": (lambda c: pl.DataFrame(c).lazy(), lambda frame: frame.collect()["n"].to_list()),
        "arrow": (pa.table, lambda table: table.column("n").to_pylist()),
        "batch": (pa.RecordBatch.from_pydict, lambda table: table.column("n").to_pylist()),
        "datasets": (hf.Dataset.from_dict, lambda dataset: dataset["n"][:]),
        "list": (lambda c: [dict(zip(c, row, strict=True)) for row in zip(*c.values(), strict=True)],
                 lambda rows: [row["n"] for row in rows]),
        "tuple": (lambda c: tuple(dict(zip(c, row, strict=True)) for row in zip(*c.values(), strict=True)),
                  lambda rows: [row["n"] for row in rows]),
    }  # fmt: skip


KINDS = ["pandas", "pandas index", "polars", "lazy", "arrow", "batch", "datasets", "list", "tuple"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", ["once", "repeated"])
def test_a_frame_is_filtered_by_key_else_by_row(kind: str, times: str, request: pytest.FixtureRequest) -> None:
    kept = request.getfixturevalue("kept" if times == "once" else "repeated")
    make, read = frames()[kind]
    uses = {KEYS[row]: 1 if kept.repeats is None else int(kept.repeats[row]) for row in kept.rows()}
    order = np.random.default_rng(1).permutation(N)
    mixed = make({"key": [KEYS[i] for i in order] + ["new"], "n": [*order.tolist(), -1]})
    found = kept.filter(mixed)
    assert type(found) is type(mixed)
    assert read(found) == [int(i) for i in order for _ in range(uses.get(KEYS[i], 0))], "by key: order and rows differ"
    plain = make({"n": list(range(N))})
    assert read(kept.filter(plain)) == [i for i in range(N) for _ in range(uses.get(KEYS[i], 0))], "by row"
    named = make({"id": [KEYS[i] for i in order], "n": order.tolist()})
    expected = [int(i) for i in order for _ in range(uses.get(KEYS[i], 0))]
    assert read(kept.filter(named, keys="id")) == expected
    assert read(kept.filter(named, keys=[KEYS[i] for i in order])) == expected
    for wrong in (make({"n": list(range(N - 1))}), make({"n": list(range(N + 1))})):
        with pytest.raises(th.UsageError, match=r"rows for a pool of 60 rows .* keys="):
            kept.filter(wrong)
    with pytest.raises(th.UsageError, match="keys = 'nope': no such column; there are"):
        kept.filter(named, keys="nope")
    with pytest.raises(th.UsageError, match="none of the 3 keys is one of"):
        kept.filter(make({"key": ["x", "y", "z"], "n": [1, 2, 3]}))


def test_arrays_tensors_and_datasets_of_torch_are_filtered_by_row(kept: th.Selection, repeated: th.Selection) -> None:
    import torch

    for selection in (kept, repeated):
        rows = th.select_indices(selection)
        array = np.arange(3 * N).reshape(N, 3)
        np.testing.assert_array_equal(selection.filter(array), array[rows])
        np.testing.assert_array_equal(selection.filter(torch.from_numpy(array)).numpy(), array[rows])
        subset = selection.filter(torch.utils.data.TensorDataset(torch.from_numpy(array)))
        assert isinstance(subset, torch.utils.data.Subset)
        assert [int(row[0][0]) for row in subset] == array[rows][:, 0].tolist()
    with pytest.raises(th.UsageError, match="a dataset of 59 rows"):
        kept.filter(np.zeros(N - 1))

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg, misc]
        def __iter__(self) -> Any:
            yield 1

    with pytest.raises(th.UsageError, match=r"Stream is a stream.*thresher.export.webdataset.keep"):
        kept.filter(Stream())


def test_streams_of_hugging_face_are_filtered_while_they_are_read(kept: th.Selection, repeated: th.Selection) -> None:
    import datasets as hf

    order = np.random.default_rng(1).permutation(N)
    keyed = hf.Dataset.from_dict({"key": [KEYS[i] for i in order], "n": order.tolist()}).to_iterable_dataset()
    mask = kept.mask()
    found = kept.filter(keyed)
    assert isinstance(found, hf.IterableDataset)
    assert [row["n"] for row in found] == [int(i) for i in order if mask[i]]
    plain = hf.Dataset.from_dict({"n": list(range(N))}).to_iterable_dataset()
    assert [row["n"] for row in kept.filter(plain)] == kept.rows().tolist()
    assert [row["n"] for row in pickle.loads(pickle.dumps(kept.filter(plain)))] == kept.rows().tolist()  # noqa: S301
    longer = hf.Dataset.from_dict({"n": list(range(N + 1))}).to_iterable_dataset()
    with pytest.raises(Exception, match="the stream has more rows than the 60 of the pool"):
        list(kept.filter(longer))
    with pytest.raises(th.UsageError, match="repeats rows"):
        repeated.filter(keyed)
    with pytest.raises(th.UsageError, match="give the name of their column"):
        kept.filter(keyed, keys=["a"])
    with pytest.raises(th.UsageError, match=r"splits 'train'; filter one of them"):
        kept.filter(hf.DatasetDict({"train": hf.Dataset.from_dict({"n": [1]})}))


@pytest.mark.parametrize("given", [3, {"a": 1}, "text", None, {1, 2}])
def test_anything_else_is_refused(kept: th.Selection, given: Any) -> None:
    with pytest.raises(th.UsageError, match="cannot filter .*; give a Hugging Face Dataset"):
        kept.filter(given)


def test_the_table_says_what_became_of_every_row(kept: th.Selection, repeated: th.Selection) -> None:
    table = kept.to_table()
    assert table.column_names == [
        "row", "key", "kept", "step", "reason", "semdedup_score", "semdedup_duplicate_of", "clip_score_score",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == list(range(N))
    assert [row["key"] for row in rows] == KEYS
    assert [row["kept"] for row in rows] == kept.mask().tolist()
    for row in rows:
        steps = kept.explain(row["key"])["steps"]
        if row["kept"]:
            assert (row["step"], row["reason"]) == ("", "kept")
        else:
            assert (row["step"], row["reason"]) == (steps[-1]["method"], steps[-1]["reason"])
        seen = {step["method"]: step["score"] for step in steps if "score" in step}
        assert row["semdedup_score"] == pytest.approx(seen.get("semdedup", -1))
        assert row["clip_score_score"] == pytest.approx(seen.get("clip-score", np.nan), nan_ok=True)
    more = kept.to_table(["text", "semdedup_cluster", "kept", "score"])
    assert more.column_names == ["text", "semdedup_cluster", "kept", "score"]
    assert more.column("text").to_pylist() == [f"caption {i}" for i in range(N)]
    assert repeated.to_table(["repeats"]).column(0).to_pylist() == repeated.repeats.tolist()  # type: ignore[union-attr]
    with pytest.raises(th.UsageError, match=r"no column 'scroe'; there are .*Did you mean 'score'"):
        kept.to_table(["scroe"])


def test_the_table_is_a_frame_of_each_library(kept: th.Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    table = kept.to_table()
    assert isinstance(kept.to_arrow(), pa.Table)
    assert isinstance(kept.to_pandas(), pd.DataFrame)
    assert isinstance(kept.to_polars(), pl.DataFrame)
    assert (
        kept.to_polars().to_dicts()[3]["reason"] == kept.to_pandas()["reason"][3] == table.column("reason")[3].as_py()
    )
    assert list(kept.to_pandas(["kept", "width"])) == ["kept", "width"]
    for package, use in (("pandas", kept.to_pandas), ("polars", kept.to_polars)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            th.MissingPackageError, match=f"^to_{package} needs the package {package}; type: pip install"
        ):
            use()


def test_a_second_step_of_a_method_has_its_own_columns(rows: Callable[..., np.ndarray], select: Any) -> None:
    kept = select(from_arrays(rows(N), rows(N, seed=3)), th.ClipScore(keep=40), th.ClipScore(keep=20))
    table = kept.to_table()
    assert table.column_names[-2:] == ["clip_score_score", "clip_score_2_score"]
    assert np.isnan(table.column("clip_score_2_score").to_numpy()).sum() == N - 40
    assert table.column("key").to_pylist() == [str(i) for i in range(N)]
