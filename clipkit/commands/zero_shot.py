"""`clipkit zero-shot`: measure any CLIP on any labelled or captioned pictures, or put names to your own."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipkit.config.launch import launch
from clipkit.config.zero_shot import ZeroShotConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from clipkit.evaluation.outcome import Outcome
    from clipkit.evaluation.tasks import Task

TIMEOUT_SECONDS = 3600  # that a process waits for the others: one may have far more, or far larger, pictures
SHEET_PICTURES = 40  # of one's own pictures, on predictions.png


def main(arguments: Sequence[str]) -> None:
    launch("zero-shot", ZeroShotConfig, zero_shot, arguments)


class Shared(NamedTuple):
    """What all models and tasks share."""

    config: ZeroShotConfig
    process: Any  # training.distributed.Process
    store: Any  # evaluation.store.EmbeddingStore | None


def zero_shot(config: ZeroShotConfig) -> None:
    """Measure models on tasks, or look at pictures without labels.

    Raises:
      FileNotFoundError: there is no such model, task or folder.
      ValueError: a setting, the data or the model cannot be used.
    """
    print(f"clipkit zero-shot: {', '.join(config.model)} (loading)", flush=True)
    from clipkit.evaluation.store import EmbeddingStore
    from clipkit.training.distributed import start_process, stop_process

    process = start_process(config.device, TIMEOUT_SECONDS)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(stop_process)
        shared = Shared(config, process, EmbeddingStore(config.cache_dir) if config.store else None)
        if config.images is not None:
            look_at_pictures(shared)
            return
        names = model_names(config.model)
        folders = [output_folder(config, source, name) for source, name in zip(config.model, names, strict=True)]
        tasks = load_tasks(config)
        for source, name, folder in zip(config.model, names, folders, strict=True):
            measure_model(shared, source, name, tasks, folder)
        if process.is_main and len(config.model) > 1:
            print_comparisons(names, folders)


def load_tasks(config: ZeroShotConfig) -> "list[Task]":
    """Open the tasks, before any model is loaded."""
    from clipkit.evaluation.tasks import EMOJI_SPLITS, load_task

    return [load_task(name, cache_dir=config.cache_dir, split=config.split, templates=config.templates)
            for name in config.task or EMOJI_SPLITS]


def measure_model(shared: Shared, source: str, name: str, tasks: "Sequence[Task]", folder: Path) -> None:
    """Measure one model on all tasks, and write results, predictions and the report."""
    from clipkit import __version__
    from clipkit.evaluation.nearest_neighbour import emoji_pixel_baselines
    from clipkit.evaluation.outcome import join
    from clipkit.evaluation.results import Provenance, results_table, write_results
    from clipkit.model.folder import load_model

    config, process = shared.config, shared.process
    pretrained = None if Path(source).expanduser().is_dir() else config.pretrained
    model = load_model(source, pretrained=pretrained, device=process.device)
    say = print if process.is_main else _say_nothing
    say(f"model     {name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.image_size} px")
    outcomes = [measure_task(shared, model, task, say) for task in tasks]
    if not process.is_main:
        return
    results, predictions, _ = join(outcomes)
    results = results + emoji_pixel_baselines([task.name for task in tasks])
    provenance = Provenance(name, pretrained, "fp32", model.source_sha256, run_step(Path(source)), __version__)
    write_results(folder, results, provenance)
    say("\n" + results_table(results) + "\n")
    written = [folder / "results.csv", folder / "results.json"]
    if predictions is not None:
        predictions.insert(0, "name", name)
        written.append(write_table(predictions, folder / "predictions.parquet"))
    if config.report:
        written.append(report(folder, name, tasks, results, predictions, provenance))
    say(f"written   {', '.join(str(path) for path in written)}")


def measure_task(shared: Shared, model: Any, task: "Task", say: Any) -> "Outcome":
    """Measure a model on one task in each of the ways asked for, with a line before and one after."""
    import time

    from clipkit.evaluation.outcome import join
    from clipkit.evaluation.probes import ProbeSettings
    from clipkit.evaluation.zero_shot import measure

    config, started, outcomes = shared.config, time.monotonic(), []
    line = ProgressLine(f"task      {task.name}: ", shared.process.is_main)
    for kind in config.kind or (task.kind,):
        outcomes.append(measure(model, task, kind=kind, batch_size=config.batch_size, store=shared.store,
                                workers=config.workers, progress=line.progress,
                                probe=ProbeSettings(config.features, config.shots, config.seeds)))
    line.close()
    outcome = join(outcomes)
    result = outcome.results[0]
    bad = f", {result.n_bad:,} bad samples left out" if result.n_bad else ""
    say(f"task      {task.name}: {result.n:,} images{bad}, {time.monotonic() - started:.1f} s")
    notes = list(outcome.notes)
    texts = list(dict.fromkeys(text for rule in task.prompts.values() for of_class in rule for text in of_class))
    num_cut = model.tokenize.count_cut(texts)
    if num_cut:
        notes.append(f"{num_cut:,} of {len(texts):,} prompts are longer than the {model.tokenize.context_length} tokens that "
                     "the text encoder takes; the rest of each is cut off")
    for note in notes:
        say(f"note      {note}")
    return outcome


def look_at_pictures(shared: Shared) -> None:
    """Name one's own pictures by classes=[..], or find those nearest to query=..; no labels needed."""
    from clipkit.evaluation.encode import encode_task
    from clipkit.evaluation.tasks import RETRIEVAL, Task, pictures_in
    from clipkit.model.folder import load_model

    config, process = shared.config, shared.process
    assert config.images is not None
    images = pictures_in(Path(config.images).expanduser())
    model = load_model(config.model[0], pretrained=config.pretrained, device=process.device)
    task = Task(name=config.images, split="all", kind=RETRIEVAL, images=images)
    encoded = encode_task(model, task, batch_size=config.batch_size, spread=True, store=shared.store, workers=config.workers)
    folder = Path(config.out).expanduser() if config.out else Path("zero_shot") / Path(config.images).resolve().name
    look = name_pictures if config.classes else find_pictures
    table, written = look(shared, model, task, encoded, folder)
    if process.is_main:
        bad = f"\nleft out as bad: {dict(encoded.num_bad)}" if encoded.num_bad else ""
        print(f"{table}{bad}\nwritten   {', '.join(str(path) for path in written)}")


