"""Infrastructure: engines, cache, locks, atomic files, progress."""
