"""Reference losses by key: files, look-ups, and both loops that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.rho import Rho
from thresher.dynamic.references import References, check_found
from thresher.dynamic.sampler import PruningSampler
from thresher.dynamic.stream import ID, StreamPruner, ids_of, prune_stream
from thresher.errors import PoolError, UsageError
from thresher.ops import key_hash

KEYS = [f"k{i}" for i in range(50)]


def written(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("key", ["uid", "key", "id", "__key__", "image_path"])
@pytest.mark.parametrize(
    ("loss", "kind"), [("loss", pa.float64()), ("reference_loss", pa.float16()), ("loss", pa.int8())]
)
def test_a_file_gives_every_key_its_loss(tmp_path: Path, key: str, loss: str, kind: Any) -> None:
    values = [float(i % 7) for i in range(50)]
    path = written(tmp_path / "ref.parquet", **{key: KEYS, loss: pa.array(values).cast(kind)})
    references = References.read(path)
    assert len(references) == 50
    assert not references.uids
    assert references.example == "k0"
    asked = ["k7", "unknown", "k7", "k49", ""]
    np.testing.assert_array_equal(references.of_keys(asked), np.array([0, np.nan, 0, 0, np.nan], np.float32))
    ids = ids_of(KEYS)
    np.testing.assert_array_equal(references.of_ids(ids[:, 0], ids[:, 1]), np.array(values, np.float32))
    assert references.of_keys([]).shape == (0,)


def test_what_is_no_finite_number_is_unknown(tmp_path: Path) -> None:
    path = written(tmp_path / "ref.parquet", key=list("abcd"), loss=[1.5, None, float("nan"), float("inf")])
    np.testing.assert_array_equal(References.read(path).of_keys("abcd"), np.array([1.5, *[np.nan] * 3], np.float32))


def test_keys_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def records(keys: Any) -> np.ndarray:
        found = key_hash.records_of(keys)
        return np.array([(1, check) for _, check in found.tolist()], key_hash.RECORD)

    monkeypatch.setattr("thresher.dynamic.references.records_of", records)
    references = References.of([(KEYS, np.arange(50.0))])
    np.testing.assert_array_equal(references.of_keys(["k3", "k40", "else", "k0"]), np.float32([3, 40, np.nan, 0]))


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"name": ["a"], "loss": [1.0]}, PoolError, "no column of keys .uid, key, .*; it has name, loss"),
        ({"key": ["a"], "score": [1.0]}, PoolError, "no column of losses .loss or reference_loss.; it has key, score"),
        ({"key": ["a"], "loss": ["high"]}, PoolError, "its column loss is string; give numbers"),
        ({"key": ["a", None], "loss": [1.0, 2.0]}, PoolError, "1 rows have no key; every row needs one"),
        ({"key": ["a", "b"], "loss": [float("nan"), 1e308]}, UsageError, "none of its reference losses is a finite"),
        ({"key": ["a", "b", "a"], "loss": [1.0, 2.0, 3.0]}, UsageError, "1 keys have two reference losses"),
        ({"key": pa.array([], pa.string()), "loss": pa.array([], pa.float32())}, UsageError, "no reference losses"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, columns: dict[str, Any], error: type[Exception], message: str) -> None:
    path = written(tmp_path / "ref.parquet", **columns)
    with pytest.raises(error, match=rf"ref\.parquet: .*{message}"):
        References.read(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ref.parquet").write_text("key,loss\n")
    for name in ("ref.parquet", "missing.parquet"):
        with pytest.raises((PoolError, UsageError), match=name):
            References.read(str(tmp_path / name))


def test_references_of_other_data_are_refused_with_an_example_of_both_sides() -> None:
    with pytest.raises(
        UsageError, match="r.parquet: none of its keys is in DATA: the file has keys such as 'a', DATA such as 'k0'"
    ):
        check_found(np.full(2, np.nan, np.float32), "r.parquet", "DATA", KEYS, "a")
    check_found(np.array([np.nan, 1], np.float32), "r.parquet", "DATA", KEYS, "a")


# The sampler


def sampler(references: Any, **more: Any) -> PruningSampler:
    return PruningSampler(
        50, policy=Rho(keep=0.5, softness=0), batch_size=10, epochs=4, references_N=references, **more
    )


def train(loop: PruningSampler, until: int) -> None:
    while loop.epoch < until:
        for rows in loop:
            loop.reduce(rows, torch.tensor(rows).float()[:, None] % 7)


def test_a_sampler_prunes_by_its_references_and_resumes_with_them() -> None:
    references = np.arange(50) % 5
    one = sampler(references)
    train(one, 1)
    assert one.plan is not None
    gain = np.arange(50) % 7 - references
    assert min(gain[one.plan.rows()]) >= max(gain[np.flatnonzero(~one.plan.kept_N)])
    again = sampler(references)
    again.load_state_dict(one.state_dict())
    train(one, 4)
    train(again, 4)
    assert [entry["samples"] for entry in one.log()] == [entry["samples"] for entry in again.log()]
    np.testing.assert_array_equal(one.ledger.losses_NR, again.ledger.losses_NR)
    with pytest.raises(UsageError, match="the state has other reference losses"):
        sampler(references + 1).load_state_dict(one.state_dict())


def test_a_sampler_says_what_its_policy_needs() -> None:
    with pytest.raises(UsageError, match="policy rho needs references_N"):
        sampler(None)
    with pytest.raises(UsageError, match="policy full has no use for references_N"):
        PruningSampler(5, policy=Full(), batch_size=2, epochs=1, references_N=np.zeros(5))


# The stream


def pruner(references: References | None, policy: Any = None) -> StreamPruner:
    policy = policy or Rho(keep=0.5, softness=0)
    return StreamPruner(policy=policy, batch_size=10, epochs=4, samples=50, references=references)


def passed(loop: StreamPruner, keys: list[str]) -> list[str]:
    """Train for an epoch; the keys that came through."""
    samples = list(prune_stream(loop)({"__key__": key, "uid": key} for key in keys))
    for lo in range(0, len(samples), 10):
        part = samples[lo : lo + 10]
        if len(part) == 10 and loop.plan is not None:
            losses = torch.tensor([[float(KEYS.index(sample["__key__"]) % 7)] for sample in part])
            loop.reduce(np.stack([sample[ID] for sample in part]), losses)
    return [sample["__key__"] for sample in samples]


def test_a_stream_prunes_by_its_references_and_resumes_with_them() -> None:
    references = References.of([(KEYS[:40], np.arange(40.0) % 5)])  # ten are unknown: they are kept
    one = pruner(references)
    assert passed(one, KEYS) == KEYS
    assert one.log()[0]["without_reference"] == 10
    again = pruner(references)
    again.load_state_dict(one.state_dict())
    through = passed(one, KEYS)
    assert len(through) == 25
    assert set(KEYS[40:]) <= set(through)
    gain = {key: i % 7 - i % 5 for i, key in enumerate(KEYS[:40])}
    assert min(gain[key] for key in through[:-10]) >= max(gain[key] for key in gain.keys() - set(through))
    assert passed(again, KEYS) == through
    with pytest.raises(UsageError, match="the state has other reference losses"):
        pruner(References.of([(KEYS, np.ones(50))])).load_state_dict(one.state_dict())


def test_samples_are_looked_up_by_uid_where_the_references_have_uids() -> None:
    uids = [f"{i:032x}" for i in range(50)]
    assert prune_stream(pruner(References.of([(uids, np.ones(50))]))).key == "uid"
    assert prune_stream(pruner(References.of([(KEYS, np.ones(50))]))).key == "__key__"


def test_a_stream_says_what_its_policy_needs() -> None:
    with pytest.raises(UsageError, match="policy rho needs references; give"):
        pruner(None)
    with pytest.raises(UsageError, match="policy full has no use for references"):
        pruner(References.of([(KEYS, np.ones(50))]), Full())
    other = pruner(References.of([(["x"], [1.0])]))
    with pytest.raises(
        UsageError, match="none of 50 rows has a reference loss; give the reference losses of these data"
    ):
        passed(other, KEYS)
