"""One file per layout of raw data."""
