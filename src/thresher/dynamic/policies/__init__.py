"""One file per policy, a rule that chooses the rows of each training epoch."""
