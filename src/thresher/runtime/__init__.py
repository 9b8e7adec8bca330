"""The machine: engines, cache, locks, atomic files, progress."""
