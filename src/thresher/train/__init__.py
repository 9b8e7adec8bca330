"""Training with pruning in the loop: reference trainers, and drop-ins for tools people use. Needs the extra train."""
