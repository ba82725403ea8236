"""Codecs of taps: one per module."""
