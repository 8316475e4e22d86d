"""Pretrain a masked autoencoder on a folder of images, and draw reconstructions.

python examples/train_mae.py FOLDER --steps 500 --out grid.png
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from tqdm import tqdm

import fastmim
from fastmim.data import ImageLoader
from fastmim.train.reconstruct import draw_grid

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--image-size", type=int, default=128)
parser.add_argument("--mask-ratio", type=float, default=0.75)
parser.add_argument("--out", type=Path, default=Path("grid.png"))
args = parser.parse_args()

size, device = args.image_size, "cuda" if torch.cuda.is_available() else "cpu"
try:
    loader = ImageLoader(args.folder, args.batch_size, image_size=size, device=device, drop_last=False)
    whole = ImageLoader(args.folder, 8, image_size=size, device=device, drop_last=False, scale=(1, 1), flip=False)
except ValueError as error:
    parser.error(str(error))
model = fastmim.mae_vit_tiny_patch16(img_size=size, norm_pix_loss=True).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

# epochs, each in another order
batches = chain.from_iterable(repeat(loader))
progress = tqdm(islice(batches, args.steps), total=args.steps)
for batch in progress:
    with torch.autocast(device, torch.bfloat16):
        loss = model(batch.images, mask_ratio=args.mask_ratio).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    progress.set_postfix(loss=f"{loss.item():.3f}")

shown = next(iter(whole)).images
with torch.no_grad():
    draw_grid(model, shown, model(shown, mask_ratio=args.mask_ratio), args.out)
print(f"loss {loss.item():.4f}; original | masked | reconstruction in {args.out}")
