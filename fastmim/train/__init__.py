"""Pretraining runs on one CPU or many GPUs, resumed exactly after an interruption."""

# Modules:
#
#     config         settings of a run, from TOML and the command line; values: of what type they are
#     registry       models by their names
#     loop           Trainer: the run itself
#     data           the loader of a run, by what the data hold; photos: pictures that need no download
#     seeds          seeds of a sample's masks
#     masks          masks of a run
#     batches        batches of any loader
#     objective      what a step minimises: the model's loss, distillation
#     schedule       AdamW and its learning rate
#     distributed    processes, DDP and FSDP2
#     signals        SIGTERM and SIGUSR1
#     checkpoint/    writing, verifying and restoring checkpoints
#     metrics        metrics.jsonl, progress, the loss curve; tensorboard: TensorBoard's files
#     report/        sending metrics to Weights & Biases or MLflow
#     meter          images per second and their share of the matrix product rate
#     flops/         kernels of a GPU step, counted without a GPU
#     plan/          memory, time and traffic of a run before it starts
#     load_run       the model of a run
#     evaluate, export, reconstruct    the `fastmim` commands of these names

from .config import Config
from .loop import Trainer
from .objective import Distill, Objective
from .report.reporter import Reporter
from .signals import Interrupted
from .values import ConfigError

__all__ = ["Config", "ConfigError", "Distill", "Interrupted", "Objective", "Reporter", "Trainer"]
