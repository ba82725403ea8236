"""The HTTP service: cached rows, the store itself and live features."""
