"""Training runs without a model: losses are made up, the folder is as trainers leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher import EmbeddingStore, __version__
from thresher.dynamic.registry import policy_named
from thresher.dynamic.run_folder import Training
from thresher.dynamic.sampler import PruningSampler
from thresher.pool.store import absolute


def losses_of(rows: int, epochs: int, seed: int = 0) -> np.ndarray:
    """(epochs, rows, 2) float32: every row has a level of its own, and some noise."""
    rng = np.random.default_rng(seed)
    own = rng.gamma(2.0, 1.0, (rows, 1))
    falling = 2.0 ** -np.arange(epochs)[:, None, None] + 0.3
    return (falling * (own + 0.5 * rng.gamma(2.0, 1.0, (epochs, rows, 2)))).astype(np.float32)


def make_run(
    folder: Path, store: EmbeddingStore, *, policy: str = "scan", epochs: int = 7, stop: int | None = None, **more: Any
) -> Training:
    """Train for ``stop`` of ``epochs`` epochs; ``more`` are settings, ``options`` of the policy, and ``losses``."""
    told = more.pop("losses", None)
    options, prune = more.pop("options", None), more.pop("prune", None)
    times = np.arange(store.total) % 3 > 0 if policy == "static" else None
    sampler = PruningSampler(
        store.total,
        policy=policy_named(policy, epochs, prune=prune, options=options, times_N=times),
        batch_size=50,
        epochs=epochs,
        drop_last=False,
    )
    losses, log = torch.from_numpy(losses_of(store.total, epochs) if told is None else told), []
    folder.mkdir(parents=True)
    training = Training(
        folder=folder,
        task="clip",
        data=store.layout.location,
        pool=absolute(store.layout.location),
        store=store.fingerprint(),
        rows=store.total,
        policy=policy,
        settings={"epochs": epochs, "samples": None, "batch_size": 50, "seed": 3, "prune": prune, **more},
        version=__version__,
    )
    training.save()
    for epoch in range(epochs if stop is None else stop):
        for rows in sampler:
            sampler.reduce(rows, losses[epoch, rows])
        entry = {**sampler.log()[-1], "seconds": 2.0, "lr": 1e-3}
        entry["samples_per_second"] = entry["samples"] / 2
        if epoch % 2:
            entry["eval"] = {"shoes <b>": {"R@1": 0.1 * epoch, "R@1_chance": 0.01, "loss": 7.0}}
        log.append(entry)
        training.record(log, sampler.ledger)
    return training
