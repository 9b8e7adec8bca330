"""Checks of a pool and of raw data before any work is done with them."""
