"""Suites: open their tasks, and average the one number of each that counts, with an interval."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.config.command_line import conf_dir
from clipkit.config.schema import parse
from clipkit.config.settings_files import check_settings_file
from clipkit.config.suite import SUITE_METRICS, SuiteConfig, SuiteTaskConfig
from clipkit.evaluation.outcome import Outcome
from clipkit.evaluation.results import Result, align
from clipkit.evaluation.statistics import average_interval
from clipkit.evaluation.tasks import Task, load_task
from clipkit.training.distributed import gather_objects

if TYPE_CHECKING:
    from pandas import DataFrame

KIND = "suite"  # of the average's row in results.csv
TABLE = "suite"  # suite.csv: a row a task, those left out too


def read_suite(name: str | Path) -> SuiteConfig:
    """Read a suite by the name that `clipkit zero-shot suite=...` knows, or from a .yaml file.

    Raises:
      FileNotFoundError: there is no such suite.
      ValueError: the file says something that a suite does not have.
    """
    from omegaconf import OmegaConf

    folder = conf_dir() / "zero-shot" / "suite"
    path = Path(name) if Path(name).suffix == ".yaml" else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise FileNotFoundError(f"there is no suite {str(name)!r}; choose one of {known}, or give a .yaml file")
    check_settings_file(path)
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no suite: it needs name and tasks")
    return parse(SuiteConfig, {str(key): value for key, value in values.items()}, str(name))


def measured_tasks(suite: SuiteConfig) -> list[SuiteTaskConfig]:
    """The tasks of a suite that are not left out."""
    return [one for one in suite.tasks if one.task is not None]


def open_suite(suite: SuiteConfig, *, cache_dir: str | Path | None = None) -> tuple[SuiteConfig, list[Task], dict[str, str]]:
    """Open those tasks of a suite that can be had. All processes must call this, and all get the same.

    Returns:
      The suite, in which the others are left out with the reason; its tasks in its order; {name: reason} of the others.

    Raises:
      FileNotFoundError: none can be had.
      ValueError: a task is not of the kind that its metric is made for.
    """
    tasks, missing = {}, {}
    for one in measured_tasks(suite):
        failure = None
        try:
            tasks[one.name] = _load(suite, one, cache_dir)
        except OSError as error:
            failure = " ".join(str(error).split())
        failures = [text for text in gather_objects(failure) if text is not None]
        if failures:
            missing[one.name] = failures[0]
    if len(missing) == len(measured_tasks(suite)):
        name, reason = next(iter(missing.items()))
        raise FileNotFoundError(f"none of the {len(missing)} sets of suite {suite.name} can be had; {name}: {reason}")
    left_out = {name: SuiteTaskConfig(name=name, left_out=f"it cannot be had: {reason}") for name, reason in missing.items()}
    kept = tuple(left_out.get(one.name, one) for one in suite.tasks)
    return replace(suite, tasks=kept), [task for name, task in tasks.items() if name not in missing], missing


def _load(suite: SuiteConfig, one: SuiteTaskConfig, cache_dir: str | Path | None) -> Task:
    assert one.task is not None and one.metric is not None
    source = f"{one.task}@{one.revision}" if one.revision else one.task
    task = load_task(source, cache_dir=cache_dir, split=one.split, templates=one.prompts, duplicates="keep")
    if task.kind != SUITE_METRICS[one.metric]:
        fitting = ", ".join(metric for metric, kind in SUITE_METRICS.items() if kind == task.kind)
        raise ValueError(f"metric of {one.name} in suite {suite.name} is {one.metric}, but {source} is made for "
                         f"{task.kind}; {f'choose one of {fitting}' if fitting else 'leave the task out'}")
    return task


def summarise(suite: SuiteConfig, tasks: Sequence[Task], results: Sequence[Result],
              published: Mapping[str, float] | None = None) -> Outcome:
    """Average the main metrics of a suite.

    The tasks are fixed and the images are the sample: the interval is that of the same average on new images of the same
    tasks, from the intervals of independent tasks (`average_interval`).

    Args:
      suite: what was asked for.
      tasks: as `open_suite` opened them.
      results: of all of them; of several prompt rules the first counts.
      published: {source of a task: its main metric elsewhere}, for the table.

    Returns:
      One result, `average`, or `average_<k>_of_<n>` where tasks are left out; notes on those, and on tasks of another
      size than the suite says; and a table "suite" with a row a task.
    """
    from pandas import DataFrame

    rows, notes, done = [], [], []
    opened = dict(zip((one.name for one in measured_tasks(suite)), tasks, strict=True))
    for one in suite.tasks:
        row: dict[str, object] = {"suite": suite.name, "name": one.name, "left_out": one.left_out}
        rows.append(row)
        if one.name not in opened:
            notes.append(f"suite {suite.name} without {one.name}: {one.left_out}")
            continue
        task = opened[one.name]
        result = _main_result(one, task, results)
        done.append(result)
        row.update(task=task.name, split=task.split, commit=task.commit or None, metric=one.metric, value=result.value,
                   ci_low=result.ci_low, ci_high=result.ci_high, n=result.n, n_expected=one.n, n_bad=result.n_bad,
                   prompts=result.prompts, published=(published or {}).get(task.name))
        if one.n is not None and one.n != result.n:
            bad = f" (and {result.n_bad:,} that could not be used)" if result.n_bad else ""
            notes.append(f"{one.name} has {result.n:,} images{bad}, the suite expects {one.n:,}")
    average = _average(suite, done)
    columns = ["suite", "name", "task", "split", "commit", "metric", "value", "ci_low", "ci_high", "published", "n",
               "n_expected", "n_bad", "prompts", "left_out"]
    table = DataFrame(rows, columns=columns).astype(dict.fromkeys(("n", "n_expected", "n_bad"), "Int64"))
    return Outcome([average], None, tuple(notes), {TABLE: table})


def suite_table(table: "DataFrame", average: Result) -> str:
    """Write a suite's table and average as plain text; fractions in percent."""
    from pandas import isna

    measured = table.loc[table["left_out"].isna()].to_dict(orient="records")
    cells = [["task", "metric", "n", "", "95 %", "published"]]
    for row in measured:
        cells.append([row["name"], row["metric"], f"{int(row['n']):,}", f"{row['value']:.2%}",
                      _interval(row["ci_low"], row["ci_high"]), "" if isna(row["published"]) else f"{row['published']:.2%}"])
    published = [row["published"] for row in measured if not isna(row["published"])]
    of_published = f"{sum(published) / len(published):.2%}" if len(published) == len(measured) else ""  # of the same tasks
    cells.append([f"{average.task}: {average.metric}", "", f"{average.n:,}", f"{average.value:.2%}",
                  _interval(average.ci_low, average.ci_high), of_published])
    return align(cells)


