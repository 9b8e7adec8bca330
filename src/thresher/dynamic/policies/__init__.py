"""One file per policy: what an epoch of training is on."""
