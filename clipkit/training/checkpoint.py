"""The checkpoints of a run folder: safetensors, state.json and a manifest; whole or not there. No pickle anywhere."""

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.training.atomic_files import remove_quietly, write_text_atomically
from clipkit.training.checkpoint_folders import STEP_FOLDER, remove_leftovers, step_folders, unfinished_checkpoint
from clipkit.training.manifest import find_damage
from clipkit.training.optimizer_state import OptimizerState, check_same_tensors, clean_name, unwrap
from clipkit.training.sharded_checkpoint import has_parts, read_whole
from clipkit.training.sharding import copy_whole

FORMAT = 1
DAMAGED = "damaged-"
STATE_FIELDS = ("format", "step", "world_size", "versions", "state", "optimizer")
RANDOM_NAME = re.compile(r"rank(\d+)\.(.+)")


class Checkpoint(NamedTuple):
    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerState | None
    ema: dict[str, Tensor] | None
    state: dict[str, Any]  # what the caller gave to save_checkpoint
    random_states: list[dict[str, Tensor]]  # one a rank of the run that saved
    world_size: int
    versions: dict[str, str]
    in_parts: bool = False  # written by several processes, each its own parts


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is not what its manifest says; the text names the file."""


def save_checkpoint(run_dir: Path | str, *, step: int, model_state: Mapping[str, Tensor],
                    optimizer: OptimizerState | None = None, ema_state: Mapping[str, Tensor] | None = None,
                    state: Mapping[str, Any] | None = None, random_states: Sequence[Mapping[str, Tensor]] = ()) -> Path:
    """Write checkpoints/step-<step>/ and point checkpoints/latest to it. Call it on one rank only.

    Args:
      run_dir: The run folder; `checkpoints` is made in it.
      step: Optimizer steps done. A checkpoint of the same step is replaced.
      model_state: State dict of the unwrapped model (see `unwrap`, `unwrap_names`). Tied tensors may be in it twice.
      optimizer: What `optimizer_state.describe_optimizer` gave.
      ema_state: The averaged weights, by the same names as `model_state`.
      state: JSON-able: position of every lane, counters, what probes chose. Comes back as JSON does (lists for tuples).
      random_states: What `get_random_state` gave on each rank, in the order of ranks; their number is recorded as the
        world size.

    Returns:
      The folder of the checkpoint.

    Raises:
      OSError: the disk is full, or the folder cannot be written; one line. Older checkpoints stay as they are.
      TypeError: `state` is not JSON-able.
    """
    text = state_text(step, optimizer=optimizer and optimizer.description, state=state, world_size=len(random_states))
    tensors = {"model": model_state, "optimizer": optimizer and optimizer.tensors, "ema": ema_state}
    with unfinished_checkpoint(Path(run_dir), step) as folder:
        for name, named in tensors.items():
            if named is not None:
                write_tensors(folder / f"{name}.safetensors", named)
        write_rest(folder, text, random_states)
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def state_text(step: int, *, optimizer: Mapping[str, Any] | None, state: Mapping[str, Any] | None, world_size: int) -> str:
    """What state.json holds. `optimizer` is the description of its state; the others are as of `save_checkpoint`."""
    record = {"format": FORMAT, "step": step, "world_size": max(1, world_size), "versions": _versions(),
              "state": dict(state or {}), "optimizer": optimizer}
    return json.dumps(record, indent=1, default=_refuse_json)


def write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # Copies: safetensors takes contiguous tensors only, and no two in one storage (tied weights are written twice).
    copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in named.items()}
    save_file(copies, path, metadata={"format": "pt"})


def write_rest(folder: Path, text: str, random_states: Sequence[Mapping[str, Tensor]]) -> None:
    """Write what is not shared out of a checkpoint, the last of its files."""
    state_file = folder / "state.json"
    state_file.write_text(text, encoding="utf-8")
    if random_states:
        write_tensors(folder / "random.safetensors", {f"rank{rank}.{name}": tensor for rank, one in enumerate(random_states)
                                                      for name, tensor in one.items()})
    for path in folder.glob("*.safetensors"):
        path.chmod(state_file.stat().st_mode)  # safetensors writes 0600, whatever the umask


def load_checkpoint(folder: Path | str, *, verify: bool = True, leave_parts: bool = False) -> Checkpoint:
    """Read a checkpoint to the CPU, also one that several processes wrote in parts.

    Args:
      folder: A checkpoint folder, or a run folder: then its newest whole checkpoint.
      verify: Compare every file with the manifest first. Leave it out only for what was just verified.
      leave_parts: Of a checkpoint in parts, leave the tensors where they are (`in_parts`): `sharded_checkpoint.read_parts`
        reads each process's own.

    Raises:
      FileNotFoundError: there is no checkpoint there.
      DamagedCheckpointError: a file is missing or differs from the manifest.
    """
    folder = Path(folder)
    if not STEP_FOLDER.fullmatch(folder.name) and not (folder / "manifest.json").exists():
        run_dir = folder
        whole = (one for _, one in step_folders(run_dir) if _damage(one) is None)
        folder = next(whole, folder)
        if folder == run_dir:
            raise FileNotFoundError(f"{run_dir} has no whole checkpoint; give a run folder (with checkpoints/step-...) "
                                    "or one of its checkpoints/step-... folders")
    elif not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {folder}; give a checkpoints/step-... folder of a run")
    elif verify and (fault := _damage(folder)):
        raise DamagedCheckpointError(f"the checkpoint {folder} is damaged: {fault}; use an older one")
    record = _read_state(folder)
    if record["format"] != FORMAT:
        raise ValueError(f"the checkpoint {folder} has format {record['format']}, this clipkit reads {FORMAT}; use the "
                         f"clipkit that wrote it ({record['versions'].get('clipkit')})")
    tensors: dict[str, dict[str, Tensor] | None] = {
        name: _read_tensors(folder / f"{name}.safetensors") if (folder / f"{name}.safetensors").exists() else None
        for name in ("model", "optimizer", "ema", "random")}
    in_parts = has_parts(folder)
    if in_parts and not leave_parts:
        for name, tensor in read_whole(folder).items():
            kind, _, own_name = name.partition(".")
            if kind in ("model", "optimizer", "ema"):
                tensors[kind] = {**(tensors[kind] or {}), own_name: tensor}
    description = record["optimizer"]
    return Checkpoint(
        path=folder, step=record["step"], model=tensors["model"] or {},
        optimizer=None if description is None else OptimizerState(tensors["optimizer"] or {}, description),
        ema=tensors["ema"], state=record["state"], random_states=_split_by_rank(tensors["random"] or {}),
        world_size=record["world_size"], versions=record["versions"], in_parts=in_parts)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        missing = [name for name in STATE_FIELDS if name not in record]
        if not missing and isinstance(record["state"], dict):
            return record
        cause = f"it lacks {', '.join(missing)}" if missing else "its state is no object"
    except (ValueError, TypeError, RecursionError) as error:
        cause = str(error)
    raise DamagedCheckpointError(f"the checkpoint {folder} is damaged: state.json is not readable ({cause}); use an older one")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"the checkpoint {path.parent} is damaged: {path.name} is not readable ({error}); use an "
                                     "older one") from error


def restore_model(model: nn.Module, saved: Mapping[str, Tensor], what: str = "model") -> None:
    """Copy saved weights into a model, wrapped or not, in place.

    Raises:
      ValueError: a name or shape differs (a checkpoint of another model); the line names the first.
    """
    own = unwrap_names(unwrap(model).state_dict())
    check_same_tensors({name: tuple(tensor.shape) for name, tensor in saved.items()},
                       {name: tuple(tensor.shape) for name, tensor in own.items()}, what)
    with torch.no_grad():
        for name, tensor in own.items():
            copy_whole(saved[name], tensor)


def unwrap_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name a state dict's tensors as the module without DDP and torch.compile does."""
    return {clean_name(name): tensor for name, tensor in state.items()}


