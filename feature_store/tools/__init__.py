"""The tools of ``feature-store``."""
