"""A briefly trained ViT, exported: transformers and sentence-transformers give emoji the classes that clipkit gives."""

import pytest
import torch

from clipkit.config.export import ExportConfig
from clipkit.data.emoji.pack import emoji_pictures, read_emoji_rows
from clipkit.evaluation.classifier import zero_shot_classifier
from clipkit.interop.export import export_model
from clipkit.losses.clip import clip_loss
from clipkit.model.build import build_model
from clipkit.model.image_text import stack_images
from tests.conftest import command_settings

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
pytestmark = pytest.mark.slow


def train(model, steps=120, batch_size=128):
    """Enough for features that tell pictures apart; its accuracy is no matter here."""
    rows = [row for row in read_emoji_rows() if row.split == "train"][::4]
    images = stack_images(model, [picture for _, picture in emoji_pictures(rows)])  # (N, 3, 32, 32)
    tokens = model.tokenize([row.label for row in rows])  # (N, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randperm(len(rows))[:batch_size]
        features = model(images[chosen], tokens[chosen])
        loss = clip_loss(features.image_features, features.text_features, features.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, folder, pictures, labels): 143 classes, of each picture the number clipkit gives."""
    torch.manual_seed(0)
    model = build_model(config=CONFIG)
    train(model.train())
    out = tmp_path_factory.mktemp("export") / "clip"
    chosen = command_settings("export", ExportConfig, "model=x", "format=transformers", f"out={out}")
    folder, _ = export_model(model.eval(), chosen)
    rows = [row for row in read_emoji_rows() if row.split == "test_concept"]
    labels = list(dict.fromkeys(row.label for row in rows))
    pictures = [picture for _, picture in emoji_pictures(rows[::6])]
    with torch.no_grad():
        probabilities = zero_shot_classifier(model, labels, templates="plain")(pictures)  # (N, C)
    assert len(pictures) > 100 and len(set(probabilities.argmax(dim=-1).tolist())) > 20
    return folder, pictures, labels, probabilities


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_the_zero_shot_pipeline_of_transformers_gives_the_same_classes(backend, exported):
    from transformers import AutoImageProcessor, pipeline

    folder, pictures, labels, probabilities = exported
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    classify = pipeline("zero-shot-image-classification", model=str(folder), image_processor=processor, device="cpu")
    answers = classify(pictures, candidate_labels=labels, hypothesis_template="{}")
    scores = torch.tensor([[{one["label"]: one["score"] for one in answer}[label] for label in labels] for answer in answers])
    classes = [labels.index(answer[0]["label"]) for answer in answers]
    agreeing = sum(ours == theirs for ours, theirs in zip(probabilities.argmax(dim=-1).tolist(), classes, strict=True))
    if backend == "pil":  # the same bytes
        torch.testing.assert_close(scores, probabilities, atol=1e-5, rtol=0)
        assert agreeing == len(pictures)
    else:  # two of 255 levels in a pixel turn a class only where two are nearly equal
        assert agreeing >= 0.97 * len(pictures)


def test_sentence_transformers_gives_the_same_classes(exported):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder, pictures, labels, probabilities = exported
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", processor_kwargs={"backend": "pil"})
    image_features = torch.as_tensor(model.encode(pictures, normalize_embeddings=True))  # (N, D)
    text_features = torch.as_tensor(model.encode(labels, normalize_embeddings=True))  # (C, D)
    assert torch.equal((image_features @ text_features.T).argmax(dim=-1), probabilities.argmax(dim=-1))
