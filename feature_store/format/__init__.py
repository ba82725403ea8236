"""Format: the meaning of a store's bytes."""
