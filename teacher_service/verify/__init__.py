"""Verification of a store against its teacher."""
