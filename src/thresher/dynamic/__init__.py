"""Pruning in the training loop: before each epoch a policy chooses the rows to train on, by the losses so far.

Policies are frozen and pure; all state is in the ledger. Both need only NumPy.

Terms, from the SCAN paper (arXiv 2411.09126):

- warm-up: the first epochs, on all rows (not the warm-up of the learning rate);
- preparation: an epoch on all rows in which candidates for pruning are marked;
- mutation: an epoch that leaves out some of the candidates;
- redundant: a candidate with one of the lowest losses, which the model has learned;
- ill-matched: a candidate with one of the highest losses, whose image and text may not match.

Shape letters: N rows of the dataset, B rows of a batch, R directions of the loss (image to text, text to
image; or the two views), M rows listed by id.
"""
