"""What each template does, against classifiers made the slow way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipkit.evaluation.template_effects import has_templates, template_effects, template_names

CLASSES = ["cat", "red fox", "photo"]
TEMPLATES = ["a photo of a {}.", "{}", "no {} at all", "{}"]


@pytest.fixture
def case():
    """Features (120, 8) of pictures near their class's texts, and of the distinct texts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[template.replace("{}", name) for template in TEMPLATES] for name in CLASSES]
    texts = list(dict.fromkeys(text for of_class in prompts for text in of_class))
    features = F.normalize(torch.randn(len(texts), 8, generator=generator), dim=-1)  # (9, 8)
    labels = torch.arange(120) % 3
    means = torch.stack([features[[texts.index(text) for text in of_class]].mean(dim=0) for of_class in prompts])
    noise = torch.randn(120, 8, generator=generator)
    return F.normalize(means[labels] + 0.6 * noise, dim=-1), labels, features, texts, prompts


def slow_accuracy(case, places: list[int]) -> float:
    image_features, labels, features, texts, prompts = case
    right = 0
    for image, label in zip(image_features, labels.tolist(), strict=True):
        scores = []
        for of_class in prompts:
            mean = sum(features[texts.index(of_class[place])] for place in places) / len(places)
            scores.append(float(image @ (mean / mean.norm())))
        right += int(np.argmax(scores)) == label
    return right / len(labels)


def test_each_template_alone_and_all_but_each_are_the_classifiers_made_by_hand(case) -> None:
    found = template_effects(*case, CLASSES)
    assert len(found) == 4 and found["n"].eq(120).all()
    assert found["without_difference"].is_monotonic_increasing
    whole = slow_accuracy(case, [0, 1, 2, 3])
    by_name = {"a photo of a {}.": [0], "{}": [1, 3], "no {} at all": [2]}
    for row in found.to_dict("records"):
        place = by_name[row["template"]][0]
        assert row["acc1_whole"] == whole
        assert row["acc1_alone"] == slow_accuracy(case, [place])
        assert row["acc1_without"] == slow_accuracy(case, [other for other in range(4) if other != place])
        for difference, value in (("alone", "acc1_alone"), ("without", "acc1_without")):
            assert row[f"{difference}_difference"] == pytest.approx(row[value] - whole, abs=1e-12)
            low, high = row[f"{difference}_difference_ci_low"], row[f"{difference}_difference_ci_high"]
            assert low <= row[f"{difference}_difference"] <= high
        assert row["alone_ci_low"] <= row["acc1_alone"] <= row["alone_ci_high"]
    twice = found[found["template"] == "{}"].drop(columns="template")
    assert twice.iloc[0].equals(twice.iloc[1])  # one text twice: the same effect


def test_templates_are_read_off_the_texts() -> None:
    prompts = [[template.replace("{}", name) for template in TEMPLATES] for name in CLASSES]
    assert template_names(prompts, CLASSES) == TEMPLATES
    assert template_names([["a furry pet", "cat"], ["red", "red fox"], ["a picture", "photo"]], CLASSES) == [
        "text 1 ('a furry pet')", "{}"]


def test_only_classes_with_equally_many_texts_have_templates() -> None:
    assert has_templates([["a", "b"], ["c", "d"]])
    assert not has_templates([["a"], ["b"]]) and not has_templates([["a", "b"], ["c"]])
