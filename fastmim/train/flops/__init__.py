"""A training step on a GPU, counted without one: launches, bytes, FLOPs, and the time that they take at least."""

from .cards import CARDS, Card
from .count import Count, Row, count
from .simulated import DEVICE
from .step import count_step

__all__ = ["CARDS", "DEVICE", "Card", "Count", "Row", "count", "count_step"]
