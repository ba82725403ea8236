"""The client side of the HTTP service: rows, the store and a live teacher over one pooled connection set."""
