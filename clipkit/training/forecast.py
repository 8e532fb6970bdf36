"""What a run would cost, before anything is bought or booked: memory, arithmetic, loader cores and network. Nothing is trained.

Arithmetic and activations are counted on a model without memory (torch's meta device), for captions of full length. What can
only be assumed, the share of a device's peak that training reaches, is named in the line that it enters.
"""

import copy
import os
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.config.parallel import ShardedParallelConfig
from clipkit.config.pretrain import PretrainConfig
from clipkit.config.train import ContrastiveTrainConfig
from clipkit.model.image_text import ImageTextModel, parameter_counts
from clipkit.training.estimate import estimate_step
from clipkit.training.plan import Plan, make_plan, plan_run
from clipkit.training.precision import with_precision
from clipkit.training.run_log import duration_text
from clipkit.training.sharding import blocks

PROBE_ROWS = 2
ASSUMED_SHARE = 0.4  # of the peak; ViT-L/14 under amp_bf16 reaches 0.35 to 0.5 with open_clip and big_vision
CONTEXT_GB = 1.0  # of CUDA, cuBLAS and NCCL, before the first tensor
SAMPLES_PER_CORE = 426  # a second, of 512 px JPEGs to 224 px with data.decode=exact (docs/benchmarks.md)
FP32, BF16 = 4, 2  # bytes


class Device(NamedTuple):
    """A device by its maker's data sheet: dense peaks, TFLOP/s."""

    bf16: float
    fp32: float  # of a GPU with TF32 off
    memory_gb: float


DEVICES = {"v100-32gb": Device(15.7, 15.7, 32), "a100-40gb": Device(312, 19.5, 40), "a100-80gb": Device(312, 19.5, 80),
           "l40s": Device(362, 91.6, 48), "rtx4090": Device(165, 82.6, 24), "h100-80gb": Device(989, 67, 80),
           "h200": Device(989, 67, 141), "b200": Device(2250, 75, 180)}


class Booking(NamedTuple):
    """What is planned for."""

    processes: int
    device_name: str
    device: Device | None  # None: this machine, whose step is measured


class ModelCost(NamedTuple):
    """Of one pair, forward and backward, with a caption of full length."""

    flops: float
    activation_bytes: float
    largest_block: int  # its parameters
    outside_blocks: int  # parameters that are in no block


def forecast_run(config: PretrainConfig, model: ImageTextModel) -> str:
    """Say what the run of these settings would cost. Its data need not be there, unless epochs of them are asked for.

    Args:
      config: `plan` says for what processes.
      model: As the run would train it, on the CPU.

    Raises:
      ValueError: `plan` is not understood, or the settings do not fit each other.
    """
    booking = read_booking(config.plan or "", world_size=1)
    config = with_precision(config, None if booking.device else torch.device("cpu"))
    try:
        plan = plan_run(config.data, config.train, config.schedule, world_size=1)[2]
    except FileNotFoundError:
        plan = make_plan(config.train, config.schedule, num_samples=None, lanes=config.data.lanes or 1)
    cost = None if booking.device else estimate_step(model, batch_size=config.train.global_batch_size,
                                                     precision=config.train.precision)
    return forecast(model, plan, booking, train=config.train, parallel=config.parallel,
                    measured_seconds=cost.seconds if cost else None)


def read_booking(plan: str, world_size: int) -> Booking:
    """Read the setting `plan`: "true" for this machine, or <processes>x<device>, such as 64xa100-80gb.

    Raises:
      ValueError: it is neither; the line lists the devices.
    """
    found = re.fullmatch(r"([1-9]\d*)\s*x\s*(.+)", plan.strip().lower())
    if plan.strip().lower() == "true":
        return Booking(world_size, "this machine", None)
    if found is None or found[2] not in DEVICES:
        raise ValueError(f"plan is {plan!r}; give plan=true (this machine), or plan=<processes>x<device> with one of "
                         f"{', '.join(DEVICES)}, such as plan=64xa100-80gb")
    return Booking(int(found[1]), found[2], DEVICES[found[2]])


