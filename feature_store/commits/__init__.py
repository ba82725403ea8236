"""Commits: which rows of a store count."""
