"""What Ray reserves for a task, and which nodes have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thresher.runtime.engine import cores


@dataclass(frozen=True)
class Needs:
    """What Ray reserves for a task.

    Attributes:
        cpus: CPUs.
        gpus: GPUs.
        others: Other resources of Ray, by name.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return what is needed, for messages."""
        return ", ".join(f"{name} {amount:g}" for name, amount in self._amounts().items() if amount)

    @property
    def options(self) -> dict[str, Any]:
        """The options of Ray that reserve it."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.others) or None}

    @property
    def is_bound(self) -> bool:
        """Whether parts of tasks are done only on the node of the task: others were not checked for files."""
        return bool(self.others) or self.cpus > 1

    def capacity(self, node: Mapping[str, Any]) -> int:
        """Return how many tasks a node can run at once."""
        has, needed = node["Resources"], self._amounts().items()
        return int(min((has.get(name, 0) // amount for name, amount in needed if amount), default=cores()))

    def uses(self, node: Mapping[str, Any]) -> bool:
        """Return whether a node can run tasks, or parts of tasks that run elsewhere."""
        helps = bool(self.gpus) and not self.is_bound and node["Resources"].get("CPU", 0) >= 1
        return self.capacity(node) > 0 or helps

    def _amounts(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus, **self.others}
