"""Looks at a pool or at raw data before any work is done with them."""
