"""Timing, memory, environment, rows of measurements, and Triton kernels compiled ahead of time."""
