"""Accuracy by group: what a column of the metadata says tells which pictures belong together. Worst group, gap."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from clipkit.evaluation.outcome import Outcome
from clipkit.evaluation.results import Result, hit_metric
from clipkit.evaluation.sample_keys import printable
from clipkit.evaluation.statistics import clustered_interval
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import CHOICE, Groups, Task

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_GROUPS = 1000  # of a task: more say that the column tells single pictures apart
NAMES_SHOWN = 12  # in messages
ASKED = ["kind", "prompts", "direction"]  # answers that are equal in these are measured together


def with_groups(task: Task, column: str, store: EmbeddingStore | None = None) -> Task:
    """Read what a column of a table, or a field of the samples' json, says of each picture of a task.

    Args:
      task: with pictures in a table or in shards.
      column: its name; values are text, numbers or true and false.
      store: where the values are kept: shards are read for them once.

    Raises:
      ValueError: no picture has such a value, or there are more than 1000 different ones.
    """
    if task.questions:
        rows = [question.fields for question in task.questions]
        values = {number: str(row[column]) for number, row in enumerate(rows) if _is_group(row.get(column))}
        groups, known = Groups(column, {}, values), sorted({name for row in rows for name in row})
    else:
        def find() -> tuple[dict[str, str], list[str]]:
            values, known = {}, set()
            for key, fields in task.images.fields():
                known |= {name for name, value in fields.items() if _is_group(value)}
                if _is_group(fields.get(column)):
                    values[printable(key)] = str(fields[column])
            return values, sorted(known)

        values, known = store.fact(["groups", column, task.images.fingerprint], find) if store else find()
        groups = Groups(column, values, {})
    if not values:
        there = ", ".join(known[:NAMES_SHOWN]) + (", ..." if len(known) > NAMES_SHOWN else "")
        raise ValueError(f"group is {column!r}, which no picture of task {task.name} has a value of; "
                         f"{f'choose one of {there}' if known else 'its pictures have no other columns or json fields'}")
    if len(set(values.values())) > MAX_GROUPS:
        raise ValueError(f"group is {column!r}, which has {len(set(values.values())):,} values in task {task.name}; give a "
                         f"column with at most {MAX_GROUPS:,}")
    return replace(task, groups=groups)


def group_outcome(groups: Groups, outcome: Outcome) -> Outcome:
    """Measure each group by itself.

    Args:
      groups: of the task that was measured.
      outcome: of one kind, with the answer to each question.

    Returns:
      For each kind, prompt rule and direction of the answers (of choices, for acc) the share of hits in each group, the
      worst of them, and the distance of the best from it; notes on the worst and on pictures without a group.
    """
    if outcome.predictions is None:
        kinds = ", ".join(dict.fromkeys(result.kind for result in outcome.results))
        return Outcome([], None, (f"group={groups.column} is about single answers, of which {kinds} has none",))
    results, notes = [], []
    for _, rows in outcome.predictions.groupby(ASKED, sort=False):
        kind, prompts, direction = (str(rows[column].iloc[0]) for column in ASKED)
        if kind == CHOICE and direction:
            continue  # a part of the question that acc is about
        metric = hit_metric(kind, direction)
        whole = next(one for one in outcome.results if (one.kind, one.prompts, one.metric) == (kind, prompts, metric))
        found = _group_results(groups, whole, rows)
        results += found
        num_without = len(rows) - sum(one.n for one in found)
        if len(found) > 1:
            worst, *_, best = sorted(found, key=lambda one: (one.value, -one.n, one.metric))
            results += [replace(worst, metric=f"worst_group_{metric}"), _gap(best, worst, metric)]
            notes.append(f"{len(found)} groups of {whole.task} under {prompts}: lowest {worst.metric}, {worst.value:.1%} of "
                         f"{worst.n:,}; highest {best.metric}, {best.value:.1%} of {best.n:,}")
        if num_without:
            notes.append(f"{num_without:,} of {len(rows):,} answers on {whole.task} are in no group: no value of "
                         f"{groups.column}")
    return Outcome(results, None, tuple(notes))


def _group_results(groups: Groups, whole: Result, rows: "DataFrame") -> list[Result]:
    """The share of hits in each group, by name."""
    of, column = (groups.of_question, "question") if groups.of_question else (groups.of_key, "key")
    names = rows[column].map(of.get)
    results = []
    for name, of_group in rows.groupby(names, sort=True):  # leaves out those without
        hits = torch.tensor((of_group["rank"] == 0).tolist())  # (n,)
        clusters = torch.tensor(of_group["key"].factorize()[0].tolist())  # (n,) several answers about one picture
        low, high = clustered_interval(hits, clusters)
        results.append(replace(whole, metric=f"{whole.metric}[{groups.column}={name}]", value=hits.double().mean().item(),
                               n=len(hits), ci_low=low, ci_high=high))
    return results


def _gap(best: Result, worst: Result, metric: str) -> Result:
    """The difference of two groups, with its interval from both of theirs (Newcombe 1998, Statistics in Medicine 17)."""
    assert best.ci_low is not None and best.ci_high is not None and worst.ci_low is not None and worst.ci_high is not None
    gap = best.value - worst.value
    return replace(best, metric=f"group_gap_{metric}", value=gap, n=best.n + worst.n,
                   ci_low=gap - math.hypot(best.value - best.ci_low, worst.ci_high - worst.value),
                   ci_high=gap + math.hypot(best.ci_high - best.value, worst.value - worst.ci_low))


def _is_group(value: object) -> bool:
    return isinstance(value, str | int | float) and str(value).strip() not in ("", "nan")
