"""What the page asks for is what the selections say: sets, cuts, saving, explanations, images, captions, runs."""

from __future__ import annotations

import io
import json
import logging
import math
import shlex
import sys
import threading
import time
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import thresher as th
from tests.runs import make_run
from tests.viewer.shown import HOSTILE, ROWS, TOKEN, Shown, make_shown, picture, write_pool
from thresher import OutputError, PoolError, Selection, UsageError
from thresher.cli.main import main
from thresher.report.compare import compare
from thresher.report.explain import explain, history
from thresher.viewer import answers
from thresher.viewer.pictures import Pictures
from thresher.viewer.server import Viewer
from thresher.viewer.sets import inside
from thresher.viewer.subject import opened


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with make_shown(tmp_path_factory.mktemp("viewer")) as made:
        yield made


@pytest.fixture(scope="module")
def chain(shown: Shown) -> Selection:
    return Selection.load(shown.folder / "chain")


def captions() -> list[str]:
    return [HOSTILE.get(i, "") for i in range(7)]


# --- the subject and sets -------------------------------------------------------------------------


def test_the_subject_lists_what_there_is(shown: Shown, chain: Selection) -> None:
    subject = shown.get("subject")
    assert [one["name"] for one in subject["selections"]] == ["chain", "random", "clip"]
    assert subject["selections"][0]["kept"] == len(chain)
    assert [step["rows_out"] for step in subject["selections"][0]["steps"]] == [step.rows_out for step in chain.steps]
    assert {(one["name"], one["kind"]) for one in subject["columns"]} == {
        ("width", "number"), ("site", "text"), ("safe", "flag"),
    }  # fmt: skip
    assert [slider["name"] for slider in subject["selections"][0]["sliders"]] == ["keep", "temperature"]
    assert {slider["name"] for slider in subject["selections"][2]["sliders"]} == {"keep", "threshold"}
    assert subject["sources"][0] == {
        "name": subject["sources"][0]["name"], "rows": ROWS, "pictures": True, "captions": True, "keys": True,
        "vectors": True,
    }  # fmt: skip


def test_sets_are_those_of_the_selection(shown: Shown, chain: Selection) -> None:
    by = np.asarray(chain.dropped_by)
    assert shown.ids() == list(range(ROWS))
    assert shown.ids(selection=0, kept=True) == chain.rows().tolist()
    assert shown.ids(selection=0, kept=False) == np.flatnonzero(by >= 0).tolist()
    for step in range(3):
        assert shown.ids(selection=0, step=step) == np.flatnonzero(by == step).tolist()
    labels = np.asarray(chain.steps[0].rows["cluster"])
    assert shown.ids(selection=0, cluster=2) == np.flatnonzero(labels == 2).tolist()
    last = np.full(ROWS, -1)
    last[chain.given(2)] = chain.steps[2].rows["cluster"]
    assert shown.ids(selection=0, cluster=1, clustered=2) == np.flatnonzero(last == 1).tolist()
    masks = [Selection.load(shown.folder / name).mask() for name in ("chain", "random", "clip")]
    assert shown.ids(alone=1) == np.flatnonzero(masks[1] & ~masks[0] & ~masks[2]).tolist()
    assert shown.ids(selection=1, alone=0, kept=False) == np.flatnonzero(masks[0] & ~masks[1] & ~masks[2]).tolist()


def test_sets_by_score_are_sorted_and_cut(shown: Shown, chain: Selection) -> None:
    scores = np.full(ROWS, np.nan)
    scores[chain.given(1)] = chain.steps[1].rows["score"]
    low, high = (float(x) for x in np.nanpercentile(scores, [20, 60]))
    got = shown.rows(selection=0, scored=1, low=low, high=high, order="high")
    expected = [i for i in np.argsort(-scores, kind="stable") if low <= scores[i] <= high]
    assert [row["row"] for row in got] == expected
    assert [row["score"] for row in got] == pytest.approx([scores[i] for i in expected])
    assert shown.ids(selection=0, scored=1, low=low, high=high, order="low")[0] == expected[-1]
    assert shown.ids(selection=0, scored=1, order="low")[-1] in np.flatnonzero(np.isnan(scores))


def test_the_mixed_order_is_the_same_in_every_set(shown: Shown) -> None:
    mixed = shown.ids(order="mixed")
    assert sorted(mixed) == list(range(ROWS))
    assert mixed != list(range(ROWS))
    kept = set(shown.ids(selection=0, kept=True))
    assert shown.ids(selection=0, kept=True, order="mixed") == [row for row in mixed if row in kept]


def test_search_finds_captions_keys_and_rows(shown: Shown) -> None:
    assert shown.ids(search="RED SHOE") == [row["row"] for row in shown.rows() if "red shoe" in row["caption"]]
    assert shown.ids(search="k0017") == [17]
    assert shown.ids(search="k001") == []  # a key is searched as a whole
    assert shown.ids(search="row:17") == [17]
    assert shown.ids(search="row:99999999999") == []
    assert shown.ids(search="<script>") == [0]
    assert shown.ids(search=".*") == []
    assert shown.ids(search="%") == []
    assert shown.ids(search="\u05d0\u05d1") == [2]
    kept = set(shown.ids(selection=0, kept=True))
    assert set(shown.ids(selection=0, kept=True, search="blue")) == set(shown.ids(search="blue")) & kept


