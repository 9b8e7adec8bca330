"""Exports of a selection for other tools: lists of keys, and filters at load time."""
