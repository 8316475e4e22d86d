"""Pretrain a masked autoencoder on a folder of images, and look at what it learnt.

python examples/train_mae.py FOLDER --steps 500 --out grid.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import trange

import fastmim

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--image-size", type=int, default=128)
parser.add_argument("--mask-ratio", type=float, default=0.75)
parser.add_argument("--out", type=Path, default=Path("grid.png"))
args = parser.parse_args()

size = args.image_size
paths = [path for path in sorted(args.folder.rglob("*")) if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}]
if not paths:
    parser.error(f"folder {args.folder} holds no .jpg, .jpeg, .png or .webp image")
pictures = [
    Image.open(path).convert("RGB").resize((size * 5 // 4, size * 5 // 4), Image.Resampling.BICUBIC) for path in paths
]
photos = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)  # uint8

device = "cuda" if torch.cuda.is_available() else "cpu"
model = fastmim.mae_vit_tiny_patch16(img_size=size, norm_pix_loss=True).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

progress = trange(args.steps)
for _ in progress:
    y, x = torch.randint(0, photos.shape[2] - size + 1, (2,)).tolist()
    batch = photos[torch.randint(len(photos), (args.batch_size,)), :, y : y + size, x : x + size].to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = model(batch, mask_ratio=args.mask_ratio).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    progress.set_postfix(loss=f"{loss.item():.3f}")

shown = photos[:8, :, :size, :size].to(device)
with torch.no_grad():
    out = model(shown, mask_ratio=args.mask_ratio)
original = shown.float() / 255
hidden = model.unpatchify(model.patchify(original) * (1 - out.mask[..., None]) + 0.5 * out.mask[..., None])
rows = torch.cat([original, hidden, model.reconstruct(shown, out)], dim=3)  # original | masked | reconstruction
grid = torch.cat(list(rows), dim=1).permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
Image.fromarray(grid).save(args.out)
print(f"loss {loss.item():.4f}; original | masked | reconstruction in {args.out}")
