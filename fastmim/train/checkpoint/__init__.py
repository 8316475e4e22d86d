"""Checkpoints of a run: state (tensors to keep), store (files), writer (a thread), manager (all of them together)."""
