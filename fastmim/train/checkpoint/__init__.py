"""Checkpoints of a run: state (tensors to keep), store (files), shard_writer (shards), writer (a thread), manager (all)."""
