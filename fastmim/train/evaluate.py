"""Evaluation of features by classification: nearest neighbours, a linear probe, and fine-tuning with few labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageLoader
from ..models.encoder import Encoder

# names of the two folders of a split; without them every fifth file is for testing
PARTS = (("train", "test"), ("train", "val"))
EVERY = 5
# images that are loaded, or go through the encoder, at once
BATCH = 64
# votes of nearest neighbours
NEIGHBOURS, TEMPERATURE = 20, 0.07
# the linear probe
DECAY, LBFGS_STEPS = 1e-3, 200
# fine-tuning
RATE, TUNED_AT_ONCE = 1e-3, 32


@dataclass(frozen=True)
class Labelled:
    """Images uint8 (N, 3, H, W) and labels (N,), in the order of their files."""

    images: Tensor
    labels: Tensor

    def few(self, per_class: int) -> "Labelled":
        """Return the first `per_class` images of each class."""
        chosen = [(self.labels == label).nonzero()[:per_class, 0] for label in self.labels.unique()]
        rows = torch.cat(chosen).sort().values
        return Labelled(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Split:
    """Images to learn from, and images to test on."""

    train: Labelled
    test: Labelled
    classes: list[str]


def read_split(source: Path, image_size: tuple[int, int], num_threads: int | None = None) -> Split:
    """Read labelled images, the middle square of each, from a folder of class folders.

    Folders train and test (or val) in `source` are the split; without them every fifth file is for testing.

    Raises:
        ValueError: no such folder, no classes, or other classes in one part than in the other.
    """
    for names in PARTS:
        if all((source / name).is_dir() for name in names):
            (train, classes), (test, others) = (_read(source / name, image_size, num_threads) for name in names)
            if classes != others:
                raise ValueError(f"{source} must have the same classes in {' and '.join(names)}: {classes}, {others}")
            return Split(train, test, classes)
    whole, classes = _read(source, image_size, num_threads)
    testing = torch.arange(len(whole.labels)) % EVERY == 0
    train, test = (Labelled(whole.images[rows], whole.labels[rows]) for rows in (~testing, testing))
    return Split(train, test, classes)


def _read(source: Path, image_size: tuple[int, int], num_threads: int | None) -> tuple[Labelled, list[str]]:
    # the largest square, never mirrored: the same pixels each time
    loader = ImageLoader(
        source,
        BATCH,
        image_size=image_size,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        flip=False,
        num_threads=num_threads,
        backend="pillow",
        drop_last=False,
    )
    if len(loader.classes) < 2:
        raise ValueError(f"{source} must be a folder of at least two class folders, with images in them")
    images, labels = {}, {}
    for batch in loader:
        assert batch.labels is not None
        for number, image, label in zip(batch.ids.tolist(), batch.images, batch.labels):
            images[number], labels[number] = image.contiguous(), label
    order = sorted(images)
    return Labelled(torch.stack([images[n] for n in order]), torch.stack([labels[n] for n in order])), loader.classes


def check_takes_pictures(model: Encoder, command: str) -> None:
    """Check that a model takes pictures.

    Raises:
        ValueError: another number of channels or axes.
    """
    if (len(model.grid_size), model.in_chans) != (2, 3):
        raise ValueError(
            f"{command} needs a model of pictures, of 3 channels on 2 axes; this {type(model).__name__} takes "
            f"{model.in_chans} channels of {'x'.join(map(str, model.img_size))}"
        )


@torch.no_grad()
def features(model: Encoder, images: Tensor, pool: str = "mean") -> Tensor:
    """Return features (N, D), float32 on the CPU, of the tokens after the final norm.

    pool="mean" is the mean of the patch tokens, pool="class" that of the class tokens.

    Raises:
        ValueError: pool="class" of a model without class tokens.
    """
    count = model.num_prefix_tokens
    if pool == "class" and not count:
        raise ValueError(f"pool must be mean for a {type(model).__name__} without class tokens, got class")
    device = next(model.parameters()).device
    found = []
    for part in images.split(BATCH):
        tokens = model.encode(part.to(device))
        found.append((tokens[:, :count] if pool == "class" else tokens[:, count:]).mean(1).float().cpu())
    return torch.cat(found)


def raw_pixels(images: Tensor) -> Tensor:
    """Return the images as features (N, C·H·W) in 0..1."""
    return images.flatten(1).float() / 255


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Predict labels (N,) of `test` by the cosine-weighted votes of the nearest of `train` (Wu et al., CVPR 2018)."""
    train, test = F.normalize(train), F.normalize(test)
    votes = F.one_hot(labels).float()
    near, rows = (test @ train.T).topk(min(NEIGHBOURS, len(train)))
    return (votes[rows] * (near / TEMPERATURE).exp()[..., None]).sum(1).argmax(1)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Predict labels (N,) of `test` by logistic regression on standardised features, fitted by L-BFGS."""
    deviation, mean = torch.std_mean(train, 0)
    deviation = deviation + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    weight = torch.zeros(train.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + 0.5 * DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (test @ weight + bias).argmax(1).detach()


def fine_tune(
    model: Encoder,
    train: Labelled,
    test: Tensor,
    *,
    steps: int,
    seed: int = 0,
) -> Tensor:
    """Predict labels (N,) of `test` after training the whole encoder and a linear head; `model` is changed."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(model.embed_dim, int(train.labels.max()) + 1).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    decoder = ("decoder", "mask_token", "mixture")
    encoder = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(decoder)]
    optimizer = torch.optim.AdamW([*encoder, *head.parameters()], lr=RATE, weight_decay=0.05, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / max(steps // 10, 1)) * (1 - step / steps)
        rows = torch.randint(len(train.labels), (TUNED_AT_ONCE,), generator=generator)
        tokens = model.encode(train.images[rows].to(device))
        loss = F.cross_entropy(head(tokens[:, model.num_prefix_tokens :].mean(1)), train.labels[rows].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        predicted: Tensor = head(features(model, test).to(device)).argmax(1).cpu()
    return predicted


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of predicted labels that are right."""
    return (predicted == labels).double().mean().item()


def compare(
    models: dict[str, Encoder], split: Split, per_class: int | None = None, pool: str = "mean"
) -> dict[str, tuple[float, float]]:
    """Return the accuracies of nearest neighbours and of a linear probe, on features of each model and raw pixels."""
    train = split.train if per_class is None else split.train.few(per_class)
    pairs = {
        name: [features(model, part.images, pool) for part in (train, split.test)] for name, model in models.items()
    }
    pairs["raw pixels"] = [raw_pixels(part.images) for part in (train, split.test)]
    return {
        name: (
            accuracy(nearest_neighbours(learnt, train.labels, tested), split.test.labels),
            accuracy(linear_probe(learnt, train.labels, tested), split.test.labels),
        )
        for name, (learnt, tested) in pairs.items()
    }


def explain(
    rows: dict[str, tuple[float, float]], split: Split, per_class: int | None = None, pool: str = "mean"
) -> str:
    """Return the accuracies of `compare` as a table, and in words what they are and how much pretraining added.

    Args:
        rows: the accuracies, among them those of "checkpoint" and "random encoder".
        split, per_class, pool: the arguments that `compare` had.
    """
    train = split.train if per_class is None else split.train.few(per_class)
    learnt, tested = len(train.labels), split.test.labels
    most = tested.bincount().max().item() / len(tested)
    # two standard errors of a share of one half
    noise = 100 / len(tested) ** 0.5
    near, linear = (100 * (a - b) for a, b in zip(rows["checkpoint"], rows["random encoder"]))
    tokens = "patch tokens" if pool == "mean" else "class tokens"
    table = [f"{name:<16}{a:>8.1%}{b:>8.1%}" for name, (a, b) in rows.items()]
    return "\n".join(
        (
            f"{'features':<16}{'k-NN':>8}{'linear':>8}",
            *table,
            "",
            f"Share of the test images whose class is predicted; the most frequent class alone would give {most:.1%}.",
            f"k-NN            votes of the {min(NEIGHBOURS, learnt)} most similar training images",
            "linear          a linear classifier, trained on the features of the training images",
            f"checkpoint      features of your encoder, not trained further: the mean of its {tokens}",
            "random encoder  the same encoder before pretraining: the checkpoint should be above this row",
            "raw pixels      the pixels themselves, without an encoder",
            "",
            f"Pretraining changed k-NN by {near:+.1f} points and linear by {linear:+.1f}.",
            f"With {len(tested)} test images, differences below {noise:.0f} points may be chance.",
        )
    )
