"""A pool of embeddings, opened as a store."""
