"""Sending the lines of metrics.jsonl to an experiment tracker, such as Weights & Biases or MLflow."""
