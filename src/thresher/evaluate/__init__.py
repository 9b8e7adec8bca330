"""How good a trained model is: pure functions of embeddings and labels, and a reader of evaluation sets."""
