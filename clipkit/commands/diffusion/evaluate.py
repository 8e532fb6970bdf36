"""`clipkit diffusion evaluate`: judge generated pictures by a CLIP that had no part in them. From samples to a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipkit.config.diffusion.evaluate import EvaluateConfig
from clipkit.config.launch import launch

if TYPE_CHECKING:
    from clipkit.diffusion.judged_prompts import JudgedPrompts
    from clipkit.diffusion.judging import Judgement
    from clipkit.diffusion.sample_run import Order
    from clipkit.evaluation.tasks import Task


def main(arguments: Sequence[str]) -> None:
    launch("diffusion/evaluate", EvaluateConfig, evaluate, arguments)


class Samples(NamedTuple):
    """Generated pictures on disk."""

    folder: Path
    order: "Order"
    task: "Task"  # the pictures, in the order of their numbers


def evaluate(config: EvaluateConfig) -> None:
    """Make samples (those that are there are used again), judge them, and write results and a report.

    Raises:
      FileNotFoundError: there is no such model, scorer, file of prompts or real pictures.
      ValueError: the scorer is the CLIP that conditions the model, or a setting does not fit the model.
      OSError: the pictures or the results cannot be written.
    """
    print(f"clipkit diffusion evaluate: {config.model}, scored by {config.scored_by} (loading)", flush=True)
    from clipkit.diffusion.judged_prompts import judged_prompts
    from clipkit.diffusion.real_pictures import open_pictures, trained_on
    from clipkit.diffusion.sample_run import run_folder
    from clipkit.evaluation.lazy_model import open_model
    from clipkit.evaluation.results import read_results
    from clipkit.evaluation.store import EmbeddingStore
    from clipkit.training.distributed import start_process

    assert config.scored_by
    prompts = judged_prompts(config.prompts)
    real = config.real or trained_on(config.model)
    held_out = config.held_out or ("emoji_val" if real == ("emoji",) else None)
    tasks = [open_pictures(names, cache_dir=config.cache_dir) for names in (real, *([(held_out,)] if held_out else []))]
    out = Path(config.out).expanduser() if config.out else run_folder(config.model) / "evaluation"
    read_results(out)  # those of another schema stop this before any work
    device = start_process(config.device, timeout_seconds=60).device
    store = EmbeddingStore(config.cache_dir) if config.store else None
    scorer = open_model(config.scored_by, pretrained=config.pretrained, device=device, store=store)
    note = check_scorer(config, scorer)
    print(f"note      {note}")
    samples = make(config, prompts, out)
    judgement, training_keys = judge(config, prompts, scorer, samples, tasks, store)
    write(config, judgement, samples, tasks[0], training_keys, scorer, out, note)


def check_scorer(config: EvaluateConfig, scorer: Any) -> str:
    """Refuse the CLIP that conditions the model as its judge, unless same_scorer=true. Returns a sentence on it."""
    from clipkit.diffusion.pipeline_folder import pipeline_folder, read_facts
    from clipkit.evaluation.lazy_model import facts_of

    conditions = read_facts(pipeline_folder(config.model))["conditioning"]["weights_sha256"]
    judges = facts_of(scorer).source_sha256
    if conditions is None or judges is None:
        return "Whether the CLIP that judges is the one that conditions is not known: one of them has no weights file."
    if conditions != judges:
        return "The CLIP that judges had no part in the pictures."
    if not config.same_scorer:
        raise ValueError(f"scored_by is {config.scored_by}, the CLIP that conditions {config.model}: it would judge itself; "
                         "give another one, or same_scorer=true")
    return "The CLIP that judges is the one that conditions the model: it judges itself."


def make(config: EvaluateConfig, prompts: "JudgedPrompts", out: Path) -> Samples:
    """Make the samples, as `clipkit diffusion sample` does."""
    from clipkit.data.tables import Record
    from clipkit.diffusion.pipeline_folder import pipeline_folder
    from clipkit.diffusion.sample_conditions import prompt_sources
    from clipkit.diffusion.sample_files import sample_path
    from clipkit.diffusion.sample_run import fill_folder, folder_name, make_order
    from clipkit.evaluation.image_sets import FileImages, Picture
    from clipkit.evaluation.tasks import RETRIEVAL, Task

    sources, folder = prompt_sources(prompts.prompts), pipeline_folder(config.model)
    order = make_order(config, folder, sources)
    place = out / folder_name(prompts.name, sources, order)
    fill_folder(config, folder, sources, order, place)
    files = [sample_path(place, number) for number in range(order.num_samples)]
    pictures = tuple(Picture(file.name, Record(file.name, file, None)) for file in files)
    return Samples(place, order, Task(prompts.name, "all", RETRIEVAL, FileImages(pictures, len(files), files, "samples", "")))


def judge(config: EvaluateConfig, prompts: "JudgedPrompts", scorer: Any, samples: Samples, tasks: "Sequence[Task]",
          store: Any) -> "tuple[Judgement, list[str]]":
    """Encode samples, real pictures and texts with the scorer, and compare them. Returns the training pictures' keys too."""
    import torch

    from clipkit.diffusion.judging import Pictures, judge_samples, make_judge
    from clipkit.diffusion.real_pictures import emoji_rows_of, places_of
    from clipkit.evaluation.encode import encode_task, encode_texts
    from clipkit.evaluation.progress_line import ProgressLine

    seen, keys = [], []
    trunk = bool(prompts.styles) and scorer.has_trunk_features
    for task in (samples.task, *tasks):
        with ProgressLine(f"scorer    {task.name}: ", True) as line:
            encoded = encode_task(scorer, task, batch_size=config.batch_size, store=store, trunk=trunk, workers=config.workers,
                                  progress=line.show)
        features = encoded.image_features.cpu()  # (N, D)
        seen.append(Pictures(features, encoded.trunk_features.cpu() if encoded.trunk_features is not None else features))
        keys.append(encoded.keys)
    prompt_features, class_features = (encode_texts(scorer, texts, batch_size=config.batch_size, store=store).cpu()
                                       for texts in (prompts.prompts, prompts.classes))  # (P, D), (C, D)
    generated, training, held_out = seen[0], seen[1], seen[2] if len(seen) > 2 else None
    found = make_judge(prompts, str(config.scored_by), prompt_features, class_features, training=training,
                       training_styles=[row.style if row else None for row in emoji_rows_of(keys[1])])
    places = places_of(prompts.real_keys, keys[2]) if held_out and prompts.real_keys else None
    prompt_of = torch.arange(len(generated.features)) % len(prompts.prompts)  # (N,)
    judgement = judge_samples(found, generated, prompt_of, training=training, held_out=held_out,
                              real_of_prompts=held_out.rows(torch.tensor(places)) if held_out and places else None)
    return judgement, keys[1]


