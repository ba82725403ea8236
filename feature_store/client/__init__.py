"""The HTTP client: rows, the store and the live teacher of a service."""
