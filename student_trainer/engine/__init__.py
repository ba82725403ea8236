"""Engine room of a run: optimizer, checkpoints, processes, logs."""
