"""The page at ``/``: static files that call the public API."""
