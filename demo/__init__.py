"""The main job on real data in a few minutes: handwritten digits, one teacher, one store, five ways to train."""