BIG = 2**53


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        (pa.array([16_777_216 + i for i in range(ROWS)], pa.int64()), 16_777_217),
        (pa.array([None if i == 5 else 16_777_216 + i for i in range(ROWS)], pa.int64()), 16_777_217),
        (pa.array([BIG + i for i in range(ROWS)], pa.int64()), BIG + 1),
        (pa.array([None if i == 5 else BIG + i for i in range(ROWS)], pa.int64()), BIG + 1),
        (pa.array([2**63 + i for i in range(ROWS)], pa.uint64()), 2**63 + 1),
        (pa.array([1 + i * 1e-12 for i in range(ROWS)], pa.float64()), 1 + 1e-12),
        (pa.array([i * 1e300 for i in range(ROWS)], pa.float64()), 1e300),
        (pa.array([(i - 120) * 1.4e306 for i in range(ROWS)], pa.float64()), -119 * 1.4e306),
        (pa.array([i / 4 for i in range(ROWS)], pa.float32()), 0.25),
    ],
    ids=[
        "int32",
        "int32 and a null",
        "int64",
        "int64 and a null",
        "uint64",
        "float64",
        "huge",
        "both signs",
        "float32",
    ],
)
def test_numbers_of_a_column_are_compared_exactly(tmp_path: Path, values: pa.Array, asked: Any) -> None:
    pool = write_pool(tmp_path / "pool")
    path = pool / "metadata" / "metadata_0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("number", values), path)
    with make_shown(tmp_path, [str(pool)]) as shown:
        assert shown.ids(column="number", value=str(asked)) == [1]
        if asked < BIG:
            assert shown.ids(column="number", least=asked, most=asked) == [1]
        assert shown.ids(column="number", least=-1.7e308, most=1.7e308) == [
            i for i in range(ROWS) if values[i].is_valid
        ]
        assert shown.ids(column="number", least=1.7e308) == []
        head, arrays = shown.arrays("colours", by="column:number")
        assert arrays["codes"].max() in ((255,) if values.null_count else (253, 0))
        for odd in ("nan", "inf", "x", "9" * 400):
            assert "give a number" in shown.refused("rows", set={"column": "number", "value": odd})


