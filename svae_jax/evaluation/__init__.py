"""Evaluation: held-out bounds and pictures."""
