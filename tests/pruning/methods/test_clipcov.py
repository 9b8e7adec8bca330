from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import write_pool
from thresher import Cache, PoolError, Processes, Serial, Threads, UsageError, build, run_steps
from thresher.pruning import class_statistics
from thresher.pruning.methods import clipcov


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make(seed: int, n: int | None = None, k: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, texts and class prompts; some classes are empty or of one row, similarities of both signs."""
    rng = np.random.default_rng(seed)
    n, k, dim = n or int(rng.integers(20, 300)), k or int(rng.integers(1, 9)), int(rng.integers(4, 20))
    centres, common = rng.normal(size=(k, dim)), rng.uniform(0, 1.2)
    of = rng.choice(k, n, p=rng.dirichlet(np.full(k, 0.7)))
    image = unit(centres[of] + common + 0.7 * rng.normal(size=(n, dim)))
    text = unit(0.5 * centres[of] + 0.3 * common + rng.uniform(0, 1) * image + 0.7 * rng.normal(size=(n, dim)))
    return image, text, unit(centres + 0.3 * rng.normal(size=(k, dim)))


class Reference:
    """The formulas, in float64: every gain from scratch at every step."""

    def __init__(self, image, text, prompts, clamp=0.0, weights=(2.0, 0.5, 1.0), balance="on") -> None:
        image, text, prompts = (rows.astype(np.float64) for rows in (image, text, prompts))
        n = len(image)
        self.labels = (image @ prompts.T).argmax(axis=1)
        self.sizes = np.bincount(self.labels, minlength=len(prompts))
        self.similar = image @ text.T
        own = self.similar.diagonal().copy()
        if clamp is not None:
            self.similar[self.similar < clamp] = 0
        self.cross, inter = np.zeros(n), np.zeros(n)
        for i in range(n):
            mates, others = self.labels == self.labels[i], self.labels != self.labels[i]
            self.cross[i] = (self.similar[i, mates].sum() + self.similar[mates, i].sum()) / mates.sum()
            if others.any():
                inter[i] = image[i] @ text[others].mean(axis=0) + text[i] @ image[others].mean(axis=0)
        by_self, self.by_label, by_inter = weights
        self.label = (image * prompts[self.labels]).sum(axis=1)
        self.score = self.cross + by_self * own + self.by_label * self.label - by_inter * inter
        self.balance = balance

    def gains(self, seen: list[int]) -> np.ndarray:
        """What every row adds to a subset, from the definition of the losses."""
        gains = self.score.copy()
        for i in range(len(gains)):
            mates = [s for s in seen if self.labels[s] == self.labels[i]]
            size = self.sizes[self.labels[i]]
            gains[i] -= sum(self.similar[i, s] + self.similar[s, i] for s in mates) / size
            if self.balance == "on":
                gains[i] -= sum(self.cross[s] + self.by_label * self.label[s] for s in mates) / size
        return gains

    def greedy(self, budget: int, refresh: int = 1) -> list[int]:
        """Rows in the order they are taken; a class sees what was taken when refresh - 1, 2 refresh - 1, ... were."""
        taken: list[int] = []
        counted: dict[int, list[int]] = {k: [] for k in range(len(self.sizes))}
        seen: list[int] = []
        gains = self.gains([])
        for _ in range(budget):
            best = max((i for i in range(len(gains)) if i not in taken), key=lambda i: (gains[i], -i))
            taken.append(best)
            k = int(self.labels[best])
            counted[k].append(best)
            if refresh == 1 or len(counted[k]) % refresh == refresh - 1:
                seen = [s for s in seen if self.labels[s] != k] + counted[k]
                gains = self.gains(seen)
        return taken


@pytest.fixture
def chosen(pool, centroid_file, select):
    """Rows that clipcov keeps of images and texts with class prompts."""

    def choose(image, text, prompts, name="pool", **given):
        store = pool(image, text, name=name)
        classes = centroid_file(prompts, f"{name}.npy")
        return select(store, build("clipcov", {"classes": classes, **given}))

    return choose


@pytest.mark.parametrize("parts", ["held", "in parts"])
@pytest.mark.parametrize("clamp", ["0", "none", "0.2", "-0.05"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_it_is_the_brute_force_greedy(chosen, monkeypatch, seed, clamp, parts) -> None:
    if parts == "in parts":
        monkeypatch.setattr(class_statistics, "_held", lambda store: 20)
    image, text, prompts = make(seed, n=100)
    reference = Reference(image, text, prompts, None if clamp == "none" else float(clamp))
    order = reference.greedy(60)
    for keep in (1, 25, 60):
        found = chosen(image, text, prompts, name=f"p{keep}", keep=keep, clamp=clamp)
        assert found.rows().tolist() == sorted(order[:keep])
        step = found.steps[0]
        assert step.cut == pytest.approx(reference.gains(order[: keep - 1])[order[keep - 1]], abs=1e-5)
        assert (step.rows["score"][found.mask()] >= np.float32(step.cut)).all()
        assert (
            step.groups["kept"].tolist() == np.bincount(reference.labels[order[:keep]], minlength=len(prompts)).tolist()
        )


@pytest.mark.parametrize("balance", ["on", "off"])
@pytest.mark.parametrize("refresh", [2, 5, 30])
def test_gains_are_brought_up_to_date_when_asked(chosen, refresh, balance) -> None:
    image, text, prompts = make(11, n=150, k=3)
    order = Reference(image, text, prompts, balance=balance).greedy(70, refresh)
    for keep in (10, 70):
        found = chosen(image, text, prompts, name=f"p{keep}", keep=keep, refresh=refresh, balance=balance)
        assert found.rows().tolist() == sorted(order[:keep])


def test_every_weight_counts(chosen) -> None:
    image, text, prompts = make(5, n=120)
    for number, weights in enumerate([(0.0, 0.0, 0.0), (1.0, 3.0, 0.5), (2.0, 0.5, -1.0)]):
        order = Reference(image, text, prompts, weights=weights).greedy(30)
        by_self, by_label, by_inter = weights
        given = {"weight_self": by_self, "weight_label": by_label, "weight_inter": by_inter}
        assert chosen(image, text, prompts, name=f"p{number}", keep=30, **given).rows().tolist() == sorted(order)


def notebook(image, text, prompts, budget, *, again: bool) -> list[int]:
    """The released procedure with its formulas: batches of 200, gains subtracted in place, sorted again."""
    reference = Reference(image, text, prompts)
    scores, labels, sizes = reference.score.copy(), reference.labels, reference.sizes
    subset: list[int] = []
    of_class: dict[int, list[int]] = {k: [] for k in range(len(prompts))}
    fresh: dict[int, list[int]] = {k: [] for k in range(len(prompts))}
    while len(subset) < budget:
        best = int(np.argmax(scores))
        subset.append(best)
        scores[best] = -np.inf
        k = int(labels[best])
        of_class[k].append(best)
        fresh[k].append(best)
        if (len(of_class[k]) + 1) % 200 == 0:
            rows = np.flatnonzero(labels == k)
            block = reference.similar[np.ix_(rows, fresh[k])].sum(axis=1)
            block += reference.similar[np.ix_(fresh[k], rows)].sum(axis=0)
            scores[rows] -= block / sizes[k]
            scores[rows] -= reference.cross[of_class[k] if again else fresh[k]].sum() / sizes[k]
            scores[rows] -= reference.label[fresh[k]].sum() / 2 / sizes[k]
            fresh[k] = []
    return subset


@pytest.mark.parametrize("budgets", [(700,), pytest.param((150, 700, 2_200), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("released", [False, True])
def test_the_released_order(chosen, released, budgets) -> None:
    """Classes of 600 to 1,300 rows, so that most are brought up to date several times."""
    image, text, prompts = make(21, n=3_000, k=4)
    given = {"released": True} if released else {"refresh": 200}
    for keep in budgets:
        found = chosen(image, text, prompts, name=f"p{keep}", keep=keep, **given)
        assert found.rows().tolist() == sorted(notebook(image, text, prompts, keep, again=released))


@given(st.integers(0, 10**6), st.data())
def test_budgets_are_exact_and_nested_and_gains_never_grow(tmp_path_factory, seed, data) -> None:
    """With a clamp at 0 the objective is submodular: no gain in a class is above an earlier one."""
    folder = tmp_path_factory.mktemp("p")
    image, text, prompts = make(seed)
    store = write_pool(folder / "pool", image, text)
    np.save(folder / "prompts.npy", prompts)
    n, k = len(image), len(prompts)
    given = {
        "refresh": data.draw(st.sampled_from([1, 1, 3, 200])),
        "balance": data.draw(st.sampled_from(["on", "off"])),
    }
    given["classes"] = str(folder / "prompts.npy")
    before: set[int] = set()
    for keep in sorted(data.draw(st.sets(st.integers(1, n), min_size=2, max_size=4))):
        made = build("clipcov", {"keep": keep, "weight_label": 0.0, **given})
        found = run_steps(store, [made], engine=Serial(), cache=Cache.at(folder / "cache"))
        assert len(found) == keep
        assert before <= set(found.rows().tolist())
        before = set(found.rows().tolist())
    walks = walked(store, folder, k, given["refresh"], given["balance"])
    for walk in walks:
        assert len(walk.order) == len(walk.gains_n)
        assert (np.diff(walk.gains) <= 1e-5).all()


def walked(store, folder, k, refresh, balance) -> list:
    """Every class's walk to its end."""
    seen = []
    real = class_statistics.greedy

    def spy(run, classes, walks, *more):
        out = real(run, classes, walks, *more)
        seen.extend(walks)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipcov, "greedy", spy)
        given = {"keep": "100%", "classes": str(folder / "prompts.npy"), "weight_label": 0.0}
        made = build("clipcov", {**given, "refresh": refresh, "balance": balance})
        run_steps(store, [made], engine=Serial(), cache=Cache.at(folder / "cache"))
    assert len(seen) == k
    return seen


