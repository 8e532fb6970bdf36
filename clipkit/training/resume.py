"""Save where a run stands, and take it up there again: weights, optimizer, average, random states, position in the data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipkit.data.loader import TrainLoader, merge_states
from clipkit.model.folder import save_model_folder
from clipkit.model.image_text import ImageTextModel
from clipkit.training.average import WeightAverage
from clipkit.training.checkpoint import (
    Checkpoint,
    latest_good_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    restore_model,
    save_checkpoint,
)
from clipkit.training.distributed import Process, from_main, gather_objects, wait_for_all
from clipkit.training.optimizer_state import parameter_names, restore_optimizer
from clipkit.training.random_state import get_random_state, set_random_state
from clipkit.training.run_folder import Run, open_run_folder


def open_run(runs_dir: str, name: str, *, config: Mapping[str, Any], identity: Mapping[str, Any],
             process: Process) -> tuple[Run | None, Checkpoint | None]:
    """Open a run's folder and read its newest whole checkpoint. Rank 0 looks, all ranks read.

    Returns:
      The run with its lock (on rank 0, else None), and the checkpoint, or None if there is none yet.

    Raises:
      ValueError: the run was started with other settings, another process writes it, or all checkpoints are damaged.
      OSError: the folder cannot be written.
    """
    run, found, error = None, None, None
    if process.is_main:
        try:
            run = open_run_folder(runs_dir, name, config=config, identity=identity)
            found = latest_good_checkpoint(run.path, lambda text: print(f"warning: {text}", flush=True))
        except (ValueError, OSError) as caught:
            error = str(caught)  # told to all, so that no rank waits for rank 0
    found, error = from_main((found, error))
    if error:
        raise ValueError(error)
    return run, load_checkpoint(found, verify=False) if found else None


def check_shards(saved: Checkpoint, shards: Sequence[str]) -> None:
    """Raise ValueError if the run was trained on other shards (compared by name)."""
    if saved.state["shards"] != [Path(shard).name for shard in shards]:
        raise ValueError(f"the run was trained on {len(saved.state['shards'])} shards, data.train names {len(shards)} or "
                         "others now; give the same shards, or another name")


def save_run(run_dir: Path, step: int, *, model: nn.Module, optimizer: torch.optim.Optimizer,
             average: WeightAverage | None, loader: TrainLoader, shards: Sequence[str], process: Process, keep: int,
             keep_every_steps: int | None) -> None:
    """Write a checkpoint, renew a CLIP's model folder, drop old checkpoints. All ranks call it, rank 0 writes.

    Arguments as in `take_up`.
    """
    random_states = gather_objects(get_random_state(process.device))
    position = merge_states(gather_objects(loader.state()))
    if process.is_main:
        module = saved_module(model)
        save_checkpoint(run_dir, step=step, model_state=module.state_dict(), optimizer=optimizer,
                        parameter_names=parameter_names(optimizer, module),
                        ema_state=average.weights if average else None,
                        state={"loader": position, "shards": [Path(shard).name for shard in shards],
                               "threads": torch.get_num_threads()},
                        random_states=random_states)
        if isinstance(model, ImageTextModel):
            save_model_folder(model, run_dir / "model", average.weights if average else None)
        prune_checkpoints(run_dir, keep, keep_every_steps)
    wait_for_all()


def take_up(saved: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None,
            process: Process) -> None:
    """Put a checkpoint back. On another number of ranks the random states (dropout) begin anew from the step.

    Args:
      saved: As `open_run` gives it.
      model: An ImageTextModel, or a module with all that learns.
      optimizer: Over the model's parameters.
      average: Of the model or of a part of it.
      process: This one.

    Raises:
      ValueError: the checkpoint is of another model or optimizer; the line names the first difference.
    """
    module = saved_module(model)
    restore_model(module, saved.model)
    assert saved.optimizer is not None
    restore_optimizer(optimizer, parameter_names(optimizer, module), saved.optimizer)
    if average:
        for name, tensor in (saved.ema or {}).items():
            average.weights[name].copy_(tensor)
    if saved.world_size == process.world_size:
        set_random_state(saved.random_states[process.rank], process.device)
    else:
        torch.manual_seed(saved.step * process.world_size + process.rank)


def saved_module(model: nn.Module) -> nn.Module:
    """The module whose weights a checkpoint holds: of a CLIP the towers, under open_clip's names."""
    return model.towers if isinstance(model, ImageTextModel) else model
