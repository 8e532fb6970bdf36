"""README.md of an export: what the model is and how it was made and measured, from the run's own files, and how to load it."""

import json
from collections.abc import Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from clipkit.config.export import ExportConfig
from clipkit.evaluation.results import Result, results_table
from clipkit.interop.loading_code import loading_code
from clipkit.interop.provenance import run_of, source_name
from clipkit.model.image_text import ImageTextModel, parameter_counts

LIBRARY = {"text_encoder": "transformers", "transformers": "transformers", "open_clip": "open_clip", "onnx": "onnx"}
BASELINE = "pixel nearest neighbour"  # prompts of evaluation/nearest_neighbour.py's rows: no figure of the model
METRICS = {"acc1": "accuracy", "lp_acc1": "accuracy"}  # clipkit's names -> those that the hub draws
CARD = """---
{head}---

# {name}

{summary}

## Load it

Run this inside the folder.

{code}

## Data

{data}

## Training

{training}

## Results

{results}

## Agreement

{agreement}

## Upload

Choose a licence for the weights, as `license:` in the head of this file; then, inside the folder:

```bash
hf upload <your-name>/{name} .
```
"""


def model_card(model: ImageTextModel, config: ExportConfig, facts: Mapping[str, Any]) -> str:
    """Write the README of an export.

    Args:
      model: What was exported.
      config: How; the source tells where the run's figures are.
      facts: What the format's writer returned.

    Returns:
      Markdown under a YAML head that the Hugging Face hub reads. What is not known is said to be so.
    """
    run = run_of(config.model)
    name = source_name(config.model) or "clip"
    settings, results = _settings(run), _results(run, model.source_sha256)
    code = loading_code(config.format, facts, model.config["preprocess_cfg"])
    blocks = "\n\n".join(f"With {library}:\n\n```python{lines}```" for library, lines in code.items())
    return CARD.format(head=_head(name, config.format, results), summary=_summary(model, config, facts), code=blocks,
                       data=_data(settings), training=_training(run, settings), results=_results_text(run, results),
                       agreement=_agreement(facts), name=name)


def _head(name: str, export_format: str, results: list[Result]) -> str:
    """The YAML that the hub searches and draws."""
    import yaml

    head: dict[str, Any] = {"library_name": LIBRARY[export_format], "tags": ["clip", "clipkit"],
                            "pipeline_tag": "feature-extraction" if export_format == "text_encoder"
                            else "zero-shot-image-classification"}
    measured: dict[str, dict[str, Any]] = {}
    for result in results if export_format != "text_encoder" else []:
        if result.metric in METRICS and result.prompts != BASELINE:
            task = measured.setdefault(result.task, {
                "task": {"type": "zero-shot-image-classification", "name": result.kind.replace("_", " ")},
                "dataset": {"type": result.task, "name": result.task, "split": result.split}, "metrics": []})
            task["metrics"].append({"type": METRICS[result.metric], "value": round(result.value, 4),
                                    "name": f"{result.metric}, prompts: {result.prompts}"})
    if measured:
        head["model-index"] = [{"name": name, "results": list(measured.values())}]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _summary(model: ImageTextModel, config: ExportConfig, facts: Mapping[str, Any]) -> str:
    model_cfg, counts = model.config["model_cfg"], parameter_counts(model)
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    exported = {"text_encoder": "Its text encoder is exported here, for diffusion pipelines.",
                "transformers": f"It is exported here as transformers' {facts.get('model_class')}.",
                "onnx": "Its two encoders are exported here as ONNX files; features have unit norm.",
                "open_clip": "It is exported here as open_clip's model folder."}[config.format]
    return (f"Image and text encoders with a shared space of {model_cfg['embed_dim']} dimensions (CLIP). {exported}\n\n"
            f"- image tower: {vision_cfg.get('timm_model_name') or _sizes(vision_cfg, 768)}, pictures of {model.image_size} "
            f"pixels, {counts['image'] / 1e6:.1f} M parameters\n"
            f"- text tower: {_last_parts(text_cfg.get('hf_model_name') or '') or _sizes(text_cfg, 512)}, "
            f"{model.tokenize.context_length} tokens, {counts['text'] / 1e6:.1f} M parameters\n"
            f"- weights: sha256 `{model.source_sha256 or 'never saved'}`")


