"""Sharing of a job's units among processes."""