def test_too_little_memory_is_an_answer(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("Unable to allocate 3 GiB")):

        def none(*given: Any, error: Exception = error) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("thresher.viewer.maps.points_of", none)
            patch.setattr("thresher.viewer.app.save", none)
            answer = shown.client.get(shown.address("map"))
            assert (answer.status_code, answer.json()["error"][:13]) == (503, "out of memory")
            how = {"headers": {"origin": "http://testhost", "content-type": "application/json"}, "content": "{}"}
            assert shown.client.post(f"/{TOKEN}/save", **how).status_code == 503
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "get", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert shown.client.get(f"/{TOKEN}/picture/0/0/192").status_code == 404


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ([-1.7e308, 1.7e308], [0, 253]),
        ([sys.float_info.max] * 2, [0, 0]),
        ([0, 5e-324], [0, 0]),
        ([-math.inf, 1, 2, math.inf, math.nan], [0, 0, 253, 253, 255]),
        ([math.nan], [255]),
    ],
)
def test_a_scale_of_extreme_numbers_is_finite(values: list[float], codes: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale, found = answers._scale(np.array(values), "number")
    assert math.isfinite(scale["low"])
    assert math.isfinite(scale["high"])
    assert found.tolist() == codes


def test_sets_by_column(shown: Shown) -> None:
    assert shown.ids(column="width", least=110, most=120) == list(range(10, 21))
    assert shown.ids(column="site", value="b.example") == list(range(1, ROWS, 3))
    assert shown.ids(column="site", value="<b>c</b>") == list(range(2, ROWS, 3))
    assert shown.ids(column="safe", value="0") == list(range(0, ROWS, 4))


def test_a_lasso_takes_the_points_inside(shown: Shown) -> None:
    _, arrays = shown.arrays("map")
    places = arrays["points"].reshape(-1, 2).astype(float) / 32767 - 1
    assert np.abs(places).max() <= 1
    lasso = [[-0.5, -0.4], [0.6, -0.5], [0.5, 0.6], [-0.6, 0.5]]
    at = np.flatnonzero(inside(places.astype(np.float32), [tuple(c) for c in lasso]))
    got = shown.ids(polygon=lasso)
    assert 0 < len(got) < ROWS
    assert len(set(got) ^ set(at.tolist())) <= 1  # rounding at an edge
    again, repeated = shown.arrays("map")
    assert np.array_equal(repeated["points"], arrays["points"])
    assert again["note"]


def test_points_inside_a_polygon_against_a_slow_reference() -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(-1, 1, (400, 2)).astype(np.float32)
    corners = [(0.0, -0.9), (0.7, 0.2), (0.1, 0.1), (-0.2, 0.8), (-0.8, -0.1)]

    def slow(x: float, y: float) -> bool:
        turns = 0.0
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            a, b = np.arctan2(y1 - y, x1 - x), np.arctan2(y2 - y, x2 - x)
            turns += (b - a + np.pi) % (2 * np.pi) - np.pi
        return abs(turns) > np.pi

    assert inside(points, corners).tolist() == [slow(float(x), float(y)) for x, y in points]
    assert not inside(np.array([[np.nan, np.nan]], np.float32), corners).any()


@pytest.mark.parametrize("wanted", [{"selection": 0}, {"alone": 0}, {"column": "site", "value": "a.example"}])
def test_what_is_known_of_the_first_pool_does_not_choose_rows_of_another(shown: Shown, wanted: Any) -> None:
    from thresher.viewer.sets import Wanted, rows_of
    from thresher.viewer.subject import Kept

    two = replace(shown.subject, stores=(shown.subject.store(), shown.subject.store()), kept=Kept(4))
    with pytest.raises(UsageError, match="are those of the first pool"):
        rows_of(two, Wanted(**wanted), 1)


def test_members_are_the_bits_of_a_set(shown: Shown) -> None:
    head, arrays = shown.arrays("members", set={"selection": 0, "kept": True})
    bits = np.unpackbits(arrays["bits"], bitorder="little")[:ROWS]
    assert np.flatnonzero(bits).tolist() == shown.ids(selection=0, kept=True)
    assert head["total"] == bits.sum()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"selection": 9}, "selection 9: there are 3"),
        ({"kept": True}, "need a selection"),
        ({"kept": "yes", "selection": 0}, "kept: give true or false"),
        ({"nothing": 1}, "unknown: 'nothing'"),
        ({"cluster": 1}, "no clusters"),
        ({"cluster": 1, "selection": 1}, "no clusters"),
        ({"selection": 0, "clustered": 1, "cluster": 0}, "step 2 has no clusters"),
        ({"selection": 0, "scored": 7, "low": 0}, "step 8 has no scores"),
        ({"selection": 1, "order": "sideways"}, "order = 'sideways'"),
        ({"column": "caption"}, "no such column"),
        ({"column": "image"}, "no such column"),
        ({"column": "site", "value": "c"}, "not one of its most frequent"),
        ({"column": "width", "value": "wide"}, "give a number"),
        ({"polygon": [[0, 0], [1, 1]]}, "3 to 400 corners"),
        ({"polygon": [[0, 0], [1, 1], [1, "x"]]}, "give a number"),
        ({"polygon": [[0, 0], [1, 1], [1]]}, "two numbers"),
        ({"low": "1", "selection": 0}, "give a number"),
        ({"search": "x" * 401}, "at most 400"),
        ({"search": "\ud83d"}, "search: has half of a character"),
        ({"alone": 3}, "selection 3: there are 3"),
        ({"selection": -1}, "whole number"),
        ({"selection": 1.5}, "whole number"),
        ({"selection": 0, "cut": ["keep"]}, "cut: give"),
        ({"selection": 0, "cut": ["__class__.x", "1"]}, "'__class__.x' is not one of keep"),
        ({"selection": 0, "cut": ["temperature", "hot"]}, "temperature = 'hot': give a number"),
        ({"selection": 0, "cut": ["temperature", "nan"]}, "temperature"),
        ({"selection": 0, "cut": ["keep", "1000%"]}, "cannot keep 1000%"),
        ({"selection": 0, "cut": ["eps", "1"]}, "eps"),
        ({"selection": 0, "cut": ["clusters", "7"]}, "'clusters' is not one of keep"),
        ({"selection": 0, "cut": ["reference", "/tmp"]}, "'reference' is not one of keep"),
        ([1], "a set of rows is an object"),
        (float("inf"), "a set of rows is an object"),
    ],
)
def test_bad_sets_get_one_line(shown: Shown, wanted: Any, message: str) -> None:
    said = shown.refused("rows", set=json.dumps(wanted))
    assert message in said
    assert "\n" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"low": NaN}', '{"low": 1e999}', "1" * 5_000, '{"low": true}'])
def test_sets_that_are_not_json(shown: Shown, text: str) -> None:
    answer = shown.client.get(f"/{TOKEN}/api/rows", params={"set": text[:20_000]})
    assert answer.status_code == 400
    assert len(answer.json()["error"]) < 700


