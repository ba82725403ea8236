"""Trains small students against cached or live teacher features with ScaleKD."""
