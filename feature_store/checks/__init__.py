"""Proving a store and mending it."""
