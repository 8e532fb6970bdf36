"""One module as one ONNX file, compared with ONNX Runtime before it is put in place. It knows no models."""

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.training.atomic_files import fsync_file, fsync_folder, one_line_os_error

OPSET = 20  # the first with GELU as one operator; ONNX Runtime reads it since 1.17


def write_onnx(module: nn.Module, examples: Sequence[Tensor], path: Path, *, input_name: str, output_name: str,
               dynamic: Mapping[int, str], metadata: Mapping[str, str] | None = None, atol: float = 1e-4) -> float:
    """Write a module of one tensor as an ONNX file, whole or not at all.

    Args:
      module: In eval mode, fp32, on the CPU; it takes one tensor and returns one.
      examples: The first is traced (each of its dynamic axes is 2 or more long); all are compared.
      path: The file; its folder exists. Weights beyond 2 GB go to `<name>.data` beside it.
      input_name: The input's name in the file.
      output_name: The output's name in the file.
      dynamic: Axis of the input -> its name in the file, such as {0: "batch"}.
      metadata: Texts that the file carries.
      atol: Greatest allowed absolute difference.

    Returns:
      The greatest absolute difference found over the examples.

    Raises:
      ValueError: a package is missing, or ONNX Runtime gives other values than the module.
      OSError: the file cannot be written; one line.
    """
    onnx = _require_onnx()
    program = _export(module, examples[0], input_name, output_name, dynamic)
    program.model.metadata_props.update(metadata or {})
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            program.save(draft)  # one file, and beyond 2 GB (protobuf's end) the weights in a second one
            onnx.checker.check_model(str(draft))
            greatest = compare_with_onnx(module, examples, draft, atol=atol)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):  # the file that names the others last
                fsync_file(file)
                os.replace(file, path.with_name(file.name))
        fsync_folder(path.parent)
    except OSError as error:
        raise one_line_os_error(error, path) from error
    return greatest


def compare_with_onnx(module: nn.Module, examples: Sequence[Tensor], path: Path, *, atol: float) -> float:
    """Return the greatest absolute difference between a module and its ONNX file.

    Raises:
      ValueError: it is more than `atol`, or the shapes differ; says for which example.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    greatest = 0.0
    for example in examples:
        with torch.no_grad():
            wanted = module(example)
        found = torch.from_numpy(session.run(None, {name: example.numpy()})[0])
        difference = (found - wanted).abs().max().item() if found.shape == wanted.shape else float("inf")
        if not difference <= atol:  # also where it is NaN
            raise ValueError(f"{path.name} was not written: for the input {tuple(example.shape)} ONNX Runtime gives "
                             f"{tuple(found.shape)} with a difference of {difference:.2g} to torch's {tuple(wanted.shape)}; "
                             f"{atol:g} is allowed")
        greatest = max(greatest, difference)
    return greatest


def _export(module: nn.Module, example: Tensor, input_name: str, output_name: str, dynamic: Mapping[int, str]) -> Any:
    with warnings.catch_warnings():  # the exporter warns of its own and its libraries' future changes
        warnings.simplefilter("ignore")
        return torch.onnx.export(module, (example,), dynamo=True, opset_version=OPSET, input_names=[input_name],
                                 output_names=[output_name], dynamic_shapes=(dict(dynamic),), verbose=False)


def _require_onnx() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'ONNX files need three packages more ({error}): pip install "clipkit-vl[export]"') from error
    return onnx
