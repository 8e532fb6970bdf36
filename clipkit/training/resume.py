"""Save where a run stands, and take it up there again: weights, optimizer, average, random states, position in the data."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.data.loader import TrainLoader, merge_states
from clipkit.model.folder import save_model_folder
from clipkit.model.image_text import ImageTextModel
from clipkit.training.average import WeightAverage
from clipkit.training.background import BackgroundWriter, copies_on_host
from clipkit.training.checkpoint import (
    Checkpoint,
    latest_good_checkpoint,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    state_text,
    unwrap_names,
    write_rest,
)
from clipkit.training.checkpoint_folders import prune_checkpoints, unfinished_checkpoint
from clipkit.training.distributed import Process, from_main, gather_objects, on_main
from clipkit.training.mirror import copy_in, copy_out
from clipkit.training.optimizer_state import (
    OptimizerState,
    check_same_tensors,
    describe_optimizer,
    parameter_names,
    restore_optimizer,
)
from clipkit.training.random_state import get_random_state, set_random_state
from clipkit.training.run_folder import Run, open_run_folder
from clipkit.training.sharded_checkpoint import describe_parts, read_parts, room_for_state, with_kinds, write_parts
from clipkit.training.sharding import copy_whole, is_sharded, whole_tensors


def open_run(runs_dir: str, name: str, *, config: Mapping[str, Any], identity: Mapping[str, Any],
             process: Process, mirror: str | None = None) -> tuple[Run | None, Checkpoint | None]:
    """Open a run's folder and read its newest whole checkpoint, that of `mirror` if it is newer. Rank 0 looks, all ranks read.

    Returns:
      The run with its lock (on rank 0, else None), and the checkpoint, or None if there is none yet.

    Raises:
      ValueError: the run was started with other settings, another process writes it, or all checkpoints are damaged.
      OSError: the folder cannot be written.
    """
    run, found, error = None, None, None
    if process.is_main:
        try:
            if mirror:
                copy_in(Path(runs_dir) / name, mirror, lambda text: print(f"warning: {text}", flush=True))
            run = open_run_folder(runs_dir, name, config=config, identity=identity)
            found = latest_good_checkpoint(run.path, lambda text: print(f"warning: {text}", flush=True))
        except (ValueError, OSError) as caught:
            error = str(caught)  # told to all, so that no rank waits for rank 0
    found, error = from_main((found, error))
    if error:
        raise ValueError(error)
    return run, load_checkpoint(found, verify=False, leave_parts=True) if found else None


def check_shards(saved: Checkpoint, shards: Sequence[str]) -> None:
    """Raise ValueError if the run was trained on other shards (compared by name)."""
    if saved.state["shards"] != [Path(shard).name for shard in shards]:
        raise ValueError(f"the run was trained on {len(saved.state['shards'])} shards, data.train names {len(shards)} or "
                         "others now; give the same shards, or another name")


def save_run(run_dir: Path, step: int, *, model: nn.Module, optimizer: torch.optim.Optimizer,
             average: WeightAverage | None, loader: TrainLoader, shards: Sequence[str], process: Process, keep: int,
             keep_every_steps: int | None, writer: BackgroundWriter | None = None, mirror: str | None = None,
             keeps_model: bool = True) -> None:
    """Write a checkpoint, renew a CLIP's model folder (with keeps_model), drop old checkpoints. All ranks call it.

    Rank 0 writes; of weights that are shared out, every rank its own parts. Arguments as in `take_up`. With a `writer`,
    copies are written beside the training that goes on, after the checkpoint before is done.

    Raises:
      OSError: it, or with a writer the one before, cannot be written; one line, on all ranks.
    """
    random_states = gather_objects(get_random_state(process.device))
    position = merge_states(gather_objects(loader.state()))
    module = saved_module(model)
    described = describe_optimizer(optimizer, parameter_names(optimizer, module))
    state = {"loader": position, "shards": [Path(shard).name for shard in shards], "threads": torch.get_num_threads()}
    in_parts = any(map(is_sharded, module.parameters()))
    copied = copies_on_host if writer and (in_parts or process.is_main) else dict
    if writer:
        writer.wait()
    weights, averaged = copied(module.state_dict()), copied(average.weights) if average else None
    described = described._replace(tensors=copied(described.tensors))
    whole = whole_tensors(average.weights if average else module.state_dict()) if in_parts else averaged or weights

    def write() -> None:
        group = writer.group if writer else None
        content: dict[str, Any] = {"step": step, "model_state": weights, "optimizer": described, "ema_state": averaged,
                                 "state": state, "random_states": random_states}
        if in_parts:
            save_in_parts(run_dir, **content, group=group)
        else:
            on_main(lambda: save_checkpoint(run_dir, **content), group)

        def tidy_up() -> None:
            if isinstance(model, ImageTextModel) and keeps_model:
                save_model_folder(model, run_dir / "model", whole)
            prune_checkpoints(run_dir, keep, keep_every_steps)
            if mirror:
                mirror_quietly(run_dir, mirror)

        on_main(tidy_up, group)

    if writer:
        writer.start(write)
    else:
        write()


def mirror_quietly(run_dir: Path, mirror: str) -> None:
    """Copy the newest checkpoint to the mirror; a store that fails is told, and training goes on: the disk has it."""
    try:
        copy_out(run_dir, mirror)
    except Exception as error:  # fsspec's backends raise classes of their own
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"warning: the newest checkpoint is not copied to {mirror} ({cause}); the next one is tried again", flush=True)


def save_in_parts(run_dir: Path, *, step: int, model_state: Mapping[str, Tensor], optimizer: OptimizerState,
                  ema_state: Mapping[str, Tensor] | None, state: Mapping[str, Any],
                  random_states: Sequence[Mapping[str, Tensor]], group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint of which every process writes its own parts; all call it.

    Arguments as of `save_checkpoint`; `group`: of all processes, over which they agree; None = the default one.
    """
    text = state_text(step, optimizer=optimizer.description, state=state, world_size=len(random_states))
    with contextlib.ExitStack() as finished:
        folder = from_main(on_main(lambda: finished.enter_context(unfinished_checkpoint(run_dir, step)), group), group)
        write_parts(folder, with_kinds({"model": model_state, "optimizer": optimizer.tensors, "ema": ema_state}), group)

        def complete() -> None:
            write_rest(folder, text, random_states)
            finished.pop_all().close()

        on_main(complete, group)


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
    names = parameter_names(optimizer, module)
    if saved.in_parts:
        saved = read_own_parts(saved, module, optimizer, average)
    restore_model(module, saved.model)
    assert saved.optimizer is not None
    restore_optimizer(optimizer, names, saved.optimizer)
    if average:
        for name, tensor in (saved.ema or {}).items():
            copy_whole(tensor, average.weights[name])
    if saved.world_size == process.world_size:
        set_random_state(saved.random_states[process.rank], process.device)
    else:
        torch.manual_seed(saved.step * process.world_size + process.rank)