def model_cost(model: ImageTextModel, precision: str) -> ModelCost:
    """Count a pair's arithmetic and what its backward pass keeps, on a copy of the model that has no memory.

    Args:
      model: On any device; it is not called.
      precision: As in training. Under amp_bf16 what norms keep is counted in fp32, all else in bfloat16.
    """
    from torch.utils.flop_counter import FlopCounterMode

    memo: dict[int, Any] = {id(one): nn.Parameter(one.detach().to("meta"), requires_grad=one.requires_grad)
                            for one in model.parameters()}
    memo |= {id(one): one.to("meta") for one in model.buffers()}
    twin = copy.deepcopy(model, memo).train()
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    bf16 = precision == "amp_bf16"
    twin.towers.to(torch.bfloat16 if bf16 else torch.float32)
    kept_more = _fp32_copies_of_norms(twin) if bf16 else [0]
    images = torch.empty(PROBE_ROWS, 3, twin.image_size, twin.image_size, device="meta",
                         dtype=torch.bfloat16 if bf16 else torch.float32)  # (b, 3, H, W)
    tokens = torch.zeros(PROBE_ROWS, twin.tokenize.context_length, dtype=torch.int64, device="meta")  # (b, L)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            features = twin(images, tokens)
        (features.image_features.sum() + features.text_features.sum() + features.logit_scale).backward()
    own = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    activations = kept_more[0] + sum(size for storage, size in kept.items() if storage not in own)
    sizes = [sum(one.numel() for one in block.parameters()) for block in blocks(model)]
    total = sum(one.numel() for one in model.parameters())
    return ModelCost(flops=counter.get_total_flops() / PROBE_ROWS, activation_bytes=activations / PROBE_ROWS,
                     largest_block=max(sizes, default=0), outside_blocks=total - sum(sizes))


def _fp32_copies_of_norms(model: nn.Module) -> list[int]:
    """Bytes, filled in as the model is called, by which norms keep more under autocast: they work in fp32."""
    more = [0]

    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        more[0] += inputs[0].numel() * (FP32 - BF16)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(count)
    return more


def memory_lines(model: ImageTextModel, cost: ModelCost, booking: Booking, *, batch_size: int, embed_dim: int,
                 train: ContrastiveTrainConfig, parallel: ShardedParallelConfig) -> list[str]:
    """Say what one process holds, in GB, and what to do where that is too much."""
    learning, total = parameter_counts(model)["learning"], sum(one.numel() for one in model.parameters())
    shares = _shares(booking.processes, parallel)
    width = BF16 if parallel.gather_bf16 else FP32
    # Whole at once: all outside of the blocks, a block that computes, and the one that is fetched ahead.
    gathered = width * (cost.outside_blocks + 2 * cost.largest_block) if shares > 1 else 0
    casts = BF16 * total if train.precision == "amp_bf16" and shares == 1 else 0  # autocast's own copies
    rows = min(train.micro_batch_size or batch_size, batch_size)
    features = 4 * FP32 * embed_dim * (train.global_batch_size + batch_size)
    parts = {"weights": FP32 * total / shares + casts + gathered, "gradients": FP32 * learning / shares,
             "optimizer": 2 * FP32 * learning / shares, "average": FP32 * total / shares if train.ema_decay else 0,
             f"activations of {rows:,} pairs": rows * cost.activation_bytes, "features of the batch": features}
    whole = sum(parts.values()) / 1e9 + (CONTEXT_GB if booking.device else 0)
    there = booking.device.memory_gb if booking.device else None
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    lines = [f"memory    {whole:.2f} GB a process{f' of {there:g}' if there else ''}: {listed}"]
    if there and whole > 0.95 * there:
        free = (0.9 * there - CONTEXT_GB) * 1e9 - (sum(parts.values()) - rows * cost.activation_bytes)
        fitting = int(free / cost.activation_bytes)
        cures = [f"train.micro_batch_size={1 << (fitting.bit_length() - 1)}"] if fitting > 0 else []
        cures += ["parallel.strategy=fsdp"] if shares == 1 and booking.processes > 1 else []
        cures += ["train.activation_checkpointing=true"] if not train.activation_checkpointing else []
        lines.append(f"          too much: set {' or '.join(cures)}, or take more processes" if cures else
                     "          too much: take more processes")
    return lines


