"""Input tars: patterns to URLs, members to samples, positions to bytes."""
