"""Masked autoencoders that compute only the patches they keep or predict."""

from . import data, losses, masking, ops
from ._patches import Patches
from ._version import __version__
from .interop.accelerate.api import UnsupportedModelError, accelerate, explain, restore
from .interop.convert.facebook import to_facebook
from .interop.convert.huggingface import from_huggingface, to_huggingface
from .interop.convert.load import load
from .interop.convert.timm import to_timm
from .interop.convert.videomae import to_videomae
from .masking import Mask
from .models.croco import CroCo, croco2_vit_base_patch16, croco2_vit_large_patch16, croco_vit_base_patch16
from .models.cropmae import CropMAE, cropmae_vit_base_patch16, cropmae_vit_small_patch16
from .models.cross import (
    CrossMAE,
    crossmae_vit_base_patch16,
    crossmae_vit_large_patch16,
    crossmae_vit_small_patch16,
)
from .models.encoder import Encoder
from .models.mae import (
    MaskedAutoencoderViT,
    mae_vit_base_patch16,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_small_patch16,
    mae_vit_tiny_patch16,
)
from .models.masked_autoencoder import MaskedAutoencoder
from .models.output import MAEOutput
from .models.pixio import Pixio, pixio_vit_base_patch16, pixio_vit_huge_patch16, pixio_vit_large_patch16
from .models.simmim import SimMIM, simmim_vit_base_patch16
from .models.video import (
    VideoMAE,
    videomae_vit_base_patch16,
    videomae_vit_giant_patch14,
    videomae_vit_huge_patch16,
    videomae_vit_large_patch16,
    videomae_vit_small_patch16,
)

__all__ = [
    "CroCo",
    "CropMAE",
    "CrossMAE",
    "Encoder",
    "MAEOutput",
    "Mask",
    "MaskedAutoencoder",
    "MaskedAutoencoderViT",
    "Patches",
    "Pixio",
    "SimMIM",
    "UnsupportedModelError",
    "VideoMAE",
    "__version__",
    "accelerate",
    "croco2_vit_base_patch16",
    "croco2_vit_large_patch16",
    "croco_vit_base_patch16",
    "cropmae_vit_base_patch16",
    "cropmae_vit_small_patch16",
    "crossmae_vit_base_patch16",
    "crossmae_vit_large_patch16",
    "crossmae_vit_small_patch16",
    "data",
    "explain",
    "from_huggingface",
    "load",
    "losses",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_small_patch16",
    "mae_vit_tiny_patch16",
    "masking",
    "ops",
    "pixio_vit_base_patch16",
    "pixio_vit_huge_patch16",
    "pixio_vit_large_patch16",
    "restore",
    "simmim_vit_base_patch16",
    "to_facebook",
    "to_huggingface",
    "to_timm",
    "to_videomae",
    "videomae_vit_base_patch16",
    "videomae_vit_giant_patch14",
    "videomae_vit_huge_patch16",
    "videomae_vit_large_patch16",
    "videomae_vit_small_patch16",
]
