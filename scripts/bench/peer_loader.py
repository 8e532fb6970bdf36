"""open_clip_train's own loader as an arm of scripts/bench/loader.py; runs beside open_clip_torch 3.3 or 4, webdataset 0.2.86.

Nothing of it is changed: get_wds_dataset gets the arguments that its command line would give.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from scripts.bench.loader import IMAGE_SIZE, MODEL, serve


def open_loader(shards: list[str], batch_size: int, workers: int) -> Iterator[Any]:
    """Batches of float images (B, 3, H, W) and tokens (B, L), without end as far as a benchmark goes."""
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    args = parse_args(["--train-data", "::".join(shards), "--dataset-type", "webdataset", "--train-num-samples", "100000000",
                       "--batch-size", str(batch_size), "--workers", str(workers)])
    args.world_size = 1  # as its main() sets it
    batches = get_wds_dataset(args, preprocess(), True, tokenizer=open_clip.get_tokenizer(MODEL)).dataloader
    return (tuple(batch[name] for name in ("image", "text")) if isinstance(batch, dict) else batch for batch in batches)


def preprocess() -> Any:
    return image_transform_v2(PreprocessCfg(size=IMAGE_SIZE), is_train=True)


def crop(picture: str, seed: int, out: str) -> dict[str, Any]:
    """Give a picture to the transform of training; answer with the box it drew, the result in levels (H, W, 3) in `out`."""
    transform = preprocess()
    random_crop, normalise = transform.transforms[0], transform.transforms[-1]
    image = Image.open(picture).convert("RGB")
    torch.manual_seed(seed)
    box = random_crop.get_params(image, random_crop.scale, random_crop.ratio)
    torch.manual_seed(seed)
    pixels = transform(image)  # (3, H, W)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    np.save(out, (255 * (pixels * deviation + mean)).round().byte().permute(1, 2, 0).numpy())
    return {"box": box}


def tokenize(texts: list[str]) -> dict[str, Any]:
    return {"tokens": open_clip.get_tokenizer(MODEL)(texts).tolist()}


if __name__ == "__main__":
    serve(open_loader, crop=crop, tokenize=tokenize, packages=("open_clip_torch", "webdataset", "pillow", "torch"))
