"""Engine of a run: optimizer, checkpoints, processes, logs."""
