"""A zero-shot classifier in files: its weights with the names of the classes, and ONNX for other runtimes."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from clipkit.interop.onnx_file import write_onnx
from clipkit.training.atomic_files import write_bytes_atomically

if TYPE_CHECKING:
    from clipkit.evaluation.classifier import ZeroShotClassifier

FORMAT = "clipkit zero-shot classifier"  # in the metadata: says what a file of two tensors is
TOLERANCE = 1e-4  # between PyTorch and ONNX Runtime


class SavedClassifier(NamedTuple):
    """What a classifier is without its model. Legend: C classes, D embed_dim."""

    weight: Tensor  # (C, D) unit norm
    logit_scale: Tensor  # scalar > 0, 1/temperature
    classes: tuple[str, ...]  # C
    templates: tuple[str, ...]  # the name of a set, or texts
    source_sha256: str | None  # of the weights that encoded the texts


def write_classifier(path: Path, saved: SavedClassifier) -> None:
    """Write a classifier as safetensors: two tensors, all else as metadata. The folder is made if missing.

    Raises:
      OSError: the file cannot be written (an older one stays).
    """
    from safetensors.torch import save

    tensors = {"weight": saved.weight, "logit_scale": saved.logit_scale}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, save(plain, {"format": "pt", "kind": FORMAT, **_texts(saved)}))


def read_classifier(path: Path) -> SavedClassifier:
    """Read what `write_classifier` wrote, to the CPU.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no classifier at {path} (that is {path.absolute()}); classifier.save writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != FORMAT:
                raise ValueError(f"{path} is no zero-shot classifier (it holds {', '.join(sorted(file.keys())[:5])}); give a "
                                 "file that classifier.save wrote")
            weight, logit_scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
            classes = tuple(json.loads(metadata["classes"]))
            templates = tuple(json.loads(metadata["templates"]))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a classifier ({type(error).__name__}: {error}); save it anew") from error
    if len(classes) != len(weight):
        raise ValueError(f"{path} names {len(classes)} classes and holds {len(weight)} weights; save it anew")
    return SavedClassifier(weight, logit_scale, classes, templates, metadata.get("source_sha256"))


def export_classifier(classifier: "ZeroShotClassifier", path: Path) -> None:
    """Write a classifier as ONNX, any number of images at once, checked in ONNX Runtime before it is put in place.

    With its model the file takes `images` (N, 3, H, W), preprocessed floats, and gives `probabilities` (N, C); without, it
    takes `image_features` (N, D), unit norm, and gives `logits` (N, C). Classes, templates and preprocessing are in the
    file's metadata.

    Args:
      classifier: left as it is.
      path: the file; its folder is made if missing.

    Raises:
      ValueError: a package is missing, or ONNX Runtime finds other numbers.
      OSError: the file cannot be written.
    """
    on_cpu = copy.deepcopy(classifier).cpu().eval()
    model, metadata = on_cpu.model, _texts(SavedClassifier(on_cpu.weight, on_cpu.logit_scale, on_cpu.classes,
                                                           on_cpu.templates, on_cpu.source_sha256))
    generator = torch.Generator().manual_seed(0)
    if model is None:
        scorer, names, shape = _Scorer(on_cpu), ("image_features", "logits"), (on_cpu.weight.shape[1],)
    else:
        scorer, names, shape = on_cpu, ("images", "probabilities"), (3, model.image_size, model.image_size)
        metadata["preprocess_cfg"] = json.dumps(model.config["preprocess_cfg"])
    examples = [torch.randn(number, *shape, generator=generator) for number in (2, 1, 3)]  # each (N, 3, H, W) or (N, D)
    if model is None:
        examples = [nn.functional.normalize(example, dim=-1) for example in examples]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_onnx(scorer, examples, path, input_name=names[0], output_name=names[1], dynamic={0: "batch"}, metadata=metadata,
               atol=TOLERANCE if model is None else _probability_tolerance(scorer, examples))


class _Scorer(nn.Module):
    """The classifier without its images: what has to be exported where there is no model."""

    def __init__(self, classifier: "ZeroShotClassifier") -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image_features: Tensor) -> Tensor:
        return self.classifier.logits(image_features)


@torch.no_grad()
def _probability_tolerance(classifier: nn.Module, images: list[Tensor]) -> float:
    """Among many classes any probability is below TOLERANCE: a hundredth of the likeliest one's is asked for too."""
    return min(TOLERANCE, *(0.01 * classifier(batch).amax(dim=1).min().item() for batch in images))


def _texts(saved: SavedClassifier) -> dict[str, str]:
    """The metadata: texts, as safetensors and ONNX want them."""
    lists = {"classes": saved.classes, "templates": saved.templates}
    texts = {name: json.dumps(values, ensure_ascii=False) for name, values in lists.items()}
    return {**texts, "source_sha256": saved.source_sha256} if saved.source_sha256 else texts
