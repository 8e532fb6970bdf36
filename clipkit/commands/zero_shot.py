"""`clipkit zero-shot`: measure any CLIP on any labelled or captioned pictures, or put names to your own."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipkit.config.launch import launch
from clipkit.config.zero_shot import ZeroShotConfig

if TYPE_CHECKING:
    from pandas import DataFrame

    from clipkit.evaluation.outcome import Outcome
    from clipkit.evaluation.results import Provenance
    from clipkit.evaluation.tasks import Task

TIMEOUT_SECONDS = 3600  # that a process waits for the others: one may have far more, or far larger, pictures


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
      FileNotFoundError: there is no such model, task or folder; or, at the end, a set of the suite could not be had.
      ValueError: a setting, the data or the model cannot be used.
    """
    print(f"clipkit zero-shot: {', '.join(config.model)} (loading)", flush=True)
    from clipkit.data.hub import go_offline
    from clipkit.evaluation.measured_models import model_names, results_folders
    from clipkit.evaluation.results import read_results
    from clipkit.evaluation.store import EmbeddingStore
    from clipkit.training.distributed import start_process, stop_process

    if config.offline:
        go_offline()
    process = start_process(config.device, TIMEOUT_SECONDS)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(stop_process)
        shared = Shared(config, process, EmbeddingStore(config.cache_dir) if config.store else None)
        if config.images is not None:
            look_at_pictures(shared)
            return
        names = model_names(config.model)
        folders = results_folders(config.model, names, config.out)
        for folder in folders:
            read_results(folder)  # those of another schema stop this before any work
        config, tasks, missing = load_tasks(shared)
        shared, predictions = shared._replace(config=config), []
        for source, name, folder in zip(config.model, names, folders, strict=True):
            predictions.append(measure_model(shared, source, name, tasks, folder))
        if process.is_main and len(config.model) > 1:
            print_comparisons(names, predictions)
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(missing) + len(tasks)} sets could not be had: "
                f"{'; '.join(f'{name}: {reason}' for name, reason in missing.items())}. The others are measured and written; "
                "give the same command again when these can be had")


def load_tasks(shared: Shared) -> "tuple[ZeroShotConfig, list[Task], dict[str, str]]":
    """Open the tasks, before any model is loaded.

    Returns:
      The settings, in whose suite the sets that cannot be had are left out; the tasks; {name: reason} of those sets.
    """
    from clipkit.evaluation.groups import with_groups
    from clipkit.evaluation.probes import PROBES
    from clipkit.evaluation.suites import open_suite
    from clipkit.evaluation.tasks import EMOJI_SPLITS, load_task

    config = shared.config
    if config.suite is not None:
        suite, tasks, missing = open_suite(config.suite, cache_dir=config.cache_dir)
        return replace(config, suite=suite), tasks, missing
    fetch_train = any(kind in PROBES for kind in config.kind or ())
    tasks = [load_task(name, cache_dir=config.cache_dir, split=config.split, templates=config.templates,
                       fetch_train=fetch_train, duplicates=config.duplicates) for name in config.task or EMOJI_SPLITS]
    if config.group is not None:
        tasks = [with_groups(task, config.group, shared.store) for task in tasks]
    return config, tasks, {}


