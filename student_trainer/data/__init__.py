"""Training data: which rows, their pixels, labels, features."""
