"""What both loops share: states that were saved by earlier versions load, and go on to the same end.

``states`` has states of runs of 8 epochs on 60 rows, of ``losses.npy``: those of the sampler were saved in the middle
of epoch 4, those of the stream at the end of it. ``logs.json`` has what these runs logged to their end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thresher.dynamic.loop import PruningLoop
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policy import Policy
from thresher.dynamic.sampler import PruningSampler
from thresher.dynamic.stream import StreamPruner, ids_of

STATES = Path(__file__).parent / "states"
N, B, EPOCHS = 60, 10, 8
POLICIES: dict[str, Policy] = {
    "scan": Scan(warmup=1, cycle=2, scope="epoch"),
    "d-pruning": DPruning(keep=0.7),
    "infobatch": InfoBatch(epochs=EPOCHS),
}


def state_of(name: str) -> dict[str, Any]:
    with np.load(STATES / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def check_log(loop: PruningLoop, name: str) -> None:
    known = json.loads((STATES / "logs.json").read_text(encoding="utf-8"))[name]
    assert json.loads(json.dumps(loop.log())) == known


@pytest.mark.parametrize("name", POLICIES)
def test_states_of_samplers_load(name: str) -> None:
    losses = torch.from_numpy(np.load(STATES / "losses.npy"))
    sampler = PruningSampler(N, policy=POLICIES[name], batch_size=B, epochs=EPOCHS, seed=3)
    sampler.load_state_dict(state := state_of(f"sampler-{name}"))
    assert (sampler.epoch, sampler.step) == (4, 2)
    again = sampler.state_dict()
    assert again.keys() == state.keys()
    for key, value in again.items():
        np.testing.assert_array_equal(np.asarray(value), state[key])
    while sampler.plan is not None:
        epoch = sampler.epoch
        for rows in sampler:
            sampler.reduce(rows, losses[epoch, rows])
    check_log(sampler, f"sampler-{name}")


@pytest.mark.parametrize("name", POLICIES)
def test_states_of_streams_load(name: str) -> None:
    losses, ids = np.load(STATES / "losses.npy"), ids_of(f"k{i}" for i in range(N))
    pruner = StreamPruner(policy=POLICIES[name], batch_size=B, epochs=EPOCHS, samples=N, seed=3)
    pruner.load_state_dict(state := state_of(f"stream-{name}"))
    again = pruner.state_dict()
    assert again.keys() == state.keys()
    for key, value in again.items():
        np.testing.assert_array_equal(np.asarray(value), state[key])
    while pruner.plan is not None:
        epoch, kept_N = pruner.epoch, pruner.plan.kept_N
        order = np.random.default_rng(epoch).permutation(N)
        rows = order if kept_N is None else order[kept_N[pruner.rows_of(f"k{row}" for row in order)]]
        for i in range(len(pruner)):
            batch = rows[i * B : (i + 1) * B]
            if len(batch):
                pruner.reduce(ids[batch], torch.from_numpy(losses[epoch, batch]))
        if pruner.epoch == epoch:
            pruner.end_epoch()
    check_log(pruner, f"stream-{name}")
