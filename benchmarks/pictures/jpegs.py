"""JPEGs of ImageNet's size made from real photographs."""

from pathlib import Path

from PIL import Image

from pictures.photographs import Photographs

# ImageNet's training images: about 500 x 375 pixels and 110 KB each
SIDES = (500, 375)
QUALITY = 98


def write_jpegs(folder: Path, count: int, photographs: Photographs) -> float:
    """Write `count` crops of the photographs in ten class folders; return their mean size in bytes."""
    total, random = 0, photographs.generator
    for index in range(count):
        width, height = SIDES if random.random() < 0.75 else SIDES[::-1]
        picture = photographs.next()
        share = random.uniform(0.7, 1) * min(picture.width / width, picture.height / height)
        box = share * width, share * height
        left, top = random.uniform(0, picture.width - box[0]), random.uniform(0, picture.height - box[1])
        crop = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + box[0], top + box[1]))
        path = folder / f"class{index % 10}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.save(path, quality=QUALITY)
        total += path.stat().st_size
    return total / count
