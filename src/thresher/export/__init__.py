"""What a selection leaves for other tools: lists of keys, and filters while loading."""
