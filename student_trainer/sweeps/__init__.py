"""Sweeps: many runs, compared."""
