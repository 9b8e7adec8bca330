"""What the engine ray consists of: tasks in flight, what carries them, workers, the connection."""
