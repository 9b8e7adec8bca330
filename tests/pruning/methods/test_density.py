from __future__ import annotations

import numpy as np
import pytest

from thresher import UsageError, build


def make(seed: int, n: int = 300, k: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Rows and centroids: loose and tight clusters, the last but one of a single row, the last of none."""
    rng = np.random.default_rng(seed)
    centres = np.zeros((k, k + 2))
    centres[:-2, :k] = np.eye(k - 2, k) + 0.25 * rng.normal(size=(k - 2, k))
    centres[-2:, k:] = np.eye(2)  # nothing else lies that way
    truth = rng.choice(k - 2, n, p=rng.dirichlet(np.full(k - 2, 2.0)))
    image = centres[truth]
    image[:, :k] += rng.uniform(0.05, 0.3, k)[truth, None] * rng.normal(size=(n, k))
    image[17] = centres[k - 2] + 0.1
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, centres)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32)


class Reference:
    """Everything up to the quotas, in float64 and plain loops."""

    def __init__(self, image, centroids, neighbors=20) -> None:
        cosines = image.astype(np.float64) @ centroids.T.astype(np.float64)
        self.labels, self.distance = cosines.argmax(axis=1), 1 - cosines.max(axis=1)
        k = len(centroids)
        self.sizes = np.array([(self.labels == j).sum() for j in range(k)])
        with np.errstate(invalid="ignore"):
            self.d_intra = np.array([self.distance[self.labels == j].sum() / max(s, np.nan) for j, s in self._sizes()])
        self.d_inter = np.zeros(k)
        wide = centroids.astype(np.float64)
        for j in range(k):
            others = sorted(1 - float(wide[j] @ wide[i]) for i in range(k) if i != j)[:neighbors]
            self.d_inter[j] = sum(others) / len(others)

    def _sizes(self):
        return [(j, s if s else np.nan) for j, s in enumerate(self.sizes)]

    def optimum(self, keep: int, temperature: float, least: int = 1) -> np.ndarray:
        """The real-valued optimum, by bisection."""
        weights = [
            np.exp(inter * intra / temperature) if size else 0.0
            for inter, intra, size in zip(self.d_inter, self.d_intra, self.sizes, strict=True)
        ]
        target = np.array(weights) / sum(weights) * keep
        low = np.minimum(least, self.sizes)
        left, right = -float(keep + 1), float(keep + self.sizes.max() + 1)
        for _ in range(100):
            middle = (left + right) / 2
            over = np.clip(target + middle, low, self.sizes).sum() >= keep
            left, right = (left, middle) if over else (middle, right)
        return np.clip(target + right, low, self.sizes)

    def picked(self, counts, order: str) -> list[int]:
        found: list[int] = []
        sign = -1 if order == "hard" else 1
        for j, count in enumerate(counts):
            of = [i for i in range(len(self.labels)) if self.labels[i] == j]
            found += sorted(of, key=lambda i: (sign * self.distance[i], i))[: int(count)]
        return sorted(found)


@pytest.mark.parametrize("order", ["hard", "easy"])
@pytest.mark.parametrize(
    ("seed", "keep", "given"),
    [
        (0, 90, {}),
        (1, 250, {"temperature": 0.03}),
        (2, 30, {"neighbors": 3}),
        (3, 290, {}),
        (4, 120, {"min_per_cluster": 7}),
    ],
)
def test_it_is_the_definition(pool, rows, centroid_file, select, seed, keep, given, order) -> None:
    image, centroids = make(seed)
    reference = Reference(image, centroids, given.get("neighbors", 20))
    selection = select(
        pool(image), build("density", {"keep": keep, "order": order, "centroids": centroid_file(centroids), **given})
    )
    step = selection.steps[0]
    optimum = reference.optimum(keep, given.get("temperature", 0.1), given.get("min_per_cluster", 1))
    counts = step.groups["kept"]
    assert (np.abs(counts - optimum) < 1 + 1e-3).all()
    assert counts.sum() == len(selection) == keep
    assert counts.tolist() == step.groups["quota"].tolist()
    assert selection.rows().tolist() == reference.picked(counts, order)
    np.testing.assert_allclose(step.groups["d_intra"], reference.d_intra, atol=1e-6)
    np.testing.assert_allclose(step.groups["d_inter"], reference.d_inter, atol=1e-6)
    assert step.groups["size"].tolist() == reference.sizes.tolist()
    assert reference.sizes[-2:].tolist() == [1, 0]
    assert counts[-2:].tolist() == [1, 0]  # a cluster keeps one row if it has one


def test_tight_crowded_clusters_lose_more(pool, rows, select) -> None:
    loose, tight = rows(200, dim=12, groups=2, spread=0.9, seed=1), rows(200, dim=12, groups=2, spread=0.1, seed=2)
    selection = select(pool(np.concatenate([loose, tight])), build("density", {"keep": 160, "clusters": 8}))
    mask = selection.mask()
    assert mask[:200].sum() > 1.2 * mask[200:].sum()
    distance, label = selection.steps[0].rows["score"], selection.steps[0].rows["cluster"]
    for j in range(8):
        here = label == j
        if mask[here].any() and not mask[here].all():
            assert distance[here & mask].min() >= distance[here & ~mask].max()


def test_a_higher_temperature_is_more_even(pool, rows, centroid_file, select) -> None:
    image, centroids = make(5, n=600)
    store, path = pool(image), centroid_file(centroids)
    quotas = [
        select(store, build("density", {"keep": 60, "temperature": t, "centroids": path})).steps[0].groups["quota"]
        for t in (0.02, 0.1, 0.5, 1e6)
    ]
    spreads = [float(q[:-2].std()) for q in quotas]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > spreads[-1] + 2
    sizes = Reference(image, centroids).sizes
    room = np.flatnonzero(sizes > 20)
    assert np.ptp(quotas[-1][room]) <= 1


def test_any_rows_of_a_cluster_may_stay(pool, rows, centroid_file, select) -> None:
    image, centroids = make(0)
    store, path = pool(image), centroid_file(centroids)

    def chosen(order: str, seed: int):
        return select(store, build("density", {"keep": 90, "order": order, "centroids": path}), seed=seed)

    one, other, hard = chosen("random", 0), chosen("random", 1), chosen("hard", 0)
    assert one.rows().tolist() != other.rows().tolist()
    assert one.rows().tolist() != hard.rows().tolist()
    for selection in (one, other):
        assert selection.steps[0].groups["kept"].tolist() == hard.steps[0].groups["quota"].tolist()


def test_fewer_rows_than_clusters(pool, rows, centroid_file, select) -> None:
    image, centroids = make(1)
    selection = select(pool(image), build("density", {"keep": 3, "centroids": centroid_file(centroids)}))
    assert len(selection) == 3
    assert "no minimum is applied" in selection.steps[0].notes[-1]


@pytest.mark.parametrize("keep", [1, 2, 299, 300])
def test_budgets_at_the_ends(pool, rows, centroid_file, select, keep) -> None:
    image, centroids = make(1)
    assert len(select(pool(image), build("density", {"keep": keep, "centroids": centroid_file(centroids)}))) == keep


def test_one_cluster(pool, rows, select) -> None:
    selection = select(pool(rows(50)), build("density", {"keep": 20, "clusters": 1}))
    score, mask = selection.steps[0].rows["score"], selection.mask()
    assert len(selection) == 20
    assert score[mask].min() >= score[~mask].max()


# --- as released --------------------------------------------------------------------------------


def released(reference: Reference, keep: int, temperature: float, order: str) -> list[int]:
    """The published procedure, faults included."""
    from qpsolvers import solve_qp

    k = len(reference.sizes)
    d_intra = np.where(reference.sizes > 1, reference.d_intra, np.nan)
    complexity = reference.d_inter * d_intra
    complexity = np.where(np.isnan(complexity), np.nanmean(complexity), complexity)
    scores = (complexity / temperature).astype(np.float32)
    weights = np.exp(scores) / np.exp(scores).sum()
    target = weights * keep
    min_samples = int(keep / k * 0.5)
    x = solve_qp(
        P=np.eye(k),
        q=-target.astype(np.float64),
        A=np.ones((1, k)),
        b=np.array([float(keep)]),
        lb=np.minimum(min_samples, reference.sizes - 1).astype(np.float64),
        ub=reference.sizes.astype(np.float64),
        solver="osqp",
    )
    found: list[int] = []
    for j, quota in enumerate(np.rint(x).astype(int)):
        of = [i for i in range(len(reference.labels)) if reference.labels[i] == j]
        of.sort(key=lambda i: (-reference.distance[i], i))
        found += of[:quota] if order == "hard" else of[-quota:]
    return sorted(found)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:Converted")  # of osqp, qpsolvers
@pytest.mark.parametrize("order", ["hard", "easy"])
@pytest.mark.parametrize(
    ("seed", "n", "k", "keep", "given"),
    [
        (0, 300, 9, 90, {}),
        (1, 900, 60, 250, {"temperature": 0.1}),
        (2, 900, 60, 40, {"temperature": 0.02}),  # quotas of 0
        (3, 400, 30, 390, {}),
    ],
)
def test_released_is_the_published_procedure(pool, rows, centroid_file, select, seed, n, k, keep, given, order) -> None:
    image, centroids = make(seed, n, k)
    parameters = {"keep": keep, "order": order, "centroids": centroid_file(centroids), "released": True, **given}
    selection = select(pool(image), build("density", parameters))
    expected = released(Reference(image, centroids), keep, given.get("temperature", 0.5), order)
    assert selection.rows().tolist() == expected
    off = len(expected) - keep
    assert any(f"{off:+,} rows off the budget" in note for note in selection.steps[0].notes) == (off != 0)


def test_the_default_has_none_of_the_released_faults(pool, rows, centroid_file, select) -> None:
    """Budget met, bounds held, quota 0 keeps nothing of an "easy" cluster, no nan, "keep" is what is kept."""
    image, centroids = make(2, 900, 60)
    store, path = pool(image), centroid_file(centroids)
    sizes = Reference(image, centroids).sizes
    assert sizes.min() == 0
    assert 1 in sizes
    for keep in (40, 250, 880):
        given = {"keep": keep, "order": "easy", "temperature": 0.02, "min_per_cluster": 0, "centroids": path}
        step = select(store, build("density", given)).steps[0]
        assert step.rows_out == step.groups["quota"].sum() == keep
        assert (step.groups["quota"] <= sizes).all()
        assert step.groups["kept"].tolist() == step.groups["quota"].tolist()
        assert np.isfinite(step.groups["complexity"]).all()
        assert keep > 100 or ((step.groups["quota"] == 0) & (sizes > 0)).any()


def test_released_without_its_extra_says_what_to_type(pool, rows, select, monkeypatch) -> None:
    import sys

    from thresher import MissingExtraError

    monkeypatch.setitem(sys.modules, "qpsolvers", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[released\]'"):
        select(pool(rows(60)), build("density", {"keep": 5, "clusters": 3, "released": True}))


@pytest.mark.parametrize(
    "given", [{"temperature": 0.0}, {"temperature": float("nan")}, {"neighbors": 0}, {"min_per_cluster": -1}]
)
def test_parameters_that_make_no_sense(given) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        build("density", {"keep": 5, **given})
