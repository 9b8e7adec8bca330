"""Pruning in the training loop: a policy says before each epoch which rows to train on, from what was recorded.

Policies are frozen and pure; all that changes is in the ledger. Both need NumPy alone.

Shape letters: N rows of the dataset, B rows of a batch, R directions of the loss (image to text, text to
image; or the two views), M rows listed by id.
"""
