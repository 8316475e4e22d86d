"""Loading the model of a run, finished or not, or of any checkpoint."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..interop.convert.load import load
from ..models.masked_autoencoder import MaskedAutoencoder
from .checkpoint import store
from .config import Config


def load_model(
    path: str | Path, *, key: str | None = None, allow_missing: str | Iterable[str] = (), ema: bool = False
) -> MaskedAutoencoder:
    """Load a model from a run's folder, one of its checkpoints, its final model, or any that `fastmim.load` reads.

    From a run's folder it takes the final model, or without one the newest good checkpoint. Checkpoints with a manifest
    are verified. `key` and `allow_missing` are those of `fastmim.load`. With `ema` the weights are the average that the
    run kept.

    Raises:
        ValueError: a damaged checkpoint, or one that `fastmim.load` refuses; a `key` for a run, which holds one model;
            `ema` for a run without an average, or for another checkpoint.
        FileNotFoundError: a folder without a good checkpoint.
    """
    path = Path(path)
    if path.is_file() and path.name == "model.safetensors":
        path = path.parent
    if (path / "final" / "model.safetensors").is_file():
        path = path / "final"
    elif (path / "checkpoints").is_dir():
        good = next((place for _, place in store.list_checkpoints(path / "checkpoints") if _is_good(place)), None)
        if good is None:
            raise FileNotFoundError(f"{path / 'checkpoints'} holds no good checkpoint")
        path = good
    if (path / store.MANIFEST).is_file():
        store.verify(path)
        description = path / "state.json"
    else:
        description = path / "run.json"
    none_kept = ValueError(f"{path} holds no average of the weights, which a run with the setting ema keeps")
    if not description.is_file():
        if ema:
            raise none_kept
        return load(path, key=key, allow_missing=allow_missing)
    if key is not None:
        raise ValueError(f"{path} is of a run and holds one model: key is for other checkpoints, got {key!r}")
    try:
        config = Config.of(json.loads(description.read_text())["config"] | {"device": "auto", "cuda_graphs": False})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{description} doesn't describe a run: {error}") from None
    from safetensors import SafetensorError

    try:
        weights = store.read_tensors(path, "model")
        # of trained parameters alone
        averages = store.read_tensors(path, "ema") if ema else {}
        model = config.build().to(weights["patch_embed.proj.weight"].dtype)
        model.load_state_dict(weights | averages)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"the model in {path} is damaged or not of {description}: {error}") from None
    if ema and not averages:
        raise none_kept
    return model


def _is_good(path: Path) -> bool:
    try:
        store.verify(path)
    except store.Damaged:
        return False
    return True