@pytest.mark.parametrize(
    "engine",
    [pytest.param(Serial(), marks=pytest.mark.slow), Threads(3), pytest.param(Processes(2), marks=pytest.mark.slow)],
    ids=["serial", "threads", "processes"],
)
def test_a_large_class_in_parts_gives_the_same_bytes_on_every_engine(pool, tmp_path, engine) -> None:
    rng = np.random.default_rng(3)
    image, text = (unit(1 + rng.normal(size=(24_000, 8))) for _ in range(2))
    centroids = tmp_path / "centroids.npy"
    np.save(centroids, unit(np.stack([np.ones(8), np.eye(8)[0] * 3 + 0.2, -np.ones(8)])))
    step = build("clipcov", {"keep": 2_000, "centroids": str(centroids)})
    store = pool(image, text)
    found = run_steps(store, [step], engine=engine, cache=Cache.at(tmp_path / "own"))
    first = run_steps(store, [step], engine=Serial(), cache=Cache.at(tmp_path / "first"))
    assert found.rows().tolist() == first.rows().tolist()
    assert found.steps[0].rows["score"].tobytes() == first.steps[0].rows["score"].tobytes()
    assert found.steps[0].groups["size"].max() > class_statistics._held(store)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (1, 5), (2, 1), (7, 7), (50, 1)], ids=["one row", "empty classes", "pair", "ones", "one class"]
)
def test_small_and_lopsided_classes(chosen, n, k) -> None:
    image, text, prompts = make(n + k, n=n, k=k)
    order = Reference(image, text, prompts).greedy(n)
    for keep in {1, (n + 1) // 2, n}:
        assert chosen(image, text, prompts, name=f"p{keep}", keep=keep).rows().tolist() == sorted(order[:keep])


def test_equal_gains_go_to_the_lower_row(chosen) -> None:
    image = unit(np.tile(np.eye(4)[:2], (5, 1)))
    found = chosen(image, image, np.eye(4, dtype=np.float32)[:2], keep=5)
    assert found.rows().tolist() == [0, 1, 2, 3, 4]


def test_the_classes_names_are_told(chosen, tmp_path) -> None:
    image, text, prompts = make(2, n=40, k=3)
    (tmp_path / "pool.txt").write_text("a cat\na  dog \na bird\n", encoding="utf-8")
    found = chosen(image, text, prompts, keep=8)
    step = found.steps[0]
    assert step.groups["name"].tolist() == ["a cat", "a dog", "a bird"]
    i = int(np.flatnonzero(~found.mask())[0])
    name = ["a cat", "a dog", "a bird"][step.rows["cluster"][i]]
    assert f"({name}) keeps" in step.why(i)
    (tmp_path / "other.txt").write_text("a cat\na dog\n", encoding="utf-8")
    with pytest.raises(PoolError, match="2 class names, one per line, for the 3 rows"):
        chosen(image, text, prompts, name="other", keep=8)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"classes": "p.npy", "clusters": 5}, "classes and clusters: give only one of them"),
        ({"classes": "p.npy", "centroids": "c.npy"}, "classes and centroids"),
        ({"classes": "p.npy", "embedding": "text"}, "compared with images"),
        ({"refresh": 0}, "refresh = 0: must be at least 1"),
        ({"clamp": "off"}, "clamp = 'off': must be a similarity from -1 to 1, such as 0, or none"),
        ({"clamp": "nan"}, "clamp"),
        ({"clamp": 7}, "clamp"),
        ({"balance": "maybe"}, "allowed: on, off"),
    ],
)
def test_parameters_that_make_no_sense(given, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("clipcov", {"keep": "50%", **given})


def test_a_recipe_may_give_the_clamp_as_a_number() -> None:
    assert [build("clipcov", {"keep": "50%", "clamp": clamp}).clamp for clamp in (0, 0.1, -1)] == ["0", "0.1", "-1"]


def test_pools_it_cannot_judge(pool, rows, select, centroid_file) -> None:
    half = build("clipcov", {"keep": "50%"})
    with pytest.raises(UsageError, match="4 dimensions, text embeddings 8.*one joint space"):
        select(pool(rows(6, dim=4), rows(6), name="widths"), half)
    with pytest.raises(UsageError, match="has no text embeddings"):
        select(pool(rows(6), name="images"), half)
    prompts = build("clipcov", {"keep": 2, "classes": centroid_file(rows(3, dim=5))})
    with pytest.raises(UsageError, match="5 dimensions for image embeddings of 8"):
        select(pool(rows(6), rows(6), name="prompts"), prompts)


def test_a_killed_pass_over_the_class_products_goes_on(pool, tmp_path, monkeypatch) -> None:
    """Only the products not yet done are computed again, and the result is the same."""
    monkeypatch.setattr(class_statistics, "_held", lambda store: 50)
    image, text, prompts = make(8, n=280, k=6)
    np.save(tmp_path / "prompts.npy", prompts)
    store = pool(image, text)
    step = build("clipcov", {"keep": 60, "classes": str(tmp_path / "prompts.npy")})
    whole = run_steps(store, [step], engine=Serial(), cache=Cache.at(tmp_path / "whole"))
    cache = Cache.at(tmp_path / "cache")
    object.__setattr__(cache, "flush_seconds", 0.0)
    products, calls = class_statistics._products, []

    def count(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return products(*given)

    monkeypatch.setattr(class_statistics, "_products", count)
    with pytest.raises(KeyboardInterrupt):
        run_steps(store, [step], engine=Serial(), cache=cache)
    run_steps(store, [step], engine=Serial(), cache=cache)
    tiles = len(calls) - 1
    found = run_steps(store, [step], engine=Serial(), cache=cache)
    assert (
        len(calls) - 1
        == tiles
        == len(list(class_statistics._tiles(np.bincount(whole.steps[0].rows["cluster"], minlength=6), 50)))
    )
    assert found.rows().tolist() == whole.rows().tolist()
    assert found.steps[0].rows["score"].tobytes() == whole.steps[0].rows["score"].tobytes()
