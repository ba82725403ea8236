"""Runs a frozen teacher once over augmented views of image tars and keeps what it says in a feature store."""