def _sizes(tower_cfg: Mapping[str, Any], width: int) -> str:
    return f"layers {tower_cfg.get('layers', 12)}, width {tower_cfg.get('width', width)}"  # open_clip's defaults


def _settings(run: Path | None) -> dict[str, Any]:
    """The run's config.yaml; empty without one."""
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else {}


def _results(run: Path | None, weights_sha256: str | None) -> list[Result]:
    """The run's results, of these weights only."""
    path = run and run / "zero_shot" / "results.json"
    if path is None or not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    names = [field.name for field in fields(Result)]
    return [Result(**{name: row[name] for name in names}) for row in rows if row["weights_sha256"] == weights_sha256]


def _results_text(run: Path | None, results: list[Result]) -> str:
    if not results:
        known = "The run has none for these weights" if run else "None are known"
        return f"{known}: `clipkit zero-shot` measures them."
    return f"95 % intervals in brackets.\n\n```\n{results_table(results)}\n```"


def _data(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "Not known to clipkit: see the source of the weights."
    train = list(settings["data"]["train"])
    lines = ["The emoji set that clipkit ships: drawings of emoji with their names and keywords. Art and names:\n\n"
             f"{_emoji_licences()}" if pattern == "emoji" else
             f"`{_last_parts(pattern)}`: its licence is not recorded; state it here before you publish." for pattern in train]
    return "\n\n".join(lines)


def _emoji_licences() -> str:
    """The list of works and licences, from the set's own README."""
    text = (resources.files("clipkit.data.emoji") / "README.md").read_text(encoding="utf-8")
    listed = text.partition("## Attribution")[2].partition("\n- ")[2].partition("\n\n")[0]
    return f"- {listed}"


def _last_parts(pattern: str) -> str:
    """The end of a path: what stands before is a matter of the machine."""
    return "/".join(pattern.split("/")[-2:])


def _training(run: Path | None, settings: Mapping[str, Any]) -> str:
    if run is None:
        return "Not known to clipkit: see the source of the weights."
    optim, schedule, train = settings["optim"], settings["schedule"], settings["train"]
    amount = f"{train['samples']:,} samples" if train.get("samples") else f"{train.get('epochs')} epochs"
    lines = [f"loss {settings.get('loss', {}).get('name', 'clip')}, {amount} in batches of {train['global_batch_size']}, "
             f"precision {train.get('precision', 'fp32')}, seed {settings['seed']}",
             f"{optim['name']}, learning rate {optim['lr']:g}, betas {optim['beta1']:g} and {optim['beta2']:g}, weight decay "
             f"{optim['weight_decay']:g}; schedule {schedule['name']}, warmup {schedule['warmup']}"]
    return "\n".join(f"- {line}" for line in [*lines, *_progress(run), *_environment(run)])


def _progress(run: Path) -> list[str]:
    """Where training ended, by the last training line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    last = next((line for line in map(json.loads, reversed(lines)) if "samples_seen" in line), None)
    return [f"ended at step {last['step']:,} after {last['samples_seen']:,} samples, loss {last['loss']:.3f}"] if last else []


def _environment(run: Path) -> list[str]:
    path = run / "environment.json"
    if not path.is_file():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    hardware = ", ".join(gpu["name"] for gpu in known.get("gpus", [])) or known.get("cpu")
    commit = (known.get("git") or {}).get("commit")
    return [f"on {hardware}; {versions}" + (f"; clipkit's commit {commit}" if commit else "")]


def _agreement(facts: Mapping[str, Any]) -> str:
    """How closely the export gives what the model gives."""
    found = facts.get("greatest_differences", {})
    lines = [f"| {place} | {difference:.1e} |" for place, difference in found.items()]
    notes = [*facts.get("notes", []), *([f"Cleaning of texts: {facts['cleaning']}."] if "cleaning" in facts else [])]
    return "\n".join(["Greatest absolute difference between this export and the model, in fp32:", "", "| of | difference |",
                      "|---|---|", *lines, *(f"\n- {note}" for note in notes)])
