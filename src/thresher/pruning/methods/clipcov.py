"""ClipCov (arXiv 2403.12267): a subset that preserves the cross-covariance of the images and captions of the pool.

Every row belongs to a class: that of the nearest class prompt, or a cluster. With similarities
s(a, b) = <v_a, t_b> of image v and text t, the score of a row in a class of n rows is
cross + 2 self + label / 2 - inter, where cross = (sum_j s(i,j) + s(j,i)) / n over its class, self = <v_i, t_i>,
label = <v_i, prompt>, and inter = <v_i, m_t> + <t_i, m_v> with the means of all other classes. Rows are taken
greedily. Each row s taken reduces the gain of every row i of its class by (s(i,s) + s(s,i)) / n (redundancy) and by
(cross[s] + label[s] / 2) / n (balance). Similarities in cross and redundancy are clamped at 0.

Gains are exact after every row taken. The released code updates them when 199, 399, ... rows of a
class are taken (``refresh=200``), and each time subtracts the cross of all rows taken from the class so far again
(``released=True``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from thresher.errors import UsageError
from thresher.io.paths import cut
from thresher.ops.crosscov import Walk, where_clamped
from thresher.ops.cut import slices
from thresher.pool.store import vectors_from_npy
from thresher.pruning.class_statistics import Classes, Similarities, greedy, similarities
from thresher.pruning.clusters import Clustered, Groups, assign, read_names
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.selection import Budget, Keep, Selection

_HEAVY = 1e6  # a larger weight would lose the other terms in rounding


@method("clipcov")
@dataclass(frozen=True, kw_only=True)
class ClipCov(Clustered):
    """Keep the rows that best represent their classes, by the objective of ClipCov."""

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})
    classes: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": ".npy of (K, D) text embeddings of class prompts; a .txt next to it can hold names",
        },
    )
    clamp: str = field(
        default="0", metadata={"metavar": "X|none", "help": "similarities below this count as 0, or none"}
    )
    refresh: int | None = field(
        default=None,
        metadata={"help": "update the gains of a class after this many rows are taken (1; released: 200)"},
    )
    weight_self: float = field(default=2.0, metadata={"help": "weight of the row's own similarity, its CLIP score"})
    weight_label: float = field(default=0.5, metadata={"help": "weight of the similarity to the class prompt"})
    weight_inter: float = field(default=1.0, metadata={"help": "weight of the similarity to other classes, subtracted"})
    balance: Literal["on", "off"] = field(
        default="on", metadata={"help": "whether a row taken reduces the gains of its whole class"}
    )
    released: bool = field(
        default=False,
        metadata={"help": "reproduce the balance of the released code, and its refresh (200) unless given"},
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        given = [name for name in ("classes", "clusters", "centroids") if getattr(self, name) is not None]
        if self.classes is not None and len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: give only one of them")
        if self.classes is not None and self.embedding != "image":
            raise UsageError(f"embedding = {self.embedding!r}: class prompts are compared with images; omit embedding")
        if self.refresh is None:
            object.__setattr__(self, "refresh", 200 if self.released else 1)  # so that the value in use is recorded
        if self.refresh is None or self.refresh < 1:
            raise UsageError(f"refresh = {self.refresh}: must be at least 1")
        for name in ("weight_self", "weight_label", "weight_inter"):
            if abs(getattr(self, name)) > _HEAVY:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at most {_HEAVY:,.0f} in size")
        try:
            good = "_" not in self.clamp and (self._clamp is None or -1 <= self._clamp <= 1)
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"clamp = {cut(self.clamp, 100)!r}: must be a similarity from -1 to 1, such as 0, or none")

    def select(self, run: Run) -> Selection:
        """Assign rows to classes, score them, and take rows greedily."""
        run.store.require_joint("clipcov")
        n = len(run.store)
        budget = Keep.parse(self.keep).of(n)
        groups, names = self._classes(run)
        classes = Classes.of(groups, run.cache.space)
        with run.in_order("joint", classes.order_N) as ordered:
            walks = self._walks(run, classes, groups, similarities(run, groups, classes, self._clamp, ordered))
            kept_K, cut = greedy(run, classes, walks, budget, self._clamp, self.refresh or 1, ordered)
        mask, gains = np.zeros(n, np.bool_), run.cache.space(n, np.float32)
        for own, walk, kept in zip(classes.rows(), walks, kept_K.tolist(), strict=True):
            gains[own] = walk.gains_n - walk.lost[kept]
            gains[own[walk.order]] = walk.gains
            mask[own[walk.order[:kept]]] = True
        evidence: dict[str, Any] = {"size": classes.sizes_K, "kept": kept_K, "d_intra": groups.d_intra_K}
        label = "class {cluster}"
        if names:
            evidence["name"] = np.array(names)
            label += " ({name})"
        return run.selection(
            self,
            mask,
            reasons=(
                label + " keeps {kept:,} of its {size:,} rows: gain {score:.4f}, the last row taken had {cut:.4f}",
            ),
            score="gain when the row was taken, or when its class was last updated",
            cut=cut,
            notes=groups.notes,
            rows={"score": gains, "cluster": groups.labels_N},
            groups=evidence,
        )

    @property
    def _clamp(self) -> float | None:
        return None if self.clamp == "none" else float(self.clamp)

    def _classes(self, run: Run) -> tuple[Groups, list[str]]:
        """Return the classes, and their names if there are any."""
        if self.classes is None:
            return self.groups(run), []
        prompts = np.concatenate(list(vectors_from_npy(self.classes, "class prompts", run.store, "image")))
        names = read_names(self.classes, len(prompts))
        return replace(assign(run, "image", prompts), notes=(f"{len(prompts):,} classes given: {self.classes}",)), names

    def _walks(self, run: Run, classes: Classes, groups: Groups, scores: Similarities) -> list[Walk]:
        """Return the walk of each class, before its first row; its arrays are parts of those of all rows."""
        n = len(classes.order_N)
        score, drift, balance = (run.cache.space(n, np.float64) for _ in range(3))
        clamped = np.empty(n, np.bool_)
        again = self.released and self.balance == "on"
        for here in slices(n):
            label = 1 - groups.distances_N[classes.order_N[here]].astype(np.float64)
            score[here] = scores.cross[here] + self.weight_self * scores.own[here] + self.weight_label * label
            score[here] -= self.weight_inter * scores.inter[here]
            drift[here] = scores.mean[here]
            if self.balance == "on":
                balance[here] = self.weight_label * label + (0 if again else scores.cross[here])
            clamped[here] = where_clamped(scores.cross[here], scores.mean[here], self._clamp)
        return [
            Walk(
                gains_n=score[own],
                drift_n=drift[own],
                toward=toward,
                clamped_n=clamped[own],
                balance_n=balance[own],
                again_n=scores.cross[own] if again else None,
            )
            for own, toward in zip(classes.slices(), scores.toward_K2D, strict=True)
        ]
