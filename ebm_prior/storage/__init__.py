"""Files of our own: atomic writes, weights, checkpoints, the adapter registry, where results go."""
