"""The zero-shot classifier against open_clip's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipkit.evaluation.classifier import ZeroShotClassifier, class_weights, prompt_templates, zero_shot_classifier

CLASSES = ["cat", "dog", "great white shark", "kite (bird of prey)"]


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)) for number in range(3)]


@pytest.mark.parametrize("templates", ["openai80", "openai7", "plain", "a photo of a {}.", ("a {}", "no {}")])
def test_weights_are_those_of_open_clip(tiny_model, templates) -> None:
    import open_clip

    theirs = {"openai80": open_clip.OPENAI_IMAGENET_TEMPLATES, "openai7": open_clip.SIMPLE_IMAGENET_TEMPLATES,
              "plain": ("{}",), "a photo of a {}.": ("a photo of a {}.",)}
    tiny_model.eval()
    expected = open_clip.build_zero_shot_classifier(
        tiny_model.towers, tokenizer=tiny_model.tokenize, classnames=CLASSES,
        templates=theirs[templates] if isinstance(templates, str) else templates)  # (D, C)
    classifier = zero_shot_classifier(tiny_model, CLASSES, templates=templates, batch_size=16)
    assert classifier.weight.shape == (4, 16)
    # 1e-6: fp32 sums over other batch shapes
    torch.testing.assert_close(classifier.weight, expected.T, atol=1e-6, rtol=0)


def test_pictures_and_preprocessed_tensors_give_the_same_probabilities(tiny_model, pictures) -> None:
    classifier = zero_shot_classifier(tiny_model.eval(), CLASSES, templates="openai7")
    assert isinstance(classifier, nn.Module)
    images = torch.stack([tiny_model.preprocess(picture) for picture in pictures])  # (3, 3, 32, 32)
    probabilities = classifier(images)
    assert probabilities.shape == (3, 4)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(classifier(pictures), probabilities, atol=0, rtol=0)


def test_logits_need_only_the_saved_weight(tiny_model, pictures) -> None:
    classifier = zero_shot_classifier(tiny_model.eval(), CLASSES, templates="plain")
    images = torch.stack([tiny_model.preprocess(picture) for picture in pictures])
    features = tiny_model.encode_image(images)
    expected = tiny_model.towers.logit_scale.exp() * features @ classifier.weight.T
    torch.testing.assert_close(classifier.logits(features), expected)
    torch.testing.assert_close(classifier(images), expected.softmax(dim=-1))
    restored = ZeroShotClassifier(tiny_model, CLASSES, classifier.weight.clone(), classifier.logit_scale.clone())
    torch.testing.assert_close(restored.logits(features), expected)


def test_the_order_of_the_classes_is_kept(tiny_model) -> None:
    forward = zero_shot_classifier(tiny_model, CLASSES, templates="plain")
    backward = zero_shot_classifier(tiny_model, CLASSES[::-1], templates="plain")
    torch.testing.assert_close(forward.weight, backward.weight.flip(0), atol=1e-6, rtol=0)
    assert forward.classes == tuple(CLASSES)


def test_classes_may_have_different_numbers_of_prompts(tiny_model) -> None:
    weight = class_weights(tiny_model, [["a cat"], ["a dog", "the dog", "a dog"]])
    texts = ("a cat", "a dog", "the dog")
    features = torch.stack([tiny_model.encode_text(tiny_model.tokenize([text]))[0] for text in texts])
    mean = (2 * features[1] + features[2]) / 3
    torch.testing.assert_close(weight, torch.stack([features[0], mean / mean.norm()]), atol=1e-6, rtol=0)


def test_braces_in_a_class_name_are_left_alone() -> None:
    assert prompt_templates("a {}.")[0]("set {x}") == "a set {x}."


@pytest.mark.parametrize(("templates", "message"), [
    ("openai", r"templates is 'openai'; choose one of \['openai80', .*, or give texts that hold \{\}"),
    (["a photo"], r"template 'a photo' must hold \{\} once"),
    ([], "templates is empty"),
])
def test_templates_that_cannot_be_filled_are_refused(tiny_model, templates, message) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_classifier(tiny_model, CLASSES, templates=templates)


@pytest.mark.parametrize("classes", [[], "cat"])
def test_classes_must_be_a_list_of_names(tiny_model, classes) -> None:
    with pytest.raises(ValueError, match=r"give a list of names, such as \['cat', 'dog'\]"):
        zero_shot_classifier(tiny_model, classes)