def measure_model(shared: Shared, source: str, name: str, tasks: "Sequence[Task]", folder: Path) -> "DataFrame | None":
    """Measure one model on all tasks; write results and predictions after each, and the report. Return the predictions."""
    from clipkit import __version__
    from clipkit.evaluation.comparison import PREDICTIONS
    from clipkit.evaluation.lazy_model import facts_of, open_model
    from clipkit.evaluation.measured_models import run_step
    from clipkit.evaluation.nearest_neighbour import emoji_pixel_baselines
    from clipkit.evaluation.outcome import join, write_tables
    from clipkit.evaluation.results import Provenance, read_results, results_table, write_results

    config, process = shared.config, shared.process
    pretrained = None if Path(source).expanduser().is_dir() else config.pretrained
    model = open_model(source, pretrained=pretrained, device=process.device, store=shared.store)
    facts = facts_of(model)
    provenance = Provenance(name, pretrained, "fp32", facts.source_sha256, run_step(source), __version__)
    say = print if process.is_main else _say_nothing
    say(f"model     {name}, {facts.num_parameters / 1e6:.1f} M parameters, {facts.image_size} px")
    if any((row["name"], row["weights_sha256"]) != (name, facts.source_sha256) for row in read_results(folder)):
        say(f"note      the results of other weights in {folder} are replaced")
    outcomes = []
    for task in tasks:
        outcomes.append(measure_task(shared, model, task, say))
        if process.is_main:
            keep(folder, outcomes[-1], provenance)
    if not process.is_main:
        return None
    outcome = against_published(config, source, pretrained, model, tasks, join(outcomes))
    results = outcome.results + emoji_pixel_baselines([task.name for task in tasks], shared.store)
    write_results(folder, results, provenance)
    say("\n" + results_table(results) + "\n")
    written = [folder / "results.csv", folder / "results.json", *write_tables(folder, outcome.tables)]
    if outcome.predictions is not None:
        written.append(folder / PREDICTIONS)
    if config.report:
        written.append(report(folder, name, tasks, outcome._replace(results=results), provenance))
    say(f"written   {', '.join(str(path) for path in written)}")
    return outcome.predictions


def against_published(config: ZeroShotConfig, source: str, pretrained: str | None, model: Any, tasks: "Sequence[Task]",
                      outcome: "Outcome") -> "Outcome":
    """Say where published results of the same model are met; add the average of a suite."""
    from clipkit.evaluation.outcome import join
    from clipkit.evaluation.reference import main_values, reference_lines
    from clipkit.evaluation.suites import TABLE, suite_table, summarise

    for line in reference_lines(source, pretrained, lambda: model.config, tasks, outcome.results):
        print(f"published {line}")
    if config.suite is None:
        return outcome
    summary = summarise(config.suite, tasks, outcome.results, main_values(source, pretrained, tasks))
    for note in summary.notes:
        print(f"note      {note}")
    print("\n" + suite_table(summary.tables[TABLE], summary.results[0]))
    return join([outcome, summary])


def keep(folder: Path, outcome: "Outcome", provenance: "Provenance") -> None:
    """Write what was measured on one task beside what is there: a call that ends early has lost nothing."""
    from clipkit.evaluation.prediction_files import write_predictions_file
    from clipkit.evaluation.results import write_results

    if outcome.predictions is not None:
        write_predictions_file(folder, outcome.predictions, provenance)
    write_results(folder, outcome.results, provenance)


def measure_task(shared: Shared, model: Any, task: "Task", say: Any) -> "Outcome":
    """Measure a model on one task in each of the ways asked for, with a line before and one after."""
    import time

    from clipkit.evaluation.lazy_model import count_cut, facts_of
    from clipkit.evaluation.outcome import join
    from clipkit.evaluation.probes import ProbeSettings
    from clipkit.evaluation.progress_line import ProgressLine
    from clipkit.evaluation.tasks import CLASSIFICATION
    from clipkit.evaluation.zero_shot import measure

    config, started = shared.config, time.monotonic()
    probe = ProbeSettings(config.features, config.shots, config.seeds)
    with ProgressLine(f"task      {task.name}: ", shared.process.is_main) as line:
        outcome = join([measure(model, task, kind=kind, batch_size=config.batch_size, store=shared.store,
                                workers=config.workers, progress=line.show, probe=probe,
                                with_templates=config.template_effects)
                        for kind in config.kind or (task.kind,)])
    result = outcome.results[0]
    bad = f", {result.n_bad:,} bad samples left out" if result.n_bad else ""
    asked = "questions" if task.questions else "images"
    say(f"task      {task.name}: {result.n:,} {asked}{bad}, {time.monotonic() - started:.1f} s")
    notes = [*task.notes, *outcome.notes]
    if config.template_effects and CLASSIFICATION not in (config.kind or (task.kind,)):
        notes.append(f"template_effects is about {CLASSIFICATION}, which {task.name} is not measured in")
    texts = list(dict.fromkeys([*(text for rule in task.prompts.values() for of_class in rule for text in of_class),
                                *(caption for question in task.questions for caption in question.captions)]))
    num_cut = count_cut(model, texts, shared.store) if shared.process.is_main else 0
    if num_cut:
        notes.append(f"{num_cut:,} of {len(texts):,} prompts are longer than the {facts_of(model).context_length} tokens that "
                     "the text encoder takes; the rest of each is cut off")
    for note in notes:
        say(f"note      {note}")
    return outcome


