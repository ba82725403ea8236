"""Teachers: where a run's teacher features come from."""
