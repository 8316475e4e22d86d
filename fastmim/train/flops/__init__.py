"""A training step on a GPU, counted without one: launches, bytes, FLOPs, and the time that they take at least."""

from .cards import CARDS, Card
from .recorder import UPDATE, Count, Row, Stage, count
from .simulated import DEVICE
from .step import count_step, optimizer_stages

__all__ = ["CARDS", "DEVICE", "UPDATE", "Card", "Count", "Row", "Stage", "count", "count_step", "optimizer_stages"]
