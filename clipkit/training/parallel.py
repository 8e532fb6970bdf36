"""How a model is spread over processes, from outside: DDP, or its weights shared out (sharding.py)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clipkit.config.parallel import ShardedParallelConfig
from clipkit.model.image_text import ImageTextModel, compile_towers
from clipkit.training.average import WeightAverage
from clipkit.training.distributed import Process
from clipkit.training.sharding import blocks, blueprint, shard_model, whole_tensors


def spread_weights(model: ImageTextModel, process: Process, settings: ShardedParallelConfig, *,
                   compile: bool) -> ImageTextModel | None:
    """Compile a model and share its weights out, as asked, in place, before its optimizer is made.

    Returns:
      Where weights are shared out, the model without its weights, for `whole_model`; else None.

    Raises:
      ValueError: as `sharding.shard_model`.
    """
    shared_out = process.world_size > 1 and settings.strategy != "ddp"
    if process.world_size > 1 and process.device.type == "cuda" and settings.sync_batch_norm:
        model.towers = nn.SyncBatchNorm.convert_sync_batchnorm(model.towers)
    plain = blueprint(model) if shared_out else None
    if compile and shared_out:  # what gathers weights stays outside
        for block in blocks(model):
            block.compile()
    elif compile:
        compile_towers(model)
    if shared_out:
        shard_model(model, process, strategy=settings.strategy, processes_per_copy=settings.processes_per_copy,
                    reshard_after_forward=settings.reshard_after_forward, gather_bf16=settings.gather_bf16)
    return plain


def make_parallel(module: nn.Module, process: Process, *, compile: bool, strategy: str = "ddp") -> Any:
    """Wrap a module so that its gradients are averaged over the processes (DDP), and compile it, as asked.

    A module whose weights are shared out averages its own gradients.
    """
    parallel = module
    if process.world_size > 1 and strategy == "ddp":
        # without device_ids, so that DDP moves no inputs: tokens may stay on the host (model/trim.py)
        parallel = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    return torch.compile(parallel) if compile else parallel


@contextlib.contextmanager
def whole_model(model: ImageTextModel, average: WeightAverage | None, plain: ImageTextModel | None) -> Iterator[ImageTextModel]:
    """Have a model with whole weights for a while, to measure: the average of them, where there is one.

    All processes enter it together. Weights that are shared out are gathered into a copy, in fp32 on every process's device, so
    that each may call it as often as it likes.

    Args:
      model: As it trains.
      average: Of its towers.
      plain: What `spread_weights` gave.
    """
    if plain is None:
        with average.applied() if average else contextlib.nullcontext():
            yield model
        return
    whole = blueprint(plain)
    whole.towers.load_state_dict(whole_tensors(average.weights if average else model.towers.state_dict()), assign=True)
    yield whole.eval()