def read_own_parts(saved: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer,
                   average: WeightAverage | None) -> Checkpoint:
    """Read a checkpoint in parts: of each tensor what this process holds of it. Arguments as of `take_up`."""
    assert saved.optimizer is not None
    described = describe_parts(saved.path)
    own = unwrap_names(module.state_dict())
    in_model = {name: shape for name, (shape, _) in described.items() if name.startswith("model.")}
    check_same_tensors({name.removeprefix("model."): shape for name, shape in in_model.items()},
                       {name: tuple(tensor.shape) for name, tensor in own.items()}, "model")
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip(parameter_names(optimizer, module), learned, strict=True))
    state = room_for_state(described, saved.optimizer.description, parameters)
    weights = {name: torch.empty_like(tensor) for name, tensor in own.items()}
    averaged = {name: torch.empty_like(tensor) for name, tensor in average.weights.items()
                if f"ema.{name}" in described} if average else {}
    read_parts(saved.path, with_kinds({"model": weights, "optimizer": state.tensors, "ema": averaged}))
    return saved._replace(model=weights, optimizer=state, ema=averaged)


def saved_module(model: nn.Module) -> nn.Module:
    """The module whose weights a checkpoint holds: of a CLIP the towers, under open_clip's names."""
    return model.towers if isinstance(model, ImageTextModel) else model
