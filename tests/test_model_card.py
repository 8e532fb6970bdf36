"""README.md of an export: the run's own figures, and code that runs."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from clipkit.config.export import FORMATS, ExportConfig
from clipkit.evaluation.results import Provenance, Result, write_results
from clipkit.interop.export import export_model
from clipkit.interop.model_card import model_card
from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from tests.conftest import TINY, command_settings
from tests.conftest import settings as run_settings

pytestmark = pytest.mark.usefixtures("tokenizer_is_written_once")

FACTS = {"model_class": "CLIPModel", "greatest_differences": {"image_embeds": 1.8e-7}, "notes": ["cut one pixel apart"],
         "cleaning": "lower case"}


def settings(model, export_format="transformers", *more):
    return command_settings("export", ExportConfig, f"model={model}", f"format={export_format}", *more)


def make_run(folder, *arguments):
    """A run folder as `clipkit pretrain` leaves it. Returns the model."""
    from dataclasses import asdict

    torch.manual_seed(0)
    save_model_folder(build_model(config=TINY), folder / "model")
    values = json.loads(json.dumps(asdict(run_settings(*arguments)), default=str))
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    lines = [{"step": 820, "samples_seen": 209920, "loss": 0.8782}, {"step": 820, "task": "emoji_val", "value": 0.7}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {"git": {"commit": "80cf469"}, "versions": {"torch": "2.15.0"}, "cpu": "EPYC", "gpus": [], "host": "mine-1"}
    (folder / "environment.json").write_text(json.dumps(environment))
    return load_model(folder)


def add_results(folder, weights_sha256):
    results = [Result("emoji_val", "val", "zeroshot_classification", "acc1", 0.71006, 338, 0.6595, 0.7559, 302, "label", 0),
               Result("emoji_val", "val", "zeroshot_classification", "acc1", 0.4142, 338, 0.3629, 0.4674, 1771,
                      "pixel nearest neighbour", 0)]
    write_results(folder / "zero_shot", results, Provenance("mine", None, "fp32", weights_sha256, 820, "0.1.0"))


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_has_the_runs_data_schedule_results_and_licences(tmp_path):
    model = make_run(tmp_path / "mine", "name=mine")
    add_results(tmp_path / "mine", model.source_sha256)
    card = model_card(model, settings(tmp_path / "mine"), FACTS)
    for part in ("# mine\n", "71.0% (66.0-75.6)", "338", "302", "label", "Twemoji graphics, copyright Twitter", "CC-BY-4.0",
                 "Fluent Emoji, copyright Microsoft Corporation, MIT", "Unicode-3.0", "learning rate 0.0015", "schedule cosine",
                 "210,000 samples in batches of 256", "step 820 after 209,920 samples, loss 0.878", "torch 2.15.0", "80cf469",
                 model.source_sha256, "| image_embeds | 1.8e-07 |", "cut one pixel apart", "Cleaning of texts: lower case"):
        assert part in card, part
    assert "mine-1" not in card and str(tmp_path) not in card
    assert card.endswith("```bash\nhf upload <your-name>/mine .\n```\n")


def test_the_hub_understands_the_head(tmp_path):
    from huggingface_hub import ModelCard

    model = make_run(tmp_path / "mine", "name=mine")
    add_results(tmp_path / "mine", model.source_sha256)
    data = ModelCard(model_card(model, settings(tmp_path / "mine"), FACTS)).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    [found] = data.eval_results  # the baseline is no figure of the model
    assert (found.dataset_name, found.metric_type, found.metric_value) == ("emoji_val", "accuracy", 0.7101)
    text = head_of(model_card(model, settings(tmp_path / "mine", "text_encoder"), FACTS))
    assert text["pipeline_tag"] == "feature-extraction" and "model-index" not in text


def test_results_of_other_weights_and_the_path_of_the_data_are_left_out(tmp_path):
    model = make_run(tmp_path / "mine", "name=mine", "data.train=/home/someone/cc3m/{0000..0331}.tar")
    add_results(tmp_path / "mine", "f00")
    card = model_card(model, settings(tmp_path / "mine"), FACTS)
    assert "71.0%" not in card and "model-index" not in head_of(card)
    assert "The run has none for these weights: `clipkit zero-shot` measures them." in card
    assert "`cc3m/{0000..0331}.tar`: its licence is not recorded" in card and "someone" not in card


def test_of_a_model_without_a_run_only_what_is_known_is_said(tiny_model):
    card = model_card(tiny_model, settings("ViT-B-32"), FACTS)
    assert card.count("Not known to clipkit: see the source of the weights.") == 2
    assert "None are known" in card and "# ViT-B-32\n" in card and "weights: sha256 `never saved`" in card


@pytest.mark.parametrize(("export_format", "libraries"), [
    ("text_encoder", ["transformers", "diffusers"]), ("open_clip", ["open_clip", "clipkit"]), ("onnx", ["ONNX Runtime"]),
    ("transformers", ["transformers", "clipkit", "sentence-transformers", "diffusers"])])
def test_each_format_is_loaded_by_the_libraries_that_can(export_format, libraries, tiny_model):
    card = model_card(tiny_model, settings("ViT-B-32", export_format), FACTS)
    assert re.findall(r"With (.+):\n\n```python", card) == libraries


@pytest.mark.slow
@pytest.mark.parametrize("export_format", FORMATS)
def test_the_code_of_a_card_runs_in_its_folder(export_format, tmp_path, monkeypatch):
    from clipkit.interop.fixed_pictures import fixed_pictures

    model = make_run(tmp_path / "mine", "name=mine")
    chosen = settings(tmp_path / "mine", export_format, f"out={tmp_path / 'out'}")
    folder, _ = export_model(model, chosen)
    fixed_pictures()[2].save(folder / "picture.png")
    monkeypatch.chdir(folder)
    texts = ["a red square", "a blue circle"]
    with torch.no_grad():
        wanted = SimpleNamespace(text=model.encode_text(model.tokenize(texts)),
                                 image=model.encode_image(model.preprocess(fixed_pictures()[2])[None]))
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL):
        if "sentence_transformers" in code:
            pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
        names: dict = {}
        with torch.no_grad():
            exec(compile(code, "README.md", "exec"), names)
        if "text_features" in names:
            features = torch.as_tensor(names["text_features"])
            features = torch.nn.functional.normalize(features, dim=-1)
            torch.testing.assert_close(features, wanted.text[:len(features)], atol=1e-4, rtol=0)
        if "image_features" in names:  # prepared with Pillow and numpy: the same bytes
            torch.testing.assert_close(torch.as_tensor(names["image_features"]), wanted.image, atol=1e-4, rtol=0)
