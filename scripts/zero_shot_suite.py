"""Measure many models on a suite or on many sets: one load a model, what is done is skipped, one table at the end.

    python scripts/zero_shot_suite.py --suite imagenet_shifts --out suite \
        --models ViT-B-32/openai ViT-B-32/laion2b_s34b_b79k runs/emoji hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K

A model is an open_clip name with its tag (name/tag), a run or folder, or hf-hub:<org>/<name>. A suite is one that
`clipkit zero-shot suite=...` knows or a .yaml file; --tasks in its place takes what `clipkit zero-shot task=...` takes.
Each model's results go to <out>/<model>/ as soon as a task is done; <out>/leaderboard.csv has a row a model and, for a
suite, the columns of open_clip's tables of results. For new weights under an old name, give another --out.

Expected (open_clip's published tables, acc1 in percent):

                                       ImageNet v2   ImageNet-A   ImageNet-R   ImageNet Sketch   ObjectNet
    RN50 openai                              52.84        23.27        60.73             35.44       41.41
    ViT-B-32 openai                          55.92        31.55        69.33             42.29       44.31
    ViT-B-16 openai                          61.88        49.95        77.70             48.24       55.31
    ViT-L-14 openai                          69.83        70.75        87.84             59.59       68.89
    ViT-B-32 laion2b_s34b_b79k               58.14        26.27        76.43             53.66       48.83
    ViT-B-16 laion2b_s34b_b88k               62.28        38.23        80.61             56.08       55.98
    ViT-L-14 datacomp_xl_s13b_b90k           72.05        69.59        90.83             67.95       74.25
    ViT-H-14 laion2b_s32b_b79k               70.90        59.35        89.34             66.57       69.41
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clipkit import __version__
from clipkit.config.suite import SuiteConfig
from clipkit.evaluation.measured_models import run_step
from clipkit.evaluation.reference import main_values
from clipkit.evaluation.results import Provenance, Result, read_results, results_table, write_results
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.suites import TABLE, open_suite, read_suite, suite_table, summarise
from clipkit.evaluation.tasks import Task, load_task
from clipkit.training.atomic_files import write_text_atomically


@dataclass(frozen=True)
class Settings:
    """How models are measured."""

    out: Path
    device: str = "cpu"
    batch_size: int = 256
    workers: int = 0
    cache_dir: str | None = None


@dataclass(frozen=True)
class Model:
    """A model by what `load_model` takes."""

    source: str
    pretrained: str | None

    @property
    def name(self) -> str:
        path = Path(self.source)
        return path.resolve().name if path.is_dir() else self.source.removeprefix("hf-hub:").replace("/", "-")

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.pretrained}" if self.pretrained else self.name


def main() -> int:
    options = arguments()
    settings = Settings(Path(options.out), options.device, options.batch_size, options.workers, options.cache_dir)
    try:
        suite = read_suite(options.suite) if options.suite else None
        models = [as_model(text) for text in options.models]
        missing: dict[str, str] = {}
        if suite:
            suite, tasks, missing = open_suite(suite, cache_dir=settings.cache_dir)
        else:
            tasks = [load_task(name, cache_dir=settings.cache_dir) for name in options.tasks]
        rows = []
        for model in models:
            results = measure_model(model, tasks, settings)
            rows.append(leaderboard_row(model, suite, tasks, results))
            write_leaderboard(settings.out / "leaderboard.csv", rows)
    except (OSError, ValueError) as error:
        print(f"zero_shot_suite: {error}", file=sys.stderr)
        return 2
    print(f"written   {settings.out / 'leaderboard.csv'}")
    for name, reason in missing.items():
        print(f"zero_shot_suite: {name} was left out: {reason}", file=sys.stderr)
    return 2 if missing else 0


def as_model(text: str) -> Model:
    """Read name/tag, a folder, or hf-hub:<org>/<name>.

    Raises:
      FileNotFoundError: a path that does not exist.
    """
    if Path(text).is_dir() or text.startswith("hf-hub:"):
        return Model(text, None)
    name, slash, tag = text.partition("/")
    if not slash or "/" in tag:
        raise FileNotFoundError(f"model {text!r} is no folder; give one, an open_clip name with its tag (ViT-B-32/openai), or "
                                "hf-hub:<org>/<name>")
    return Model(name, tag)


def measure_model(model: Model, tasks: Sequence[Task], settings: Settings) -> list[Result]:
    """Measure a model on the tasks that its folder has no results of; return the results of all of them."""
    folder = settings.out / model.folder
    done = {(row["task"], row["split"]) for row in read_results(folder)}
    waiting = [task for task in tasks if (task.name, task.split) not in done]
    print(f"model     {model.folder}: {len(tasks) - len(waiting)} of {len(tasks)} tasks are done", flush=True)
    if waiting:
        measure_tasks(model, waiting, folder, settings)
    wanted = {(task.name, task.split) for task in tasks}
    names = [field.name for field in fields(Result)]
    results = [Result(**{name: row[name] for name in names}) for row in read_results(folder)
               if (row["task"], row["split"]) in wanted]
    print(results_table(results))
    return results


def measure_tasks(model: Model, tasks: Sequence[Task], folder: Path, settings: Settings) -> None:
    """Load a model once, and write the results of each task when they are there."""
    from clipkit.evaluation.zero_shot import measure
    from clipkit.model.folder import load_model

    loaded = load_model(model.source, pretrained=model.pretrained, device=settings.device)
    provenance = Provenance(model.name, model.pretrained, "fp32", loaded.source_sha256, run_step(model.source), __version__)
    store = EmbeddingStore(settings.cache_dir)
    for task in tasks:
        outcome = measure(loaded, task, batch_size=settings.batch_size, store=store, workers=settings.workers)
        write_results(folder, outcome.results, provenance)
        for note in (*task.notes, *outcome.notes):
            print(f"note      {note}")
        print(f"task      {task.name}: {outcome.results[0].n:,} images", flush=True)


def leaderboard_row(model: Model, suite: SuiteConfig | None, tasks: Sequence[Task],
                    results: Sequence[Result]) -> dict[str, Any]:
    """One model's line of the table: the main metrics and the average of a suite, or the first metric of each task."""
    row: dict[str, Any] = {"name": model.name, "pretrained": model.pretrained}
    if suite is None:
        return row | {result.task: result.value for result in reversed(results)}
    summary = summarise(suite, tasks, results, main_values(model.source, model.pretrained, tasks))
    average, table = summary.results[0], summary.tables[TABLE]
    print("\n".join(["", suite_table(table, average), *(f"note      {note}" for note in summary.notes), ""]))
    measured = table[table["left_out"].isna()]
    return row | {average.metric: average.value, "ci_low": average.ci_low, "ci_high": average.ci_high} | dict(
        zip(measured["name"], measured["value"], strict=True))


def write_leaderboard(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from pandas import DataFrame

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite")
    what.add_argument("--tasks", nargs="+")
    parser.add_argument("--out", default="zero_shot_suite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache-dir")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
