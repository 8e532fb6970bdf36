"""Weights shared out over the processes (FSDP2; hybrid: HSDP), from outside the model. Nothing here is read by a model.

The temperature and SigLIP's bias are scalars, which cannot be shared out: every process has them, and averages their gradients.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipkit.training.distributed import Process

Module = TypeVar("Module", bound=nn.Module)

SHARDS, COPIES = "shards", "copies"  # dimensions of the mesh of processes
CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def shard_model(model: nn.Module, process: Process, *, strategy: str, processes_per_copy: int | None = None,
                reshard_after_forward: bool = True, gather_bf16: bool = False) -> None:
    """Share a model's weights out, in place: its blocks one by one, all else together.

    A block's weights are whole only while it computes. Gradients and the optimizer's state are shared out as the weights are.

    Args:
      model: On its device, the same on all processes, before its optimizer is made. It has to be called itself (model(...)).
      process: This one.
      strategy: "fsdp" shares them out over all processes; "hsdp" over groups of `processes_per_copy` neighbours, each group
        with a copy of its own, so that only gradients travel between groups.
      processes_per_copy: Of "hsdp"; None = the processes of a machine.
      reshard_after_forward: Give a block's weights back between its forward and its backward pass; False trades memory for a
        third less traffic.
      gather_bf16: Gather weights as bfloat16, and sum gradients in fp32. Autocast rounds matrices so anyhow; this rounds norms
        and embeddings too.

    Raises:
      ValueError: processes_per_copy does not divide the processes, or gather_bf16 is asked for on a CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = (process.world_size,), (SHARDS,)
    if strategy == "hsdp":
        size = processes_per_copy or process.local_world_size
        if process.world_size % size:
            raise ValueError(f"parallel.processes_per_copy is {size}, and there are {process.world_size} processes; give a "
                             "number that divides them")
        shape, names = (process.world_size // size, size), (COPIES, SHARDS)
    mesh = init_device_mesh(process.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if gather_bf16 and process.device.type == "cpu":
        raise ValueError("parallel.gather_bf16 is true, and the device is the CPU, whose norms take one dtype; set it to false")
    if gather_bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other, such as channels_last kernels
    for block in blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=scalars)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model: what its outermost lists, and sequences of modules of one class, hold."""
    for child in module.children():
        inner = list(child.children())
        alike = len(inner) > 1 and len(set(map(type, inner))) == 1 and any(True for _ in child.parameters())
        if isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and alike):
            yield from inner
        else:
            yield from blocks(child)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor; its module is imported by those who make one


def own_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor; it shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [own_part(tensor) for tensor in tensors]


def copy_whole(whole: Tensor, into: Any) -> None:
    """Copy a whole tensor, which every process has, or one shared out alike, into one that may be shared out."""
    if is_sharded(into) and not is_sharded(whole):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(whole)


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather copies of tensors, whole, on all processes. All processes call it."""
    gathered: dict[str, Any] = dict(tensors)
    return {name: tensor.full_tensor() if is_sharded(tensor) else tensor.detach().clone() for name, tensor in gathered.items()}


def average_scalars(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of what is not shared out over the processes, in one message; the others are averaged already."""
    import torch.distributed as dist

    if not any(map(is_sharded, parameters)):
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None and not is_sharded(parameter)]
    if grads:
        together = torch.stack(grads)
        dist.all_reduce(together)
        for grad, mean in zip(grads, together / dist.get_world_size(), strict=True):
            grad.copy_(mean)


def clip_sharded_gradient(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """As `optim.clip_gradient`, of weights of which some are shared out: each part counts once in the norm.

    Returns:
      Scalar, the norm of the whole gradient before it was scaled; the same on all processes.
    """
    import torch.distributed as dist

    shared_out: Any = next(parameter for parameter in parameters if is_sharded(parameter))
    grads: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    square = nn.utils.get_total_norm(own_parts(filter(is_sharded, grads))).square()  # scalar, of this process's parts
    dist.all_reduce(square, group=shared_out.device_mesh.get_group(SHARDS))
    norm = (square + nn.utils.get_total_norm([grad for grad in grads if not is_sharded(grad)]).square()).sqrt()
    if max_norm is not None:
        factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(own_parts(grads), factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def blueprint(model: Module) -> Module:
    """Copy a model without its weights, before it is shared out: `rebuild` makes a whole model of it."""
    weights = {id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
               for parameter in model.parameters()}
    return copy.deepcopy(model, weights)  # deepcopy takes what it is given for a copy that was made already