def look_at_pictures(shared: Shared) -> None:
    """Name one's own pictures by classes=[..], or find those nearest to query=..; no labels needed."""
    from clipkit.evaluation.classifier import class_weights
    from clipkit.evaluation.encode import encode_task, encode_texts
    from clipkit.evaluation.lazy_model import logit_scale_of, open_model
    from clipkit.evaluation.pictures import find_pictures, name_pictures
    from clipkit.evaluation.progress_line import ProgressLine
    from clipkit.evaluation.prompt_rules import prompt_rules
    from clipkit.evaluation.tasks import RETRIEVAL, Task, pictures_in

    config, process = shared.config, shared.process
    assert config.images is not None
    images = pictures_in(Path(config.images).expanduser())
    model = open_model(config.model[0], pretrained=config.pretrained, device=process.device, store=shared.store)
    task = Task(name=config.images, split="all", kind=RETRIEVAL, images=images)
    with ProgressLine(f"{task.name}: ", process.is_main) as line:
        encoded = encode_task(model, task, batch_size=config.batch_size, spread=True, store=shared.store,
                              workers=config.workers, progress=line.show)
    folder = Path(config.out).expanduser() if config.out else Path("zero_shot") / Path(config.images).resolve().name
    if config.classes:
        prompts = next(iter(prompt_rules(config.classes, config.templates).values()))  # the first rule
        weight = class_weights(model, prompts, batch_size=config.batch_size, spread=True, store=shared.store)  # (C, D)
        look = partial(name_pictures, task, encoded, weight, classes=config.classes, logit_scale=logit_scale_of(model))
    else:
        assert config.query is not None
        query = encode_texts(model, [config.query], batch_size=1, spread=True, store=shared.store)[0]  # (D,)
        look = partial(find_pictures, task, encoded, config.query, query)
    if process.is_main:
        table, written = look(top=config.top, folder=folder)
        bad = f"\nleft out as bad: {dict(encoded.num_bad)}" if encoded.num_bad else ""
        print(f"{table}{bad}\nwritten   {', '.join(str(path) for path in written)}")


def print_comparisons(names: Sequence[str], predictions: "Sequence[DataFrame | None]") -> None:
    """Compare every model with the first, question by question."""
    from clipkit.evaluation.comparison import comparison_table
    from clipkit.evaluation.paired import compare_predictions

    first = predictions[0]
    for name, table in zip(names[1:], predictions[1:], strict=True):
        if first is not None and table is not None:
            print(f"\n{name} against {names[0]}\n{comparison_table(compare_predictions(first, table))}")


def report(folder: Path, name: str, tasks: "Sequence[Task]", outcome: "Outcome", provenance: Any) -> Path:
    """Write report.html."""
    import datetime
    from importlib.metadata import version

    from pandas import DataFrame

    from clipkit.evaluation.pictures import pictures_of
    from clipkit.evaluation.report import write_report

    path = folder / "report.html"
    by_name = {task.name: task for task in tasks}
    write_report(path, title=name, provenance=provenance, results=outcome.results, tables=outcome.tables,
                 predictions=DataFrame() if outcome.predictions is None else outcome.predictions,
                 prompts={task.name: task.prompts for task in tasks}, classes={task.name: task.classes for task in tasks},
                 thumbnails=lambda task, keys: pictures_of(by_name[task], keys),
                 date=datetime.date.today().isoformat(),
                 versions={library: version(library) for library in ("torch", "open_clip_torch", "timm")})
    return path


def _say_nothing(*_: object, **__: object) -> None:
    """What the other processes say."""
