"""Launches, bytes, FLOPs and least time of a training step on a GPU, counted without a GPU.

Modules:

    cards            rates of GPUs
    kernel           a launch, as it is counted
    simulated        a CUDA device that need not exist, on which the step runs
    torch_kernels    kernels of PyTorch's ops, and their traffic
    triton_kernels   traffic of fastmim's Triton kernels
    recorder         kernels summed by the stage that launches them
    inputs           objective and batch of a step, without data
    trainer          kernels of the Trainer's step
"""

from .cards import CARDS, Card
from .recorder import UPDATE, Count, Row, Stage, count
from .simulated import DEVICE
from .trainer import count_step

__all__ = ["CARDS", "DEVICE", "UPDATE", "Card", "Count", "Row", "Stage", "count", "count_step"]