def latest_good_checkpoint(run_dir: Path | str, warn: Callable[[str], None]) -> Path | None:
    """Find the newest whole checkpoint of a run that is about to go on, and tidy up. Call it on one rank only.

    Leftovers of saves that were cut off are removed. A damaged checkpoint is named to `warn` in one line, renamed to
    damaged-step-... and left out.

    Returns:
      The checkpoint's folder, or None if the run has none yet.

    Raises:
      ValueError: there are checkpoints, and all are damaged.
    """
    run_dir = Path(run_dir)
    remove_leftovers(run_dir / "checkpoints")
    faults: dict[Path, str] = {}
    for _, folder in step_folders(run_dir):
        fault = _damage(folder)
        if fault is None:
            for bad, reason in faults.items():
                aside = bad.with_name(DAMAGED + bad.name)
                remove_quietly(aside)
                bad.rename(aside)
                warn(f"the checkpoint {bad.name} is damaged ({reason}) and left aside as {aside}; "
                     f"the run goes on from {folder.name}")
            if faults:
                write_text_atomically(folder.parent / "latest", folder.name + "\n")
            return folder
        faults[folder] = fault
    if faults:
        raise ValueError(f"all {len(faults)} checkpoints in {run_dir / 'checkpoints'} are damaged "
                         f"({'; '.join(f'{bad.name}: {reason}' for bad, reason in faults.items())}); remove that "
                         "folder to start the run from its first step, or choose another name")
    return None


def _damage(folder: Path) -> str | None:
    return find_damage(folder, ("state.json",) if has_parts(folder) else ("state.json", "model.safetensors"))


def _split_by_rank(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    matches = [(match, tensor) for name, tensor in tensors.items() if (match := RANDOM_NAME.fullmatch(name))]
    ranks = {int(match.group(1)) for match, _ in matches}
    return [{match.group(2): tensor for match, tensor in matches if int(match.group(1)) == rank}
            for rank in sorted(ranks)]


def _versions() -> dict[str, str]:
    try:
        clipkit_version = metadata.version("clipkit-vl")
    except metadata.PackageNotFoundError:
        clipkit_version = "unknown"
    return {"clipkit": clipkit_version, "torch": torch.__version__, "python": platform.python_version()}


def _refuse_json(value: Any) -> Any:
    raise TypeError(f"state holds {value!r} of {type(value)}; give numbers, texts, lists and dicts (tensors: as "
                    "model_state or random_states)")
