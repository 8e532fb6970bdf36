"""The zero-shot classifier in files: safetensors that need no model, ONNX that gives the same numbers elsewhere."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clipkit.evaluation.classifier import load_classifier, zero_shot_classifier
from clipkit.evaluation.classifier_files import write_classifier

CLASSES = ["cat", "dög", "kite, \"the bird\""]


@pytest.fixture
def classifier(tiny_model):
    tiny_model.eval().source_sha256 = "ab" * 32
    return zero_shot_classifier(tiny_model, CLASSES, templates=["a {}", "no {}"])


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_saved_classifier_scores_without_its_model_to_the_last_bit(classifier, images, tmp_path: Path) -> None:
    path = tmp_path / "new" / "pets.safetensors"
    classifier.save(path)
    alone = load_classifier(path)
    features = classifier.model.encode_image(images)
    assert alone.model is None and torch.equal(alone.logits(features), classifier.logits(features))
    assert (alone.classes, alone.templates, alone.source_sha256) == (tuple(CLASSES), ("a {}", "no {}"), "ab" * 32)
    with_model = load_classifier(path, model=classifier.model)
    assert torch.equal(with_model(images), classifier(images))
    with safe_open(path, framework="np") as file:  # readable without clipkit
        assert sorted(file.keys()) == ["logit_scale", "weight"] and file.get_tensor("weight").shape == (3, 16)
        assert json.loads(file.metadata()["classes"]) == CLASSES


def test_a_classifier_without_a_model_says_what_pictures_need(classifier, images, tmp_path: Path) -> None:
    classifier.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"without a model, which images need; give load_classifier model=..., or image "
                       "features to classifier.logits"):
        load_classifier(tmp_path / "a.safetensors")(images)


def test_a_classifier_of_another_model_is_refused(classifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "a.safetensors")
    classifier.model.source_sha256 = "cd" * 32
    with pytest.raises(ValueError, match=r"was made with another model \(weights abab.*, embed_dim 16\) than the one "
                       r"given \(weights cdcd.*make the classifier anew"):
        load_classifier(tmp_path / "a.safetensors", model=classifier.model)


def test_files_that_are_no_classifier_are_answered_in_one_line(classifier, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no classifier at .*none.safetensors"):
        load_classifier(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors is no zero-shot classifier \(it holds weight\)"):
        load_classifier(tmp_path / "other.safetensors")
    classifier.save(tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read as a classifier \(SafetensorError.*save it anew"):
        load_classifier(tmp_path / "cut.safetensors")
    few = load_classifier(_written(classifier, tmp_path / "whole.safetensors"))
    write_classifier(tmp_path / "few.safetensors", _saved(few)._replace(classes=("cat",)))
    with pytest.raises(ValueError, match=r"few.safetensors names 1 classes and holds 3 weights; save it anew"):
        load_classifier(tmp_path / "few.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one(classifier, tmp_path: Path, monkeypatch) -> None:
    path = _written(classifier, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a.safetensors: the disk is full"):
        classifier.save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_probabilities_for_any_number_of_images(classifier, images, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    classifier.train()
    classifier.export_onnx(tmp_path / "new" / "pets.onnx")
    assert classifier.training and classifier.model.towers.training  # left as it was
    classifier.eval()
    session = onnxruntime.InferenceSession(tmp_path / "new" / "pets.onnx")
    for batch in (images, images[:1]):
        (found,) = session.run(["probabilities"], {"images": batch.numpy()})
        np.testing.assert_allclose(found, classifier(batch).detach().numpy(), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == CLASSES and json.loads(metadata["preprocess_cfg"])["size"] == [32, 32]
    assert metadata["source_sha256"] == "ab" * 32
    assert (tmp_path / "new" / "pets.onnx").stat().st_size < 1e6  # the image tower alone; the text tower has 6 MB


@pytest.mark.slow
def test_onnx_of_a_classifier_without_its_model_takes_features(classifier, images, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    load_classifier(_written(classifier, tmp_path / "a.safetensors")).export_onnx(tmp_path / "a.onnx")
    features = classifier.model.encode_image(images).detach()  # (5, D)
    (found,) = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(["logits"], {"image_features": features.numpy()})
    np.testing.assert_allclose(found, classifier.logits(features).numpy(), atol=1e-5)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(classifier, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime.*clipkit-vl\[export\]"):
        classifier.export_onnx(tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def _written(classifier, path: Path) -> Path:
    classifier.save(path)
    return path


def _saved(classifier):
    from clipkit.evaluation.classifier_files import SavedClassifier

    return SavedClassifier(classifier.weight, classifier.logit_scale, classifier.classes, classifier.templates, None)
