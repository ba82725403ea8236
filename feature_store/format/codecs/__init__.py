"""How taps and logits are encoded: one codec per module, and their names."""
