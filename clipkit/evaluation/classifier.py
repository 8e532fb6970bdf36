"""A classifier made of texts: the mean embedding of each class's prompts. Which classes and prompts: tasks.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from clipkit.evaluation.classifier_files import SavedClassifier, export_classifier, read_classifier, write_classifier
from clipkit.evaluation.random_words import random_word_templates
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.text_features import average_prompts, check_prompts, encode_texts
from clipkit.model.image_text import ImageTextModel, stack_images

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE_SETS = ("openai80", "openai7", "plain", "waffle")


class ZeroShotClassifier(nn.Module):
    """Classify images by the class text that each is nearest to.

    Attributes:
      model: encodes the images; `logits` does without it. None where a saved classifier was loaded alone.
      classes: names of the classes, C.
      weight: (C, D) unit norm, one row a class. This is what is worth saving.
      logit_scale: scalar > 0, the model's 1/temperature.
      templates: what the texts were made with: the name of a set, or texts.
      source_sha256: hash of the weights of the model that made the texts; None where they came from no file.
    """

    weight: Tensor
    logit_scale: Tensor

    def __init__(self, model: ImageTextModel | None, classes: Sequence[str], weight: Tensor, logit_scale: Tensor, *,
                 templates: Sequence[str] = (), source_sha256: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.classes = tuple(classes)
        self.templates = tuple(templates)
        self.source_sha256 = source_sha256
        self.register_buffer("weight", weight)
        self.register_buffer("logit_scale", logit_scale)

    def forward(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """Classify images.

        Args:
          images: (N, 3, H, W), uint8 of the model's size or preprocessed floats; or a list of N pictures of any size.

        Returns:
          (N, C) probabilities.

        Raises:
          ValueError: there is no model.
        """
        if self.model is None:
            raise ValueError("the classifier was loaded without a model, which images need; give load_classifier model=..., or "
                             "image features to classifier.logits")
        if not isinstance(images, Tensor):
            images = stack_images(self.model, list(images))  # (N, 3, H, W)
        return self.logits(self.model.encode_image(images)).softmax(dim=-1)

    def logits(self, image_features: Tensor) -> Tensor:
        """Score features (N, D), unit norm, against the classes. (N, C), fp32."""
        return self.logit_scale * image_features.float() @ self.weight.T

    def save(self, path: str | Path) -> None:
        """Write weight, classes, templates and scale as safetensors, whole or not at all; `load_classifier` reads it.

        Raises:
          OSError: the file cannot be written.
        """
        write_classifier(Path(path), SavedClassifier(self.weight, self.logit_scale, self.classes, self.templates,
                                                     self.source_sha256))

    def export_onnx(self, path: str | Path) -> None:
        """Write the classifier for other runtimes: see `export_classifier`."""
        export_classifier(self, Path(path))


def zero_shot_classifier(model: ImageTextModel, classes: Sequence[str], *,
                         templates: str | Sequence[str] = "openai80", batch_size: int = 256) -> ZeroShotClassifier:
    """Make a classifier out of class names.

    Args:
      model: as `clipkit.load_model` returns it.
      classes: names to put into the templates.
      templates: a set by name ("openai80", "openai7", "plain" = the bare name, "waffle" = random words), or texts with one
        {} each.
      batch_size: texts that are encoded at once.

    Raises:
      ValueError: no classes, an unknown set, or a template without {}.

    Source: Radford et al. 2021, section 3.1.4 (prompt ensembles); texts from github.com/openai/CLIP, notebooks.
    """
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes is {classes!r}; give a list of names, such as ['cat', 'dog']")
    fill = prompt_templates(templates)
    weight = class_weights(model, [[write(name) for write in fill] for name in classes], batch_size=batch_size)
    return ZeroShotClassifier(model, classes, weight, model.towers.logit_scale.detach().float().exp(),
                              templates=[templates] if isinstance(templates, str) else templates,
                              source_sha256=model.source_sha256)


def load_classifier(path: str | Path, *, model: ImageTextModel | None = None) -> ZeroShotClassifier:
    """Load what `ZeroShotClassifier.save` wrote.

    Args:
      path: the file.
      model: encodes the images, and says on which device the classifier is; None = `logits` alone, on the CPU.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or no classifier, or the model is not the one that it was made with.
    """
    saved = read_classifier(Path(path))
    device = saved.weight.device
    if model is not None:
        device, width = model.device, model.config["model_cfg"]["embed_dim"]
        hashes = {saved.source_sha256, model.source_sha256} - {None}
        if len(hashes) > 1 or saved.weight.shape[1] != width:
            raise ValueError(f"{path} was made with another model (weights {saved.source_sha256}, embed_dim "
                             f"{saved.weight.shape[1]}) than the one given (weights {model.source_sha256}, embed_dim {width}); "
                             "load the model that it was made with, or make the classifier anew")
    return ZeroShotClassifier(model, saved.classes, saved.weight.to(device), saved.logit_scale.to(device),
                              templates=saved.templates, source_sha256=saved.source_sha256)


def prompt_templates(templates: str | Sequence[str]) -> list[Callable[[str], str]]:
    """Return the functions that put a class name into each template (arguments as in `zero_shot_classifier`)."""
    if isinstance(templates, str) and "{}" not in templates:
        if templates not in TEMPLATE_SETS:
            raise ValueError(f"templates is {templates!r}; choose one of {list(TEMPLATE_SETS)}, or give texts "
                             "that hold {} where the class name goes")
        if templates == "plain":
            return [str]
        if templates == "waffle":
            return prompt_templates(random_word_templates())
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        return list(OPENAI_IMAGENET_TEMPLATES if templates == "openai80" else SIMPLE_IMAGENET_TEMPLATES)
    texts = [templates] if isinstance(templates, str) else list(templates)
    for text in texts:
        if text.count("{}") != 1:
            raise ValueError(f"template {text!r} must hold {{}} once, where the class name goes")
    if not texts:
        raise ValueError("templates is empty; give at least one text, such as 'a photo of a {}.'")
    return [lambda name, text=text: text.replace("{}", name) for text in texts]


def class_weights(model: ImageTextModel, prompts: Sequence[Sequence[str]], *, batch_size: int = 256,
                  spread: bool = False, store: EmbeddingStore | None = None) -> Tensor:
    """Embed classes: each prompt to unit norm, the mean over a class's prompts, and that to unit norm again.

    Args:
      model: encodes the texts.
      prompts: for each of C classes its texts, at least one.
      batch_size, spread, store: as in `encode_texts`.

    Returns:
      (C, D) unit norm, fp32, on the model's device. A row is the same whatever the other classes are, up to the last
      bits of the texts' features, which hang on the batches.

    Raises:
      ValueError: a class has no prompt.
    """
    texts, features = encode_prompts(model, prompts, batch_size=batch_size, spread=spread, store=store)
    return average_prompts(features, texts, prompts)


def encode_prompts(model: ImageTextModel, prompts: Sequence[Sequence[str]], *, batch_size: int = 256, spread: bool = False,
                   store: EmbeddingStore | None = None) -> tuple[list[str], Tensor]:
    """Return the distinct texts of all classes, T, and their features (T, D). Arguments as in `class_weights`."""
    check_prompts(prompts)
    distinct = list(dict.fromkeys(text for of_class in prompts for text in of_class))
    return distinct, encode_texts(model, distinct, batch_size=batch_size, spread=spread, store=store)
