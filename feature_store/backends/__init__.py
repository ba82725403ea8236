"""Backends: where the bytes of a store are."""