def name_pictures(shared: Shared, model: Any, task: "Task", encoded: Any, folder: Path) -> tuple[str, list[Path]]:
    """Write the classes that each picture is nearest to; return a table and the files."""
    from clipkit.evaluation.classifier import class_weights
    from clipkit.evaluation.contact_sheet import draw_contact_sheet
    from clipkit.evaluation.matches import classify_pictures, named_sheet, predictions_table, write_predictions
    from clipkit.evaluation.prompt_rules import prompt_rules

    config = shared.config
    assert config.classes is not None
    prompts = next(iter(prompt_rules(config.classes, config.templates).values()))  # the first rule
    weight = class_weights(model, prompts, batch_size=config.batch_size, spread=True, store=shared.store)  # (C, D)
    named = classify_pictures(encoded.keys, encoded.image_features, weight, classes=config.classes,
                              logit_scale=model.towers.logit_scale.exp().item(), num_guesses=config.top)
    written = [folder / "predictions.csv", folder / "predictions.png"]
    if shared.process.is_main:
        write_predictions(written[0], named)
        shown = named[:SHEET_PICTURES]
        pictures = pictures_of(task, [picture.file for picture in shown])
        draw_contact_sheet(named_sheet([pictures[picture.file] for picture in shown], shown), written[1],
                           title=f"{config.images}: nearest classes")
    return predictions_table(named), written


def find_pictures(shared: Shared, model: Any, task: "Task", encoded: Any, folder: Path) -> tuple[str, list[Path]]:
    """Write the pictures nearest to the query; return a table and the files."""
    from clipkit.evaluation.contact_sheet import draw_contact_sheet
    from clipkit.evaluation.encode import encode_texts
    from clipkit.evaluation.matches import Match, matches_sheet, matches_table, top_matches, write_matches

    config = shared.config
    assert config.query is not None
    feature = encode_texts(model, [config.query], batch_size=1, spread=True, store=shared.store)[0]  # (D,)
    places, scores = top_matches(encoded.image_features, feature, config.top)
    found = [Match(encoded.keys[place], score) for place, score in zip(places.tolist(), scores.tolist(), strict=True)]
    written = [folder / "matches.csv", folder / "matches.png"]
    if shared.process.is_main:
        write_matches(written[0], config.query, found)
        pictures = pictures_of(task, [match.file for match in found])
        draw_contact_sheet(matches_sheet([pictures[match.file] for match in found], found), written[1],
                           title=f"{config.images}: nearest to {config.query!r}")
    return matches_table(found), written


