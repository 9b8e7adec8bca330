"""ClipCov (arXiv 2403.12267): a subset in the place of the pool's image-caption cross-covariance.

Every row belongs to a latent class: that of the nearest class prompt, or a cluster. With similarities
s(a, b) = <v_a, t_b> of image v and text t, a row of a class of n rows scores
cross + 2 self + label / 2 - inter, where cross = (sum_j s(i,j) + s(j,i)) / n over its class, self = <v_i, t_i>,
label = <v_i, prompt>, and inter = <v_i, m_t> + <t_i, m_v> with the means of all other classes. Rows are taken
greedily; each takes (s(i,s) + s(s,i)) / n from the rows of its class (redundancy) and (cross[s] + label[s] / 2) / n
from the whole class (balance). Similarities in cross and redundancy are clamped at 0.

Gains are exact after every row taken. The released code brings them up to date when 199, 399, ... rows of a
class are taken: ``refresh=200``. There, the cross of every row ever taken from the class is subtracted again each
time: ``released=True`` does that too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from thresher.errors import UsageError
from thresher.ops.crosscov import Walk, where_clamped
from thresher.pool.store import vectors_from_npy
from thresher.select.class_statistics import Classes, Similarities, greedy, similarities
from thresher.select.clusters import Clustered, Groups, assign, read_names
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.selection import Keep, Selection

_HEAVY = 1e6  # of a weight: what it weighs would be lost in rounding beside it


@method("clipcov")
@dataclass(frozen=True, kw_only=True)
class ClipCov(Clustered):
    """Keep the rows that best stand for their classes, by ClipCov's objective."""

    keep: Keep = field(metadata={"help": "share or number of rows to keep"})
    classes: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": ".npy of (K, D) text embeddings of class prompts; names in a .txt beside it, one a line",
        },
    )
    clamp: str = field(
        default="0", metadata={"metavar": "X|none", "help": "similarities below this count as 0, or none"}
    )
    refresh: int | None = field(
        default=None,
        metadata={"help": "rows of a class after which its gains are brought up to date (1; released: 200)"},
    )
    weight_self: float = field(default=2.0, metadata={"help": "weight of the row's own similarity, its CLIP score"})
    weight_label: float = field(default=0.5, metadata={"help": "weight of the similarity to the class prompt"})
    weight_inter: float = field(default=1.0, metadata={"help": "weight of the similarity to other classes, subtracted"})
    balance: Literal["on", "off"] = field(
        default="on", metadata={"help": "whether rows taken make their whole class less wanted"}
    )
    released: bool = field(
        default=False, metadata={"help": "reproduce the released code: its balance, and refresh 200 unless given"}
    )

    def __post_init__(self) -> None:
        """Refuse values that no data could make right."""
        super().__post_init__()
        given = [name for name in ("classes", "clusters", "centroids") if getattr(self, name) is not None]
        if self.classes is not None and len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: classes come from one of them; leave the others out")
        if self.classes is not None and self.embedding != "image":
            raise UsageError(f"embedding = {self.embedding!r}: class prompts are compared with images; leave it out")
        if self.refresh is None:
            object.__setattr__(self, "refresh", 200 if self.released else 1)  # recorded as what it is
        if self.refresh is None or self.refresh < 1:
            raise UsageError(f"refresh = {self.refresh}: at least 1")
        for name in ("weight_self", "weight_label", "weight_inter"):
            if abs(getattr(self, name)) > _HEAVY:
                raise UsageError(f"{name} = {getattr(self, name)}: at most {_HEAVY:,.0f}; others are about 1")
        try:
            good = "_" not in self.clamp and (self._clamp is None or -1 <= self._clamp <= 1)
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"clamp = {self.clamp!r}: a similarity from -1 to 1, such as 0, or none")

    def select(self, run: Run) -> Selection:
        """Find the classes, score the rows, walk through the classes, merge."""
        run.store.require_joint("clipcov")
        n = len(run.store)
        budget = self.keep.of(n)
        groups, names = self._classes(run)
        classes = Classes.of(groups)
        walks = self._walks(classes, groups, similarities(run, groups, classes, self._clamp))
        kept_K, cut = greedy(run, classes, walks, budget, self._clamp, self.refresh or 1)
        mask, gains = np.zeros(n, np.bool_), np.empty(n)
        for own, walk, kept in zip(classes.rows(), walks, kept_K.tolist(), strict=True):
            gains[own] = walk.gains_n - walk.lost[kept]
            gains[own[walk.order]] = walk.gains
            mask[own[walk.order[:kept]]] = True
        told: dict[str, Any] = {"size": classes.sizes_K, "kept": kept_K, "d_intra": groups.d_intra_K}
        called = "class {cluster}"
        if names:
            told["name"] = np.array(names)
            called += " ({name})"
        return run.selection(
            self,
            mask,
            reasons=(
                called + " keeps {kept:,} of its {size:,} rows: gain {score:.4f}, the last row taken had {cut:.4f}",
            ),
            score="gain, when taken or when its class was last looked at",
            cut=cut,
            notes=groups.notes,
            rows={"score": gains.astype(np.float32), "cluster": groups.labels_N},
            groups=told,
        )

    @property
    def _clamp(self) -> float | None:
        return None if self.clamp == "none" else float(self.clamp)

    def _classes(self, run: Run) -> tuple[Groups, list[str]]:
        """Return the latent classes, and their names where there are any."""
        if self.classes is None:
            return self.groups(run), []
        prompts = np.concatenate(list(vectors_from_npy(self.classes, "class prompts", run.store, "image")))
        names = read_names(self.classes, len(prompts))
        return replace(assign(run, "image", prompts), notes=(f"{len(prompts):,} classes given: {self.classes}",)), names

    def _walks(self, classes: Classes, groups: Groups, scores: Similarities) -> list[Walk]:
        """Return every class's walk before its first row."""
        order = classes.order_N
        label = 1 - groups.distances_N[order].astype(np.float64)
        score = scores.cross + self.weight_self * scores.own + self.weight_label * label
        score -= self.weight_inter * scores.inter
        balance = np.zeros(len(order)) if self.balance == "off" else self.weight_label * label
        again = self.released and self.balance == "on"
        if self.balance == "on" and not again:
            balance += scores.cross
        clamped = where_clamped(scores.cross, scores.mean, self._clamp)
        return [
            Walk(
                gains_n=score[own].copy(),
                drift_n=scores.mean[own],
                toward=toward,
                clamped_n=clamped[own],
                balance_n=balance[own],
                again_n=scores.cross[own] if again else None,
            )
            for own, toward in zip(classes.slices(), scores.toward_K2D, strict=True)
        ]
