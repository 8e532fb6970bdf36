"""The optimizer: which weights decay, and a step that non-finite gradients cannot spoil."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.training.sharding import clip_sharded_gradient, is_sharded


def is_decayed(name: str, parameter: Tensor, recipe: str) -> bool:
    """Tell whether weight decay applies to a parameter.

    Recipe "clipkit": matrices and kernels decay; gains, biases, temperature, class and positional embeddings do not.
    Recipe "open_clip" (open_clip_train 3.3): as there, positional embeddings do decay.
    """
    if recipe == "open_clip":
        return parameter.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
    return parameter.ndim >= 2 and not any(word in name for word in ("positional_embedding", "pos_embed", "cls_token"))


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, recipe: str,
                     lr_scales: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Split the parameters that learn into groups without and with weight decay, a pair for each learning rate.

    Of weights that are shared out over the processes, the scalars that are not get groups of their own: an optimizer's step
    over a list takes one kind of tensor.

    Args:
      named: Names and parameters.
      weight_decay: Of the groups with it.
      recipe: As in `is_decayed`.
      lr_scales: {name: what the learning rate is multiplied by}, for all names; None = one rate.
    """
    named = list(named)
    shared_out = any(is_sharded(parameter) for _, parameter in named)
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            scale, decayed = lr_scales[name] if lr_scales else 1.0, is_decayed(name, parameter, recipe)
            group = groups.setdefault((scale, decayed, shared_out and not is_sharded(parameter)), {
                "params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale})
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def make_optimizer(named: Sequence[tuple[str, nn.Parameter]], *, name: str = "adamw", recipe: str = "clipkit",
                   lr: float, weight_decay: float, beta1: float, beta2: float, eps: float,
                   lr_scales: Mapping[str, float] | None = None) -> torch.optim.Optimizer:
    """Build an optimizer: AdamW (fused), or any of torch's or timm's by name. `lr_scales` as in `parameter_groups`.

    Raises:
      ValueError: neither torch nor timm has an optimizer of that name, or it refuses these values.
    """
    groups = parameter_groups(named, weight_decay=weight_decay, recipe=recipe, lr_scales=lr_scales)
    if not groups:
        raise ValueError("nothing is left to learn: both towers are locked; unlock one (model.lock_image, model.lock_text)")
    if name.lower() == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
    torch_names = {kind.lower(): getattr(torch.optim, kind) for kind in dir(torch.optim)
                   if isinstance(getattr(torch.optim, kind), type) and kind not in ("Optimizer", "LBFGS", "SparseAdam")}
    if name.lower() in torch_names:
        return _with_known_options(torch_names[name.lower()], groups, lr=lr, betas=(beta1, beta2), eps=eps)
    import timm.optim

    timm_names: list[str] = timm.optim.list_optimizers()  # pyright: ignore[reportPrivateImportUsage,reportAssignmentType]

    if name.lower() not in timm_names:
        known = ", ".join(sorted({*torch_names, *timm_names}))
        raise ValueError(f"optim.name is {name!r}; choose one of {known}")
    return timm.optim.create_optimizer_v2(  # pyright: ignore[reportPrivateImportUsage]
        groups, opt=name.lower(), lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps)


def _with_known_options(kind: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], **options: Any,
                        ) -> torch.optim.Optimizer:
    """Call an optimizer with those of the options that it knows."""
    import inspect

    known = inspect.signature(kind).parameters
    return kind(groups, **{name: value for name, value in options.items() if name in known})


def clip_gradient(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to a norm, if one is given; return the norm that they had (scalar)."""
    if any(map(is_sharded, parameters)):
        return clip_sharded_gradient(parameters, max_norm)
    if max_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def optimizer_step(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """Update the weights, unless the gradient is not finite; gradients are dropped either way.

    The gradients are the same on all processes, so all decide alike. A fused optimizer decides on the device; for another
    the host has to wait for the norm.

    Args:
      optimizer: Its parameters carry their gradients.
      grad_norm: Scalar, norm of the whole gradient.

    Returns:
      Scalar, 1 if the step was skipped, else 0.
    """
    skipped = (~grad_norm.isfinite()).float()
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]  (read by torch's fused kernels)
        optimizer.step()
    elif not skipped.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)

