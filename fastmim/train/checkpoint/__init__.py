"""Checkpoints of a run: state (tensors), store (files), shard_writer (shards), writer (a thread), manager (all)."""
