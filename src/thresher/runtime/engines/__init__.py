"""One file per engine: where tasks run."""
