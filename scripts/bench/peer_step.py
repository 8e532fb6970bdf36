"""open_clip_train's arm of step.py, in an environment of its own: its model, loss, loader and training loop, unchanged.

3.3 trains a model with a loss; 4 trains a task, which holds both.
"""

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip_train import train
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from scripts.bench.step_arm import Clock, serve

TOTAL_STEPS = 10_000
OPTIONS = ("--train-data=shards", "--dataset-type=webdataset", "--grad-clip-norm=1.0", "--lr=1e-3", "--wd=0.2", "--beta1=0.9",
           "--beta2=0.98", "--eps=1e-6", "--workers=0", "--warmup=100", "--log-every-n-steps=100000", "--local-loss",
           "--gather-with-grad", "--dataset-resampled")
TRAINS_TASKS = hasattr(train, "TrainState")  # 4


class Timed:
    """A data loader that gives some batches under a clock."""

    def __init__(self, batches: Any, number: int, batch_size: int, clock: Clock) -> None:
        self.batches, self.num_batches, self.num_samples, self.clock = batches, number, number * batch_size, clock

    def __iter__(self) -> Iterator[Any]:
        return self.clock.of(batch for batch, _ in zip(self.batches, range(self.num_batches), strict=False))


class OpenCLIPTrainer:
    """Model, optimizer and options as open_clip_train.main makes them for one process."""

    def __init__(self, model_cfg: str, weights: str, batch: str, micro_batches: int = 1, device: str = "cpu",
                 precision: str = "fp32", compile_model: bool = False) -> None:
        cfg, saved = json.loads(model_cfg), load_file(batch)
        self.version = f"open_clip_train {open_clip.__version__}{' --torchcompile' if compile_model else ''}"
        self.clock, self.micro_batches = Clock(device), micro_batches
        rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.images, self.tokens = (saved[name][rank::world_size].to(device) for name in ("normalised", "tokens"))
        self.tokens = self.tokens.long()
        self.args = parse_args([*OPTIONS, f"--batch-size={len(self.images) // micro_batches}", f"--precision={precision}",
                                f"--accum-freq={micro_batches}"])
        vars(self.args).update(device=device, rank=rank, local_rank=rank, world_size=world_size, distributed=world_size > 1,
                               distill=False, wandb=False)
        self.towers: Any = CLIP(**cfg, output_dict=True)
        self.towers.load_state_dict(load_file(weights))
        self.towers.to(device)
        self.image_size = cfg["vision_cfg"]["image_size"]
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for name, parameter in self.towers.named_parameters():
            kept = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            groups[kept].append(parameter)
        decayed = [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False], "weight_decay": 0.2}]
        self.optimizer = torch.optim.AdamW(decayed, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
        self.scheduler = cosine_lr(self.optimizer, 1e-3, 100, TOTAL_STEPS)
        self.model: Any = torch.compile(self.towers) if compile_model else self.towers
        if TRAINS_TASKS:
            self.task: Any = open_clip.create_task(self.args, model=self.model)  # pyright: ignore[reportAttributeAccessIssue]
        if TRAINS_TASKS and world_size > 1:
            raise ValueError("several processes are measured beside open_clip_train 3.3 only; give --only loader step loss")
        if world_size > 1:  # as open_clip_train.main does, with its defaults
            dist.init_process_group("gloo")
            self.model = DistributedDataParallel(self.model)
        self.from_shards: Iterator[Any] | None = None
        self.contrast = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size)

    def loss(self) -> Tensor:
        return self.contrast(**self.model(self.images, self.tokens))

    def text_features(self) -> Tensor:
        return self.towers.encode_text(self.tokens, normalize=True)

    def steps(self, number: int, shards: list[str] | None = None) -> None:
        size = len(self.images) // self.micro_batches
        if shards and not self.from_shards:
            self.from_shards = self.open(shards)
        batch: Any = (self.images[:size], self.tokens[:size])
        if TRAINS_TASKS:
            batch = {"image": batch[0], "text": batch[1]}
        batches = self.from_shards if shards else iter(lambda: batch, None)
        loader = Timed(batches, number * self.micro_batches, size, self.clock)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        if TRAINS_TASKS:
            state = train.TrainState(task=self.task, optimizer=self.optimizer, scheduler=self.scheduler)  # pyright: ignore
            train.train_one_epoch(state, data, self.args)  # pyright: ignore
        else:
            train.train_one_epoch(self.model, data, self.contrast, 0, self.optimizer, None, self.scheduler, None, self.args)

    def open(self, shards: list[str]) -> Iterator[Any]:
        self.args.train_data, self.args.train_num_samples = "::".join(shards), 1_000_000
        transform = open_clip.image_transform(self.image_size, is_train=True)
        return iter(get_wds_dataset(self.args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader)


if __name__ == "__main__":
    serve(OpenCLIPTrainer)
