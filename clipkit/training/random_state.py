"""The states of the global random generators as named tensors, so that they can be saved without pickle."""

import random

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (all devices), Python's `random` and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_random_state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read the states of torch (CPU, and `device` where it is a GPU), Python's `random` and numpy.

    Returns:
      {name: tensor}: `torch_cpu` and `torch_cuda` uint8, `python` and `numpy` int64, `python_gauss` and `numpy_gauss`
      float64 of one element, or none where no normal variate is kept back.
    """
    _, python_words, python_gauss = random.getstate()
    kind, numpy_words, position, has_gauss, numpy_gauss = np.random.get_state()
    assert kind == "MT19937"
    state = {
        "torch_cpu": torch.get_rng_state(),
        "python": torch.tensor(python_words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, numpy_words), int(position)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(numpy_gauss)] if has_gauss else [], dtype=torch.float64),
    }
    if torch.device(device).type == "cuda":
        state["torch_cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
    """Put back what `get_random_state` read. A run that moves between CPU and GPU keeps the GPU's present state.

    Raises:
      ValueError: `state` was not written by `get_random_state`.
    """
    missing = [name for name in ("torch_cpu", "python", "python_gauss", "numpy", "numpy_gauss") if name not in state]
    if missing:
        raise ValueError(f"the random state lacks {missing}; it has {sorted(state)}")
    torch.set_rng_state(state["torch_cpu"].to("cpu", torch.uint8).clone())
    python_gauss = state["python_gauss"].tolist()
    python_format = 3  # since Python 3.2
    random.setstate((python_format, tuple(state["python"].tolist()), python_gauss[0] if python_gauss else None))
    *words, position = state["numpy"].tolist()
    kept = state["numpy_gauss"].tolist()
    has_gauss, gauss = (1, float(kept[0])) if kept else (0, 0.0)
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), int(position), has_gauss, gauss))
    if torch.device(device).type == "cuda" and "torch_cuda" in state:
        torch.cuda.set_rng_state(state["torch_cuda"].to("cpu", torch.uint8).clone(), device)
