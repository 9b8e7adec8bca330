"""From pictures and captions to a pool of embeddings, with the encoder of your choice. Needs the extra embed."""
