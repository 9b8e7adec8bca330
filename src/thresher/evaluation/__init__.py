"""Evaluate a trained model: pure functions of embeddings and labels, and a reader for evaluation sets."""
