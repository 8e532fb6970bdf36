"""Read weights and configurations of unknown origin: no code of theirs runs, and no size is taken on trust."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_CONFIG_BYTES = 2**24  # of a configuration, or of an index of weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code from it (safetensors, or torch's weights_only).

    Raises:
      ValueError: the file is damaged, or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
            raise RuntimeError("its parts are compressed, which torch does not do, and may expand to any size")
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        return {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name} holds more than tensors and is not read, as that could run its code; convert it to "
                         "safetensors") from error
    except (SafetensorError, RuntimeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); copy or fetch it again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
      ValueError: it is no JSON object, or larger than any configuration.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable configuration ({error}); copy or fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no readable configuration (a {type(found).__name__}, not an object); copy or fetch it "
                         "again")
    return found
