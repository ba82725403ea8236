"""Distillation methods: what a student learns from a teacher's features."""
