"""From raw images and captions to a pool of embeddings, with the encoder of your choice; needs the extra ``embed``."""
