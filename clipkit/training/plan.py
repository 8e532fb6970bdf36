"""The plan of a run: how many steps, how warm, how much each process holds; and the summary that the person sees."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from clipkit.config.data import DataConfig
from clipkit.config.schedule import ScheduleConfig
from clipkit.config.train import ContrastiveTrainConfig, TrainConfig
from clipkit.data.lanes import check_lanes, default_lanes
from clipkit.data.shards import count_samples
from clipkit.data.sources import find_sources
from clipkit.model.image_text import ImageTextModel, has_batch_statistics, parameter_counts
from clipkit.training.estimate import StepCost
from clipkit.training.run_log import duration_text
from clipkit.training.schedule import warmup_steps

SMALL_BATCH = 128  # pairs that have few negatives each


class Plan(NamedTuple):
    total_steps: int
    warmup_steps: int
    global_batch_size: int
    num_samples: int | None  # in one epoch; None where counting would mean reading everything
    lanes: int


def plan_run(data: DataConfig, train: TrainConfig, schedule: ScheduleConfig, *, world_size: int,
             set_aside: float = 0) -> tuple[list[list[str]], list[str], Plan]:
    """Find the data and plan a run over them. `set_aside`: the share that is not trained on.

    Returns:
      The shards of each source, all of them, and the plan.

    Raises:
      FileNotFoundError: there are no such shards.
      ValueError: they hold no samples, fewer than a batch, or do not fit the lanes and processes.
    """
    sources = find_sources(data.train, weighted=data.weights is not None, cache_dir=data.cache_dir, allow_pipe=data.allow_pipe)
    shards = list(chain.from_iterable(sources))
    lanes = data.lanes or default_lanes(max(map(len, sources)))
    check_lanes(lanes, train.global_batch_size, world_size)
    num_samples = count_samples(shards, data.cache_dir)
    if num_samples == 0:
        raise ValueError(f"no samples were found in {shards[0]}{' and the other shards' if shards[1:] else ''}; look with: "
                         f"clipkit shards check data='{data.train[0]}'")
    left = None if num_samples is None else round(num_samples * (1 - set_aside))
    return sources, shards, make_plan(train, schedule, num_samples=left, lanes=lanes)


def make_plan(train: TrainConfig, schedule: ScheduleConfig, *, num_samples: int | None, lanes: int) -> Plan:
    """Turn samples or epochs into steps.

    Raises:
      ValueError: the data have fewer samples than one batch, or epochs are asked of data that cannot be counted.
    """
    batch = train.global_batch_size
    if num_samples is not None and num_samples < batch:
        raise ValueError(f"the data have {num_samples} samples, fewer than one batch of train.global_batch_size={batch}; "
                         f"give train.global_batch_size={max(2, num_samples // 2)} or more data")
    if train.samples is None and num_samples is None:
        raise ValueError(f"train.epochs is {train.epochs}, but the shards have no side file that says how many samples they "
                         "hold; give train.samples=... (and train.epochs=null), or write sizes.json beside them")
    samples = train.samples or round((train.epochs or 0) * (num_samples or 0))
    total = max(1, samples // batch)
    return Plan(total, warmup_steps(schedule.warmup, total_steps=total, global_batch_size=batch), batch, num_samples, lanes)


def summary(model: ImageTextModel, plan: Plan, cost: StepCost, *, train: ContrastiveTrainConfig, schedule: ScheduleConfig,
            lr: float, shards: Sequence[Sequence[str]], world_size: int, device: str, workers: int) -> str:
    """Describe a run before its first step: model, data, schedule, expected memory and time."""
    counts = parameter_counts(model)
    lines = [
        f"model     {counts['image'] / 1e6:.2f} M image + {counts['text'] / 1e6:.2f} M text parameters, "
        f"{counts['learning'] / 1e6:.2f} M learn; {model.image_size} px, {model.tokenize.context_length} tokens",
        *run_lines(plan, cost, unit="pairs", train=train, schedule=schedule, lr=lr, shards=shards, world_size=world_size,
                   device=device, workers=workers),
    ]
    size = plan.global_batch_size
    if has_batch_statistics(model):
        lines.append("note      the model has BatchNorm: its statistics are those of one process's rows")
    elif size <= SMALL_BATCH and not train.micro_batch_size and (plan.num_samples or math.inf) >= 8 * size:
        lines.append(f"note      {size} pairs are few negatives for each; train.global_batch_size={8 * size} "
                     f"train.micro_batch_size={-(-size // world_size)} takes about the memory of this batch")
    return "\n".join(lines)


def run_lines(plan: Plan, cost: StepCost | None, *, unit: str, train: TrainConfig, schedule: ScheduleConfig, lr: float,
              shards: Sequence[Sequence[str]], world_size: int, device: str, workers: int) -> list[str]:
    """Describe data, schedule and hardware of a run of any model; `unit` is what a batch consists of ("pairs")."""
    num_shards = sum(map(len, shards))
    found = f"{plan.num_samples:,} samples" if plan.num_samples else "samples not counted"
    epochs = f", {plan.total_steps * plan.global_batch_size / plan.num_samples:.1f} epochs" if plan.num_samples else ""
    processes = f"{world_size} processes" if world_size > 1 else "one process"
    memory = f"; expects {cost.memory_gb:.2f} GB a process" if cost else ""
    time_text = f", about {duration_text(cost.seconds * plan.total_steps)}" if cost and cost.seconds else ""
    return [
        f"data      {num_shards} shards, {found}, {plan.lanes} lanes, {workers} loader workers a process",
        f"schedule  {plan.total_steps:,} steps of {plan.global_batch_size:,} {unit}{epochs}; lr {lr:g}, {schedule.name}, "
        f"{plan.warmup_steps:,} steps of warm-up",
        f"hardware  {processes} on {device}, {train.precision}{memory}{time_text}",
    ]
