"""Other people's models and checkpoints."""
