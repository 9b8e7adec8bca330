"""Training with pruning in the loop: reference trainers and integrations with other trainers. Needs the extra train."""
