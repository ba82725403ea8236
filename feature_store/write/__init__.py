"""Writing a store: create, units, extension."""
