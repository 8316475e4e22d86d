"""Timing, memory, environment and rows of measurements."""
