"""The results as the tables of a report: a value large, its interval small, and both as a bar from 0 to 100 %."""

import math
from collections.abc import Mapping, Sequence

from clipkit.evaluation.report_figures import interval_bar
from clipkit.evaluation.report_page import breakable, escape, name
from clipkit.evaluation.results import NO_FRACTIONS, ONLY_IN_FILES, Result, is_of_group, short_name
from clipkit.evaluation.tasks import CHOICE, CLASSIFICATION, MULTI_LABEL, RETRIEVAL

KIND_TITLES = {CLASSIFICATION: "Zero-shot classification", RETRIEVAL: "Retrieval", MULTI_LABEL: "Multi-label classification",
               CHOICE: "Choice of captions", "linear_probe": "Linear probe", "knn": "Nearest pictures", "few_shot": "Few-shot",
               "tip_adapter": "Tip-Adapter", "suite": "Suite"}
METRIC_MEANINGS = {
    "acc1": "share of pictures whose first guess is right",
    "acc5": "share with the right class among the first five guesses",
    "mean_per_class_recall": "share recognised of each class, averaged over the classes",
    "image_retrieval_recall@1": "share of texts that find their own picture first (@5, @10: among the first 5 or 10)",
    "text_retrieval_recall@1": "share of pictures that find one of their own texts first (@5, @10: among the first 5 or 10)",
    "mean_average_precision": "area under precision over recall, averaged over the classes",
    "image_retrieval_median_rank": "middle place of the own picture over all texts (1 = first)",
    "text_retrieval_median_rank": "middle place of the best own text over all pictures (1 = first)",
    "macro_auroc": "area under the ROC curve, averaged over the classes",
    "micro_auroc": "area under the ROC curve of all pairs of picture and class",
    "lp_acc1": "acc1 of a linear probe, trained on labels",
    "lp_lambda": "the probe's regularisation, chosen on validation data",
    "knn_acc1": "acc1 of a weighted vote of the nearest pictures of the train split",
    "knn_k": "pictures that vote, chosen on validation data",
    "knn_temperature": "a vote weighs exp(cosine / temperature), chosen on validation data",
    "zeroshot_acc1": "acc1 by texts alone, on the same pictures",
    "acc": "share of questions with nothing but right choices; of equally near answers none is right",
    "text_acc": "share of questions in which each picture finds its caption",
    "image_acc": "share of questions in which each caption finds its picture",
    "worst_group_acc1": "acc1 of the group with the lowest",
    "group_gap_acc1": "acc1 of the best group less that of the worst",
    "ece": "expected calibration error: mean distance of probability and share right, at the learned scale",
    "ece_100": "the same at scale 100",
    "nll": "mean negative logarithm of the right class's probability, nats, at the learned scale",
    "nll_100": "the same at scale 100",
    "tie_rate": "share of questions with another answer of exactly the top score",
}
NO_CELL = "<td></td>"


def results_tables(results: Sequence[Result]) -> str:
    """Write a table for each kind of task, with a line for each task and prompt rule and a column for each metric.

    Metrics that the terminal's table leaves out stand in a table of their own, folded away.
    """
    parts = []
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind and not is_of_group(result.metric)]
        main = [result for result in of_kind if result.metric not in ONLY_IN_FILES]
        more = [result for result in of_kind if result.metric in ONLY_IN_FILES]
        folded = f"<details><summary>More metrics</summary>{_table(more)}</details>" if main and more else ""
        parts.append(f"<h3>{kind_title(kind)}</h3>{_table(main or more)}{folded}")
    return "\n".join(parts)


def kind_title(kind: str) -> str:
    """A kind of task in words, as HTML."""
    return escape(KIND_TITLES.get(kind, kind.replace("_", " ")))


def _table(results: Sequence[Result]) -> str:
    metrics = list(dict.fromkeys(result.metric for result in results))
    optional = {"classes": any(result.num_classes for result in results), "prompts": any(result.prompts for result in results)}
    columns = ["task", "n", *(title for title, is_used in optional.items() if is_used)]
    tasks: dict[str, dict[str, dict[str, Result]]] = {}  # task -> prompt rule -> metric -> result
    for result in results:
        tasks.setdefault(result.task, {}).setdefault(result.prompts, {})[result.metric] = result
    rows = []
    for rules in tasks.values():
        for number, line in enumerate(rules.values()):
            cells = _first_cells(line, is_first=number == 0)
            metric_cells = [_metric_cell(line[metric]) if metric in line else NO_CELL for metric in metrics]
            rows.append(f'<tr class="{"same" if number + 1 < len(rules) else "last"}">'
                        f"{''.join(cells[column] for column in columns)}{''.join(metric_cells)}</tr>")
    titles = [*columns, *(breakable(short_name(metric)) for metric in metrics)]
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>{_meanings(metrics)}")


def _first_cells(line: Mapping[str, Result], *, is_first: bool) -> dict[str, str]:
    """What stands before a line's metrics; the task is named in its first line alone."""
    results = list(line.values())
    sizes = " / ".join(dict.fromkeys(f"{result.n:,}" for result in results))  # captions / images in retrieval
    num_bad = max(result.n_bad for result in results)
    bad = f"<br><small>{num_bad:,} unusable</small>" if num_bad else ""
    num_classes = results[0].num_classes
    return {
        "task": f'<td class="name">{breakable(results[0].task) if is_first else ""}</td>',
        "n": f'<td class="size" data-title="n">{sizes}{bad}</td>',
        "classes": f'<td class="size" data-title="classes">{num_classes:,}</td>' if num_classes else NO_CELL,
        "prompts": f'<td class="rule">{name(results[0].prompts)}</td>',
    }


def _metric_cell(result: Result) -> str:
    if math.isnan(result.value):
        return NO_CELL
    is_fraction = result.metric not in NO_FRACTIONS
    value = f"{result.value:.1%}" if is_fraction else f"{result.value:.4g}"
    interval = bar = ""
    if result.ci_low is not None and result.ci_high is not None:
        low, high = ((f"{end * 100:.1f}" if is_fraction else f"{end:.4g}") for end in (result.ci_low, result.ci_high))
        interval = f"<small>{low}\u2013{high}</small>"
        bar = interval_bar(result.value, result.ci_low, result.ci_high) if is_fraction else ""
    return (f'<td class="metric" data-title="{escape(short_name(result.metric))}"><div><data value="{result.value!r}">'
            f"<b>{value}</b></data>{interval}</div>{bar}</td>")


def _meanings(metrics: Sequence[str]) -> str:
    """What the columns mean, for those that have an explanation."""
    items = "".join(f"<li><b>{escape(short_name(metric))}</b> {escape(METRIC_MEANINGS[metric])}</li>"
                    for metric in metrics if metric in METRIC_MEANINGS)
    return f'<ul class="meanings">{items}</ul>' if items else ""