class ProgressLine:
    """A live line: how many pictures are encoded."""

    def __init__(self, prefix: str, is_main: bool) -> None:
        from clipkit.training.live_line import LiveLine

        self.prefix, self.line = prefix, LiveLine(sys.stdout) if is_main else None

    def progress(self, done: int, total: int | None) -> None:
        if self.line:
            self.line.update(f"{self.prefix}{done:,}{f' of {total:,}' if total else ''} images")

    def close(self) -> None:
        if self.line:
            self.line.close()


def print_comparisons(names: Sequence[str], folders: Sequence[Path]) -> None:
    """Compare every model with the first, question by question."""
    from clipkit.evaluation.comparison import comparison_table, read_predictions
    from clipkit.evaluation.paired import compare_predictions

    first = read_predictions(folders[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        print(f"\n{name} against {names[0]}\n{comparison_table(compare_predictions(first, read_predictions(folder)))}")


def model_names(sources: Sequence[str]) -> list[str]:
    """Short names of models: of a run or a folder its own name, else open_clip's.

    Raises:
      ValueError: two models would have one name, and so one folder for their results.
    """
    names = []
    for source in sources:
        path = Path(source).expanduser()
        of_run = path.parent if path.name == "model" and (path.parent / "config.yaml").is_file() else path
        names.append(of_run.resolve().name if path.is_dir() else source.replace("/", "-"))
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"several models are called {', '.join(twice)}; measure them one by one, each with its own out=...")
    return names


def output_folder(config: ZeroShotConfig, source: str, name: str) -> Path:
    """Where a model's results go: its run, else zero_shot/<name>, or `out` (of several models, a folder each in it)."""
    if config.out:
        return Path(config.out).expanduser() / (name if len(config.model) > 1 else "")
    path = Path(source).expanduser()
    run = path.parent if path.name == "model" else path
    return run / "zero_shot" if (run / "config.yaml").is_file() else Path("zero_shot") / name


def run_step(source: Path) -> int | None:
    """The step that a run's model is of: its newest checkpoint. None where there is no run."""
    latest = (source.parent if source.name == "model" else source) / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else None


def report(folder: Path, name: str, tasks: "Sequence[Task]", results: Any, predictions: Any, provenance: Any) -> Path:
    """Write report.html."""
    import datetime
    from importlib.metadata import version

    from pandas import DataFrame

    from clipkit.evaluation.report import SECTIONS, write_report

    path = folder / "report.html"
    by_name = {task.name: task for task in tasks}
    shown = DataFrame() if predictions is None else predictions[predictions["kind"].isin(SECTIONS)]
    write_report(path, title=name, provenance=provenance, results=results,
                 predictions=shown,
                 prompts={task.name: task.prompts for task in tasks}, classes={task.name: task.classes for task in tasks},
                 thumbnails=lambda task, keys: pictures_of(by_name[task], keys),
                 date=datetime.date.today().isoformat(),
                 versions={library: version(library) for library in ("torch", "open_clip_torch", "timm")})
    return path


def pictures_of(task: "Task", keys: Sequence[str]) -> "dict[str, Image]":
    """Read some of a task's pictures again, by key."""
    from clipkit.evaluation.tasks import TaskSample

    wanted, found = set(keys), {}
    for sample in task.images.read():
        if isinstance(sample, TaskSample) and sample.key in wanted:
            found[sample.key] = sample.image
            if len(found) == len(wanted):
                break
    return found


def write_table(table: Any, path: Path) -> Path:
    """Write a DataFrame as Parquet, whole or not at all."""
    beside = path.with_name(f".{path.name}")
    table.to_parquet(beside, index=False)
    beside.replace(path)
    return path


def _say_nothing(*_: object, **__: object) -> None:
    """What the other processes say."""