def write(config: EvaluateConfig, judgement: "Judgement", samples: Samples, training: "Task", training_keys: Sequence[str],
          scorer: Any, out: Path, note: str) -> None:
    """Write results.csv and results.json into `out`, report.html beside the samples, and print the numbers."""
    from clipkit import __version__
    from clipkit.diffusion.judging_report import NUM_SHOWN, Shown, judgement_results, judgement_table, write_page
    from clipkit.diffusion.pipeline_folder import pipeline_folder, read_facts
    from clipkit.diffusion.sample_files import read_sample, sample_path
    from clipkit.evaluation.lazy_model import facts_of
    from clipkit.evaluation.measured_models import model_names
    from clipkit.evaluation.pictures import pictures_of
    from clipkit.evaluation.results import Provenance, write_results

    order, name, step = samples.order, model_names([config.model])[0], read_facts(pipeline_folder(config.model)).get("step")
    settings = f"{order.scheduler} {config.steps} steps, guidance {config.guidance_scale:g}, seed {order.seed}"
    scorer_name = " ".join(filter(None, [model_names([str(config.scored_by)])[0], config.pretrained]))
    scorer_hash = facts_of(scorer).source_sha256 or "unknown"
    write_results(out, judgement_results(judgement, settings=settings, scorer=f"scored by {scorer_name} {scorer_hash[:8]}"),
                  Provenance(name, None, "fp32", order.model_sha256, step, __version__))
    print(f"\n{judgement_table(judgement)}\n")
    numbers = range(min(order.num_samples, NUM_SHOWN))
    keys = [training_keys[int(judgement.copies.nearest[number])] for number in numbers]
    nearest = pictures_of(training, keys)
    shown = [Shown(found[0], nearest.get(key), number) for number, key in zip(numbers, keys, strict=True)
             if (found := read_sample(sample_path(samples.folder, number)))]
    report = samples.folder / "report.html"
    write_page(report, judgement, shown, title=f"{name}: {judgement.judge.task.name}", note=note,
               about={"Model": f"{name}, {order.model_sha256[:12]}", "Scored by": f"{scorer_name}, {scorer_hash[:12]}",
                      "Sampling": settings, "Pictures": f"{order.num_samples:,}", "Compared with": training.name,
                      "clipkit": __version__})
    print(f"written   {out / 'results.csv'}, {out / 'results.json'}, {report}, {samples.folder / 'sheet.png'}")