def network_line(model: ImageTextModel, cost: ModelCost, booking: Booking, *, batch_size: int, embed_dim: int,
                 train: ContrastiveTrainConfig, parallel: ShardedParallelConfig) -> str:
    """Say what a process sends in a step, in GB, by ring algorithms."""
    processes, shares = booking.processes, _shares(booking.processes, parallel)
    if processes == 1:
        return "network   none: one process"
    learning, total = parameter_counts(model)["learning"], sum(one.numel() for one in model.parameters())
    passes = 2 * -(-batch_size // (train.micro_batch_size or batch_size)) if train.micro_batch_size else 1
    features = (processes - 1) * 2 * 2 * batch_size * embed_dim * FP32  # both kinds there, their gradients back
    parts: dict[str, float] = {"features": features}
    if shares > 1:
        width = BF16 if parallel.gather_bf16 else FP32
        gathers = passes + (1 if parallel.reshard_after_forward else 0)
        parts["weights"] = (shares - 1) / shares * total * width * gathers
        parts["gradients"] = (shares - 1) / shares * learning * FP32 * max(1, passes // 2)
    copies = processes // shares
    if copies > 1:
        parts["gradients between copies" if shares > 1 else "gradients"] = 2 * (copies - 1) / copies * learning * FP32 / shares
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"network   {sum(parts.values()) / 1e9:.2f} GB sent by a process in a step: {listed}"


def time_lines(cost: ModelCost, booking: Booking, plan: Plan, *, batch_size: int, train: ContrastiveTrainConfig,
               measured_seconds: float | None) -> list[str]:
    """Say how long a step and the run take, and how many cores the loader needs for that."""
    step_flops = cost.flops * (4 / 3 if train.micro_batch_size else 1) * batch_size
    if booking.device:
        peak = booking.device.bf16 if train.precision == "amp_bf16" else booking.device.fp32
        seconds, how = step_flops / (peak * 1e12 * ASSUMED_SHARE), f"if {ASSUMED_SHARE:.0%} of {peak:g} TFLOP/s are reached"
    elif measured_seconds is None:
        return ["time      not told: run it for some steps, or give plan=<processes>x<device>"]
    else:
        seconds, how = measured_seconds, "as a few rows took here"
    rate = batch_size / seconds
    run, cores = seconds * plan.total_steps, rate / SAMPLES_PER_CORE
    hours = f"; {booking.processes * run / 3600:,.0f} device hours" if booking.device else ""
    return [f"time      {seconds:.2f} s a step, {how}; {plan.total_steps:,} steps: {duration_text(run)}{hours}",
            f"loader    {rate:,.0f} samples/s a process: {cores:.1f} cores, at {SAMPLES_PER_CORE} a second and core "
            "(512 px JPEGs)"]


def forecast(model: ImageTextModel, plan: Plan, booking: Booking, *, train: ContrastiveTrainConfig,
             parallel: ShardedParallelConfig, measured_seconds: float | None) -> str:
    """Say what a run would cost.

    Args:
      model: As it would be trained, not shared out.
      plan: Steps and batch of the run.
      booking: The processes, and the device of each.
      train: batch, micro-batch, precision and average are read from it.
      parallel: Strategy and what belongs to it.
      measured_seconds: Of a step on this machine; None where that was not tried.

    Raises:
      ValueError: the processes do not divide the batch.
    """
    if train.global_batch_size % booking.processes:
        raise ValueError(f"train.global_batch_size is {train.global_batch_size}, and plan asks for {booking.processes} "
                         "processes; give a number of processes that divides it")
    batch_size = train.global_batch_size // booking.processes
    cost = model_cost(model, train.precision)
    embed_dim = model.config["model_cfg"]["embed_dim"]
    counts = parameter_counts(model)
    whole = cost.flops * plan.total_steps * plan.global_batch_size
    return "\n".join([
        f"model     {counts['image'] / 1e6:.2f} M image + {counts['text'] / 1e6:.2f} M text parameters, "
        f"{counts['learning'] / 1e6:.2f} M learn; {model.image_size} px, {model.tokenize.context_length} tokens",
        f"plan      {booking.processes:,} x {booking.device_name}, {parallel.strategy}, {train.precision}; "
        f"{plan.total_steps:,} steps of {plan.global_batch_size:,} pairs, {batch_size:,} a process",
        f"compute   {cost.flops / 1e9:.1f} GFLOP a pair, forward and backward, captions of full length (shorter cost less); "
        f"{whole:.2e} FLOP in all",
        *memory_lines(model, cost, booking, batch_size=batch_size, embed_dim=embed_dim, train=train, parallel=parallel),
        network_line(model, cost, booking, batch_size=batch_size, embed_dim=embed_dim, train=train, parallel=parallel),
        *time_lines(cost, booking, plan, batch_size=batch_size, train=train, measured_seconds=measured_seconds),
    ])


def _shares(processes: int, parallel: ShardedParallelConfig) -> int:
    """Processes over which one copy of the weights is shared out."""
    if parallel.strategy == "ddp":
        return 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", min(8, processes)))
    return processes if parallel.strategy == "fsdp" else min(processes, parallel.processes_per_copy or local)