def _main_result(one: SuiteTaskConfig, task: Task, results: Sequence[Result]) -> Result:
    """The number of a task that counts, with its interval."""
    own = [result for result in results if (result.task, result.split, result.kind) == (task.name, task.split, task.kind)]
    by_metric = {result.metric: result for result in reversed(own)}  # of several prompt rules the first
    if one.metric != "mean_recall@1":
        assert one.metric is not None
        return by_metric[one.metric]
    both = [by_metric[f"{way}_retrieval_recall@1"] for way in ("text", "image")]
    # Both ways ask about the same images. The interval is right where they rise and fall together, else a little wide.
    value, low, high = (sum(getattr(result, name) for result in both) / 2 for name in ("value", "ci_low", "ci_high"))
    return Result(**{**vars(both[0]), "metric": one.metric, "value": value, "ci_low": low, "ci_high": high})


def _average(suite: SuiteConfig, done: Sequence[Result]) -> Result:
    known = [(result.value, result.ci_low, result.ci_high) for result in done]
    value, low, high = average_interval([(value, low, high) for value, low, high in known
                                         if low is not None and high is not None])
    metric = "average" if len(done) == len(suite.tasks) else f"average_{len(done)}_of_{len(suite.tasks)}"
    return Result(task=suite.name, split="", kind=KIND, metric=metric, value=value, n=sum(result.n for result in done),
                  ci_low=low, ci_high=high, num_classes=None, prompts="", n_bad=sum(result.n_bad for result in done))


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2%} - {high:.2%}"
