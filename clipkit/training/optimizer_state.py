"""An optimizer's state as flat named tensors and JSON, and back, for any torch or timm optimizer; no pickle."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.training.sharding import copy_whole

IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")  # belong to this run's hardware, not to the saved


class OptimizerState(NamedTuple):
    """What an optimizer has gathered. `description` names every tensor of `tensors`, and holds every other value."""

    tensors: dict[str, Tensor]  # "<parameter name>.exp_avg"
    description: dict[str, Any]  # JSON: class, groups (settings and parameter names), shapes, state by parameter


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Name the optimizer's parameters, in its own order, as the state dict of the unwrapped model does.

    Raises:
      ValueError: the optimizer holds a parameter that the model has not.
    """
    names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = [index for index, parameter in enumerate(parameters) if id(parameter) not in names]
    if strangers:
        shape = list(parameters[strangers[0]].shape)
        raise ValueError(f"parameter {strangers[0]} of the optimizer, of shape {shape}, is not a parameter of the "
                         "model; build the optimizer from this model's parameters")
    return [clean_name(names[id(parameter)]) for parameter in parameters]


def unwrap(model: nn.Module) -> nn.Module:
    """Take away the wrappers of DistributedDataParallel and torch.compile: the module whose names are saved."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def clean_name(name: str) -> str:
    """A parameter's name without what torch.compile and DistributedDataParallel put into it."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")


def describe_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> OptimizerState:
    """Flatten an optimizer's state.

    Args:
      optimizer: Any torch or timm optimizer; its state may hold tensors, numbers, lists and dicts of them.
      names: A name a parameter, in the order of the optimizer's groups; see `parameter_names`.

    Raises:
      ValueError: the names are too few, too many, or not distinct.
    """
    parameters = _named_parameters(optimizer, names)
    tensors: dict[str, Tensor] = {}
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        settings = {key: _to_json(value, f"group{index}.{key}", tensors)
                    for key, value in group.items() if key != "params"}
        groups.append({"params": [by_identity[id(parameter)] for parameter in group["params"]], "settings": settings})
    state = {name: {str(key): _to_json(value, f"{name}.{key}", tensors) for key, value in optimizer.state[one].items()}
             for name, one in parameters.items() if one in optimizer.state}
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    description = {"class": type(optimizer).__name__, "groups": groups, "shapes": shapes, "state": state}
    return OptimizerState(tensors, description)


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], saved: OptimizerState) -> None:
    """Put a saved state into an optimizer of the same class over the same parameters, bit for bit.

    Tensors keep their saved dtype, go to their parameter's device, and take its memory layout where shapes agree.
    (`Optimizer.load_state_dict` would round them to the parameter's dtype.)

    Args:
      optimizer: Built by the same settings as the saved one.
      names: As for `describe_optimizer`.
      saved: `Checkpoint.optimizer`.

    Raises:
      ValueError: the class, a parameter's name or shape, or a group differs; the line names the first difference.
    """
    parameters = _named_parameters(optimizer, names)
    description = saved.description
    if description["class"] != type(optimizer).__name__:
        raise ValueError(f"the checkpoint's optimizer is {description['class']}, this run's is "
                         f"{type(optimizer).__name__}; resume with the settings that the run was started with")
    check_same_tensors({name: tuple(shape) for name, shape in description["shapes"].items()},
                       {name: tuple(parameter.shape) for name, parameter in parameters.items()}, "optimizer")
    groups = description["groups"]
    by_identity = {id(parameter): name for name, parameter in parameters.items()}
    given = [[by_identity[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    settings = {name: group["settings"] for group in groups for name in group["params"]}
    if any(settings[name] != settings[names_of_group[0]] for names_of_group in given for name in names_of_group):
        raise ValueError(f"the checkpoint's optimizer has its parameters in groups of "
                         f"{[len(group['params']) for group in groups]}, this run's in groups of "
                         f"{[len(group) for group in given]} or others; resume with the recipe of the run's start")
    optimizer.state.clear()
    for group, names_of_group in zip(optimizer.param_groups, given, strict=True):
        group.update({key: _from_json(value, saved.tensors) for key, value in settings[names_of_group[0]].items()
                      if key not in IMPLEMENTATION})
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            entries = description["state"].get(by_identity[id(parameter)])
            if entries is not None:
                optimizer.state[parameter] = {
                    key: _place(_from_json(value, saved.tensors), parameter, host=key == "step" and not on_device)
                    for key, value in entries.items()}


def check_same_tensors(saved: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse a checkpoint of another model.

    Args:
      saved: {name: shape} of the checkpoint.
      given: {name: shape} of this run.
      what: Which part of the checkpoint this is, for the message.

    Raises:
      ValueError: names or shapes differ; one line that names the first tensor that does.
    """
    for name in [*given, *(name for name in saved if name not in given)]:
        if saved.get(name) != given.get(name):
            there = f"has shape {list(saved[name])}" if name in saved else "is missing"
            here = f"shape {list(given[name])}" if name in given else "no such tensor"
            raise ValueError(f"this is a checkpoint of another model: in its {what} tensors, {name} {there}, and the "
                             f"model of this run has {here}; resume with the same model, or choose another run name")


def _named_parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(names) != len(parameters) or len(set(names)) != len(names):
        raise ValueError(f"got {len(names)} names ({len(set(names))} distinct) for the {len(parameters)} parameters of "
                         "the optimizer; give one distinct name a parameter, in its order")
    return dict(zip(names, parameters, strict=True))


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Plain values pass; a tensor goes to `tensors` under `name` and leaves {"tensor": name}."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        items = [_to_json(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        return {"dict": {str(key): _to_json(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"the optimizer's state {name} is of {type(value)}, which has no place in a checkpoint; allowed "
                     "are tensors, numbers, texts, None, and lists and dicts of them")


def _from_json(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        if content not in tensors:
            raise ValueError(f"the checkpoint's optimizer lacks the tensor {content}; use an older checkpoint")
        return tensors[content].clone()
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in content.items()}
    items = [_from_json(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _place(value: Any, parameter: Tensor, host: bool) -> Any:
    """Move state to its parameter. A plain optimizer's step count stays on the host, as torch has it."""
    if isinstance(value, (list, tuple)):
        return type(value)(_place(item, parameter, host) for item in value)
    if isinstance(value, dict):
        return {key: _place(item, parameter, host) for key, item in value.items()}
    if not isinstance(value, Tensor) or host:
        return value
    if value.shape == parameter.shape:
        placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        copy_whole(value, placed)
        return placed
    return value.to(parameter.device)