@pytest.mark.parametrize(
    "address",
    ["rows?start=-1", "rows?count=x", "rows?source=3", "explanation?row=9999", "explanation?row=1&selection=8",
     "caption?row=240", "listed?rows=1,x", "listed?rows=999", "histogram?selection=0&step=9", "colours?by=caption",
     "colours?by=score", "colours?by=column:nothing", "cut?selection=7", "cut?selection=0&cut=7", "run?run=0",
     "cut?selection=0&cut={", "clusters?selection=0&clustered=1", "rows?start=1e3", "rows?start=99999999999999999999"],
)  # fmt: skip
def test_bad_requests_get_one_line(shown: Shown, address: str) -> None:
    answer = shown.client.get(f"/{TOKEN}/api/{address}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]


def test_pages_of_rows_join_to_the_set(shown: Shown) -> None:
    whole = shown.ids(selection=0, kept=False)
    pages = [shown.get("rows", set={"selection": 0, "kept": False}, start=at, count=50) for at in range(0, ROWS, 50)]
    assert [row["row"] for page in pages for row in page["rows"]] == whole
    assert shown.get("rows", set={}, start=10**6)["rows"] == []
    assert len(shown.get("rows", set={}, count=10**6)["rows"]) == 240


# --- rows -----------------------------------------------------------------------------------------


def test_dropped_rows_come_with_reasons_and_twins(shown: Shown, chain: Selection) -> None:
    rows = shown.rows(selection=0, step=0)
    assert rows
    for row in rows:
        at = int(np.searchsorted(chain.given(0), row["row"]))
        assert row["reason"] == chain.steps[0].why(at)
        assert row["twin"]["row"] == chain.steps[0].rows["duplicate_of"][at]
        assert row["twin"]["kept"] == bool(chain.dropped_by[row["twin"]["row"]] == -1)
        assert row["twin"]["key"] == f"k{row['twin']['row']:04d}"
    kept = shown.rows(selection=0, kept=True)
    assert not any("reason" in row or "twin" in row for row in kept)


def test_an_explanation_is_that_of_the_command(shown: Shown, chain: Selection) -> None:
    store = shown.subject.store()
    for row in (0, 5, 100, 130, 239):
        said = shown.get("explanation", row=row, selection=0)
        chain_of_row = said.pop("chain")
        expected = json.loads(json.dumps(explain(chain, store, f"row:{row}")))
        assert [step["reason"] for step in said["steps"]] == [step["reason"] for step in expected["steps"]]
        assert [step["verdict"] for step in said["steps"]] == [step["verdict"] for step in expected["steps"]]
        assert said["kept"] == expected["kept"]
        if chain_of_row:
            assert expected["steps"][-1]["duplicate"]["row"] == chain_of_row[0]["row"]
            assert chain_of_row[-1]["kept"] or chain.dropped_by[chain_of_row[-1]["row"]] > 0


def test_hostile_captions_are_plain_text(shown: Shown) -> None:
    rows = shown.rows()[:7]
    for row, text in zip(rows, captions(), strict=True):
        assert "\x1b" not in row["caption"]
        assert "\u202e" not in row["caption"]
        assert "\x00" not in row["caption"]
        assert len(row["caption"]) <= 320
        assert row["caption"][:10] == " ".join(text.replace("\u202e", " ").replace("\u202c", " ").split())[:10]
    assert shown.get("caption", row=3)["caption"] == HOSTILE[3]
    assert shown.get("caption", row=0)["caption"] == HOSTILE[0]
    assert shown.get("caption", row=4)["caption"] == ""
    for route in ("rows", "explanation?row=0"):
        answer = shown.client.get(f"/{TOKEN}/api/{route}")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_pictures_are_small_copies(shown: Shown) -> None:
    shown.rows(selection=0, kept=False)
    for row in (0, 10, 31):
        answer = shown.client.get(f"/{TOKEN}/picture/0/{row}/192")
        assert answer.headers["content-type"] == "image/webp"
        with Image.open(io.BytesIO(answer.content)) as got, Image.open(io.BytesIO(picture(row))) as there:
            assert got.size == there.size
            assert np.allclose(np.asarray(got.convert("RGB"))[15, 20], np.asarray(there)[15, 20], atol=8)
    for row in (8, 17):  # without an image, and a broken one
        assert shown.client.get(f"/{TOKEN}/picture/0/{row}/192").status_code == 404


def test_images_of_a_page_are_read_in_one_pass(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    import thresher.viewer.pictures as module

    passes: list[list[int]] = []
    read = module.read_rows

    def counted(store: Any, rows: Any, **how: Any) -> Any:
        passes.append(list(rows))
        return read(store, rows, **how)

    monkeypatch.setattr(module, "read_rows", counted)
    pictures = Pictures([shown.subject.store()])
    pictures.expect(0, list(range(40, 60)))
    assert all(pictures.get(0, row, 192) for row in range(40, 44))
    assert passes == [list(range(40, 60))]


def test_memory_of_pictures_is_bounded(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    import thresher.viewer.pictures as module

    monkeypatch.setattr(module, "_READ", 3_000)
    monkeypatch.setattr(module, "_MADE", 1_000)
    pictures = Pictures([shown.subject.store()])
    for row in range(ROWS):
        pictures.get(0, row, 192)
    assert pictures._read._size <= 3_000
    assert pictures._made._size <= 1_000
    assert pictures._made._size == sum(map(len, pictures._made._held.values()))


# --- cuts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "name", "changes"),
    [(0, "chain", {"keep": "20%"}), (0, "chain", {"temperature": "2"}), (1, "random", {"keep": "11"}),
     (2, "clip", {"threshold": "0.7"}), (2, "clip", {"keep": "33.3%"})],
)  # fmt: skip
def test_a_cut_is_that_of_recut(shown: Shown, number: int, name: str, changes: dict[str, str]) -> None:
    cut = next(iter(changes.items()))
    given: Any = {key: value if key == "keep" else float(value) for key, value in changes.items()}
    expected = Selection.load(shown.folder / name).recut(cache=shown.folder / "cache", **given)
    head, arrays = shown.arrays("cut", selection=number, cut=list(cut))
    assert arrays["steps"].tolist() == expected.dropped_by.tolist()
    assert head["kept"] == len(expected)
    assert [step["rows_out"] for step in head["steps"]] == [step.rows_out for step in expected.steps]
    assert shown.ids(selection=number, cut=list(cut), kept=True) == expected.rows().tolist()
    before = Selection.load(shown.folder / name).mask()
    moved = {"in": expected.mask() & ~before, "out": before & ~expected.mask()}
    for side, mask in moved.items():
        assert shown.ids(selection=number, cut=list(cut), moved=side) == np.flatnonzero(mask).tolist()


def test_the_histogram_follows_the_cut(shown: Shown) -> None:
    made = shown.get("histogram", selection=2, step=0, cut=["threshold", "0.6"])
    assert made["cut"] == pytest.approx(0.6)
    kept = len(Selection.load(shown.folder / "clip").recut(threshold=0.6, cache=shown.folder / "cache"))
    assert sum(made["kept"]) == kept
    assert sum(made["kept"]) + sum(made["dropped"]) == ROWS


@pytest.mark.parametrize(
    ("number", "cut"),
    [(0, ["keep", "25%"]), (0, ["temperature", "0.5"]), (1, ["keep", "10%"]), (2, ["threshold", "0.65"]), (0, None)],
)
def test_saving_writes_what_the_shown_command_writes(shown: Shown, tmp_path: Path, number: int, cut: Any) -> None:
    name = f"saved-{number}-{'-'.join(cut or ['as-is']).replace('%', '')}"
    head = shown.get("command", selection=number, cut=cut, name=name)
    answer = shown.client.post(
        f"/{TOKEN}/save", json={"selection": number, "cut": cut, "name": name}, headers={"origin": "http://testhost"}
    )
    assert answer.status_code == 200, answer.text
    saved = shown.folder / name
    assert answer.json()["kept"] == len(Selection.load(saved))
    for i, line in enumerate(commands(head["command"], tmp_path)):
        words = shlex.split(line)
        words[words.index("-o") + 1] = str(tmp_path / f"out-{i}")
        if words[1] == "run":
            words[2] = str(tmp_path / words[2])
        assert main([*words[1:], "--cache", str(shown.folder / "cache"), "--quiet"]) == 0
        assert_same(tmp_path / f"out-{i}", saved)
    assert "th.Selection.load" in head["python"]


def commands(text: str, folder: Path) -> list[str]:
    """Write the recipe of a command, if it has one, and return the command lines."""
    if text.startswith("cat > "):
        first, _, rest = text.partition("\n")
        recipe, _, line = rest.partition("END\n")
        tomllib.loads(recipe)
        (folder / shlex.split(first)[2]).write_text(recipe, encoding="utf-8")
        return [line]
    assert "\n" not in text
    return [text]


def assert_same(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "name", ["../out", "a/b", "/tmp/x", "", ".hidden", "a\0b", "..", "x" * 101, None, 7, "a b", "chain", "random",
             "C:x", "-o", "a\\b", "a\n"],
)  # fmt: skip
def test_saving_only_directly_below_the_folder_and_never_over_something(shown: Shown, name: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in shown.folder.rglob("*")}
    answer = shown.client.post(
        f"/{TOKEN}/save", json={"selection": 0, "cut": None, "name": name}, headers={"origin": "http://testhost"}
    )
    assert answer.status_code == 409, answer.text
    assert {path: path.stat().st_mtime_ns for path in shown.folder.rglob("*")} == before


def test_saving_in_a_folder_that_is_not_there_yet(shown: Shown, tmp_path: Path) -> None:
    from thresher.viewer.cuts import save

    subject = opened([shown.folder / "random"], out=tmp_path / "new" / "folder")
    made = save(subject, {"selection": 0, "cut": None, "name": "x"})
    assert made["kept"] == len(Selection.load(tmp_path / "new" / "folder" / "x"))
    in_memory = opened([Selection.load(shown.folder / "random")])
    with pytest.raises(OutputError, match="--out DIR"):
        save(in_memory, {"selection": 0, "cut": None, "name": "x"})


def test_a_result_that_fails_is_tried_again() -> None:
    from thresher.viewer.subject import Kept

    kept, tries = Kept(2), iter([OSError("once"), None])

    def make() -> int:
        assert kept.is_making
        if (error := next(tries)) is not None:
            raise error
        return 7

    with pytest.raises(OSError, match="once"):
        kept.get("a", make)
    assert kept.get("a", make) == 7
    assert kept.get("a", make) == 7, "it is kept, and not made a third time"
    assert [kept.get(key, lambda: 1) for key in "bc"] == [1, 1]
    assert kept.get("a", lambda: 8) == 8, "only the last two are kept"
    assert not kept.is_making


def test_a_result_is_held_as_soon_as_it_is_no_longer_being_made() -> None:
    """Else a thread that asks in between would make it again."""
    from thresher.viewer.subject import Kept

    kept, seen, lock = Kept(2), [], threading.Lock()

    class Watched:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            seen.append(kept.is_making or "a" in kept._held)
            lock.release()

    kept._lock = Watched()  # type: ignore[assignment]
    assert kept.get("a", lambda: 7) == 7
    assert len(seen) > 1
    assert all(seen)


def test_saving_does_not_follow_a_symlink(shown: Shown, tmp_path: Path) -> None:
    (shown.folder / "link").symlink_to(tmp_path / "elsewhere")
    body = {"selection": 0, "cut": None, "name": "link"}
    answer = shown.client.post(f"/{TOKEN}/save", json=body, headers={"origin": "http://testhost"})
    assert answer.status_code == 409
    assert not (tmp_path / "elsewhere").exists()


def test_saving_needs_the_page_itself(shown: Shown) -> None:
    body = {"selection": 0, "cut": None, "name": "unwanted"}
    good = {"origin": "http://testhost"}
    assert shown.client.post("/save", json=body, headers=good).status_code == 404
    assert shown.client.post("/wrong/save", json=body, headers=good).status_code == 404
    assert shown.client.post(f"/{TOKEN}/save", json=body).status_code == 403
    assert shown.client.post(f"/{TOKEN}/save", json=body, headers={"origin": "http://evil.example"}).status_code == 403
    assert shown.client.post(f"/{TOKEN}/save", data=body, headers=good).status_code == 415
    plain = {**good, "content-type": "text/plain"}
    assert shown.client.post(f"/{TOKEN}/save", content=json.dumps(body), headers=plain).status_code == 415
    sent = {**good, "content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"7", b"[" * 60_000, b'{"selection": true}', b'{"selection": 9, "name": "n"}'):
        assert shown.client.post(f"/{TOKEN}/save", content=content, headers=sent).status_code == 400
    assert shown.client.post(f"/{TOKEN}/save", content=b" " * 70_000, headers=sent).status_code == 413
    assert shown.client.get(f"/{TOKEN}/save").status_code == 405
    assert not (shown.folder / "unwanted").exists()


# --- colours, clusters, comparisons ---------------------------------------------------------------


def test_colours_of_a_scale_names_and_clusters(shown: Shown, chain: Selection) -> None:
    head, arrays = shown.arrays("colours", by="column:width")
    assert head["kind"] == "scale"
    assert arrays["codes"][9] == 255
    values = np.delete(arrays["codes"], 9)
    assert (np.diff(values.astype(int)) >= 0).all()
    assert values[0] == 0
    assert values[-1] == 253
    head, arrays = shown.arrays("colours", by="column:site")
    assert head["names"] == ["<b>c</b>", "a.example", "b.example"]
    assert arrays["codes"].tolist() == [(1, 2, 0)[i % 3] for i in range(ROWS)]
    head, arrays = shown.arrays("colours", by="cluster", selection=0)
    assert arrays["codes"].tolist() == chain.steps[0].rows["cluster"].tolist()
    head, arrays = shown.arrays("colours", by="score", selection=0)
    assert (arrays["codes"] == 255).sum() == ROWS - chain.steps[2].rows_in


def test_clusters_count_what_the_whole_chain_keeps(shown: Shown, chain: Selection) -> None:
    made = shown.get("clusters", selection=0)
    labels = np.asarray(chain.steps[0].rows["cluster"])
    assert made["step"] == 0
    assert made["size"] == np.bincount(labels).tolist()
    assert made["kept"] == np.bincount(labels[chain.mask()], minlength=len(made["size"])).tolist()
    for j, rows in enumerate(made["examples"]):
        assert rows
        assert (labels[rows] == j).all()
    assert len(made["words"]) == len(made["size"])
    assert any(made["words"])
    last = shown.get("clusters", selection=0, clustered=2, cut=["keep", "20%"])
    assert last["more"].keys() >= {"quota", "complexity"}
    assert sum(last["before"]) == len(chain)
    assert sum(last["kept"]) < sum(last["before"])
    assert shown.get("clusters", selection=1) is None


def test_what_was_lost_counts_rows(shown: Shown, chain: Selection) -> None:
    columns = {one["name"]: one for one in shown.get("lost", selection=0)["columns"]}
    mask = chain.mask()
    values = {one["value"]: one for one in columns["site"]["values"]}
    for i, name in enumerate(("a.example", "b.example", "<b>c</b>")):
        assert (values[name]["rows"], values[name]["kept"]) == (80, int(mask[i::3].sum()))
    assert "words" in {one["kind"] for one in columns.values()}
    ranges = [one for one in columns["width"]["values"] if one["at_least"] is not None]
    assert len(ranges) == 10
    for one in ranges:  # the rows behind a range are those that were counted
        wanted = {"column": "width", "least": one["at_least"], "most": one["at_most"]}
        assert shown.get("rows", set=wanted)["total"] == one["rows"]


def test_infinite_numbers_among_what_was_lost(tmp_path: Path) -> None:
    file = write_pool(tmp_path / "pool") / "metadata" / "metadata_0.parquet"
    ratio = [math.inf if i % 4 == 0 else i / 7 for i in range(ROWS)]
    pq.write_table(pq.read_table(file).append_column("ratio", pa.array(ratio)), file)
    made = th.select(tmp_path / "pool", th.Random(keep="40%"), cache=tmp_path / "cache", progress=False)
    with make_shown(tmp_path, [made.save(tmp_path / "random")]) as shown:
        values = next(one for one in shown.get("lost", selection=0)["columns"] if one["name"] == "ratio")["values"]
    assert sum(one["rows"] for one in values) == ROWS
    assert [one["at_most"] for one in values if one["value"].endswith("inf")] == [None]


def test_clusters_without_rows_at_the_end_have_no_name(shown: Shown) -> None:
    from thresher.viewer.words import names_of

    words, rows = names_of(shown.subject, 0, 0)
    assert names_of(shown.subject, 0, 0, len(words) + 2) == ([*words, "", ""], [*rows, -1, -1])


def test_a_comparison_is_that_of_the_command(shown: Shown) -> None:
    names = ("chain", "random", "clip")
    selections = {str(i): Selection.load(shown.folder / name) for i, name in enumerate(names)}
    expected = json.loads(json.dumps(compare(selections, worst=40)))
    made = shown.get("compare")
    assert {key: made[key] for key in expected} == expected
    masks = np.stack([one.mask() for one in selections.values()])
    assert made["all"] == masks.all(axis=0).sum()
    assert made["none"] == (~masks.any(axis=0)).sum()
    assert made["only"] == [int((mask & (masks.sum(axis=0) == 1)).sum()) for mask in masks]
    errors = shown.get("covariance")
    assert errors["1"]["overall"]["ratio"] > 0


# --- pools and runs -------------------------------------------------------------------------------


def test_a_pool_alone(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", 30)
    with make_shown(tmp_path, [pool]) as shown:
        subject = shown.get("subject")
        assert subject["selections"] == []
        assert subject["out"] is None
        assert len(shown.rows()) == 30
        assert shown.get("explanation", row=3)["steps"] == []
        assert shown.arrays("map")[1]["points"].size == 60
        assert "lists" not in shown.refused("cut", selection=0)
        for name in ("compare", "covariance"):
            assert shown.refused(name) == "selection 0: there are 0"


def test_a_selection_of_data_in_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(50, 8)).astype(np.float32)
    store = th.from_arrays(image, captions=[f"caption {i}" for i in range(50)], images=[picture(i) for i in range(50)])
    kept = th.select(store, th.Random(keep="50%"), progress=False)
    with make_shown(tmp_path, [kept]) as shown:
        assert shown.ids(selection=0, kept=True) == kept.rows().tolist()
        assert shown.client.get(f"/{TOKEN}/picture/0/3/192").status_code == 200
        assert shown.ids(search="caption 17") == [17]
        assert shown.ids(selection=0, cut=["keep", "10%"], kept=True) == kept.recut(keep="10%").rows().tolist()
        said = shown.get("command", selection=0, name="x")
        assert said["command"] == ""
        assert "th.Selection.load" in said["python"]


def test_a_run_and_its_rows(tmp_path: Path) -> None:
    store = th.open(write_pool(tmp_path / "pool"))
    run = make_run(tmp_path / "run", store, prune=0.2, epochs=7, stop=5)
    other = make_run(tmp_path / "sift", store, policy="sift", epochs=6)
    with make_shown(tmp_path, [tmp_path / "run", tmp_path / "sift"]) as shown:
        made = shown.get("run", run=0)
        log = run.log()
        assert made["epochs"] == [1, 2, 3, 4, 5]
        assert made["unfinished"] == "5 of 7 epochs"
        assert made["columns"]["loss"] == pytest.approx([entry["loss"] for entry in log])
        assert made["losses"]["counts"]
        assert made["evaluations"][0]["name"] == "shoes <b>"
        assert made["evaluations"][0]["metrics"][0]["chance"] == pytest.approx(0.01)
        assert any(group["rows"] for group in made["groups"])
        first = made["groups"][0]["rows"][0]
        said = shown.get("explanation", row=first["row"], run=0)
        assert said["history"] == json.loads(json.dumps(history(run, store, f"row:{first['row']}")["history"]))
        assert shown.get("run", run=0, stamp=made["stamp"]) == {"same": True}
        assert shown.get("run", run=1)["ranks"]["counts"]
        run.record([*log, {**log[-1], "epoch": 5}], run.ledger())
        assert shown.get("run", run=0, stamp=made["stamp"])["epochs"][-1] == 6
        (other.folder / "log.jsonl").write_text("{}\n")
        assert "log.jsonl" in shown.refused("run", run=1)


def test_a_run_without_its_pool_has_charts(tmp_path: Path) -> None:
    store = th.open(write_pool(tmp_path / "pool"))
    make_run(tmp_path / "run", store, epochs=3)
    (tmp_path / "pool").rename(tmp_path / "moved")
    with make_shown(tmp_path, [tmp_path / "run"]) as shown:
        made = shown.get("run", run=0)
        assert made["source"] is None
        assert "--pool" in made["why"]
        assert made["epochs"] == [1, 2, 3]
        assert shown.get("subject")["sources"] == []
        assert "the pool of this run is not open" in shown.refused("explanation", row=0, run=0)
    subject = opened([tmp_path / "run"], pool=str(tmp_path / "moved"))
    assert subject.runs[0].source == 0


def test_what_cannot_be_shown(shown: Shown, tmp_path: Path) -> None:
    folder = shown.folder
    with pytest.raises(UsageError, match="nothing to show"):
        opened([])
    with pytest.raises(UsageError, match="a pool is shown alone"):
        opened([folder / "chain", folder / "pool"])
    with pytest.raises(UsageError, match="given twice"):
        opened([folder / "chain", folder / "chain"])
    with pytest.raises(UsageError, match="6 selections: at most 5"):
        opened([Selection.load(folder / "chain")] * 6)
    with pytest.raises(UsageError, match="cannot show int"):
        opened([7])
    with pytest.raises(PoolError, match="nowhere"):
        opened([tmp_path / "nowhere"])
    other = th.select(write_pool(tmp_path / "other", 40), th.Random(keep="50%"), progress=False).save(tmp_path / "o")
    with pytest.raises(UsageError, match="different pools"):
        opened([folder / "chain", other])


# --- the server and the command -------------------------------------------------------------------


def test_the_server_starts_and_stops(shown: Shown) -> None:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    kept = Selection.load(shown.folder / "chain")
    with kept.view(cache=shown.folder / "cache") as viewer:
        assert viewer.url.startswith("http://127.0.0.1:")
        with urlopen(viewer.url + "api/subject", timeout=10) as answer:
            assert json.load(answer)["sources"][0]["rows"] == ROWS
            assert "server" not in {name.lower() for name in answer.headers}
        with pytest.raises(HTTPError, match="403"):
            urlopen(Request(viewer.url, headers={"Host": "evil.example"}), timeout=10)
        assert f'href="{viewer.url}"' in viewer._repr_html_()
    with pytest.raises(URLError):
        urlopen(viewer.url, timeout=5)
    assert repr(viewer) == "Viewer(closed)"
    viewer.close()


def test_a_port_in_use_is_one_line(shown: Shown) -> None:
    with th.view(shown.folder / "random") as viewer:
        port = int(viewer.url.split(":")[2].split("/")[0])
        with pytest.raises(OutputError, match=f"cannot listen at 127.0.0.1:{port}"):
            th.view(shown.folder / "random", port=port)
    with pytest.raises(UsageError, match="not the name of a host"):
        th.view(shown.folder / "random", names=["a/b"])


def test_a_missing_extra_names_the_command(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["view", str(shown.folder / "random")]) == 2
    assert "pip install '.[view]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("default:--host")
def test_the_command_prints_the_address_and_ends_with_ctrl_c(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from thresher.viewer.server import Viewer

    def interrupted(self: Viewer) -> None:
        self.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Viewer, "wait", interrupted)
    paths = [str(shown.folder / "chain"), str(shown.folder / "random")]
    assert main(["view", *paths, "--no-browser"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("http://127.0.0.1:")
    assert err == ""
    assert main(["view", paths[0], "--no-browser", "--host", "0.0.0.0", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["url"].startswith("http://")
    assert "other machines can reach this server" in err
    assert main(["view", paths[0], str(shown.folder / "pool"), "--no-browser"]) == 2


def test_closing_prints_nothing_of_requests_that_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn reports each as an error, with its traceback, to whoever presses Ctrl-C while a map is made."""
    log, server = logging.getLogger("uvicorn.error"), SimpleNamespace(should_exit=False)

    def run() -> None:
        while not server.should_exit:
            time.sleep(0.005)
        log.error("Cancel 1 running task(s), timeout graceful shutdown exceeded")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    log.error("before")
    Viewer("http://localhost", cast(Any, server), thread, cast(Any, None)).close()
    log.error("after")
    assert [record.getMessage() for record in caplog.records] == ["before", "after"]


def test_a_pool_that_has_changed_is_no_longer_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of it is of the earlier files, what would be read is of the later ones."""
    now = [0.0]
    monkeypatch.setattr("thresher.viewer.app.time", SimpleNamespace(monotonic=lambda: now[0]))
    with make_shown(tmp_path) as shown:
        shown.get("rows", set={})
        next((shown.folder / "pool" / "metadata").glob("*.parquet")).touch()
        now[0] += 1.5
        for name, values in {"subject": {}, "rows": {"set": {}}, "histogram": {"selection": 0}}.items():
            said = shown.refused(name, **values)
            assert said.endswith("a file of the pool changed while it was shown; run again once writing has finished")
        body = {"selection": 0, "cut": {"name": "keep", "value": "10%"}, "name": "less"}
        answer = shown.client.post(f"/{TOKEN}/save", json=body, headers={"origin": "http://testhost"})
        assert (answer.status_code, "changed while" in answer.json()["error"]) == (400, True)
        assert not (shown.folder / "less").exists()
