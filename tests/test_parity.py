"""The training loop against open_clip_train 3.3 on the same batches from the same weights."""

import json
from argparse import Namespace

import pytest
import torch

from tests.conftest import settings

STEPS, BATCH = 20, 16


def small_run(shards: str, *more: str):
    return settings("model=tiny", f"data.train={shards}", "name=parity", f"train.global_batch_size={BATCH}",
                    f"train.samples={STEPS * BATCH}", "train.epochs=null", "train.precision=fp32", "optim.recipe=open_clip",
                    "schedule.warmup=3", "data.workers=0", "log.every=1", "log.to=[]", "device=cpu", *more)


def losses_of(run_dir) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def losses_of_open_clip_train(config, max_grad_norm: float | None) -> list[float]:
    """Run their own train_one_epoch on our batches, with an optimizer built by their rule."""
    open_clip_train = pytest.importorskip("open_clip_train.train", reason="open_clip_torch 4 ships without its trainer")
    from open_clip.loss import ClipLoss
    from open_clip_train.scheduler import cosine_lr

    from clipkit.data.loader import make_train_loader
    from clipkit.data.samples import PictureExamples
    from clipkit.data.sources import find_sources
    from clipkit.training.trained_model import make_model

    torch.manual_seed(config.seed)
    model = make_model(config)
    loader = make_train_loader(config.data, shards=find_sources(config.data.train, weighted=False), lanes=4,
                               tokenize=model.tokenize, seed=config.seed, examples=PictureExamples(
                                   data=config.data, image_size=model.image_size, group_by="none"),
                               global_batch_size=BATCH)
    batches = [((batch.images.float().div(255) - model.mean) / model.std, batch.tokens.long())
               for batch, _ in zip(loader, range(STEPS), strict=False)]
    towers, seen = model.towers, []
    towers.output_dict = True

    class Recorded(ClipLoss):
        def forward(self, *values, **named):
            found = super().forward(*values, **named)
            seen.append(found["contrastive_loss"].item())
            return found

    def decays(name: str, parameter: torch.Tensor) -> bool:
        return not (parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale")))

    named = list(towers.named_parameters())
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.optim.weight_decay}],
        lr=config.optim.lr, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)

    class Batches(list):
        num_batches, num_samples = STEPS, STEPS * BATCH

    args = Namespace(device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, horovod=False,
                     grad_clip_norm=max_grad_norm, log_every_n_steps=1000, batch_size=BATCH, world_size=1, rank=0,
                     wandb=False, local_rank=0, distributed=False)
    data = {"train": Namespace(dataloader=Batches(batches), set_epoch=lambda epoch: None)}
    open_clip_train.train_one_epoch(towers, data, Recorded(), 0, optimizer, None,
                                    cosine_lr(optimizer, config.optim.lr, 3, STEPS), None, args)
    return seen


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["unclipped", "clipped"])
def test_twenty_steps_give_the_losses_of_open_clip_train(shards, tmp_path, monkeypatch, max_grad_norm):
    from clipkit.commands.pretrain import pretrain

    monkeypatch.chdir(tmp_path)
    limit = "null" if max_grad_norm is None else max_grad_norm
    config = small_run(shards, f"optim.max_grad_norm={limit}")
    assert pretrain(config) is None
    ours, theirs = losses_of(tmp_path / "runs" / "parity"), losses_of_open_clip_train(config, max_grad_norm)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1] < theirs[0] - 0.1  # it is a run that learns
    assert ours == pytest.approx(theirs, rel=1e-5)
