"""The teacher's side: plan, cache, verify, serve."""
