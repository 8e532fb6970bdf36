"""report.html: one page that shows an evaluation, with all it needs inside. The parts on single tasks: report_sections.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.evaluation.report_choices import choices_section
from clipkit.evaluation.report_groups import groups_section
from clipkit.evaluation.report_multi_label import multi_label_section
from clipkit.evaluation.report_numbers import Answer, ShownTask, Thumbnails, read_answers
from clipkit.evaluation.report_page import breakable, counted, escape, facts, name, page
from clipkit.evaluation.report_probes import few_shot_section, knn_section, linear_probe_section, tip_adapter_section
from clipkit.evaluation.report_sections import classification_section, retrieval_section
from clipkit.evaluation.report_table import kind_title, results_tables
from clipkit.evaluation.results import Provenance, Result
from clipkit.evaluation.tasks import CHOICE, CLASSIFICATION, MULTI_LABEL, RETRIEVAL
from clipkit.training.atomic_files import write_text_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

SECTIONS = {CLASSIFICATION: classification_section, RETRIEVAL: retrieval_section, MULTI_LABEL: multi_label_section,
            CHOICE: choices_section, "linear_probe": linear_probe_section, "knn": knn_section, "few_shot": few_shot_section,
            "tip_adapter": tip_adapter_section}
SHOWN_TABLES = ("templates", "classes", "lambdas", "neighbours", "draws")  # what a report shows of `Outcome.tables`
WITH_ANSWERS = (CLASSIFICATION, RETRIEVAL, CHOICE, "linear_probe", "knn")  # kinds whose sections need predictions
PREDICTION_COLUMNS = ("task", "kind", "prompts", *(field for field in Answer._fields if field not in Answer._field_defaults))
Prompts = Mapping[str, Mapping[str, Sequence[Sequence[str]]]]  # task -> prompt rule -> texts of each class


def write_report(path: Path, *, title: str, provenance: Provenance, results: Sequence[Result], predictions: "DataFrame",
                 prompts: Prompts, classes: Mapping[str, Sequence[str]],
                 thumbnails: Thumbnails, tables: "Mapping[str, DataFrame] | None" = None, date: str = "",
                 versions: Mapping[str, str] | None = None) -> None:
    """Write an evaluation as one HTML file that opens anywhere: no script, nothing loaded from elsewhere.

    The same arguments give the same bytes.

    Args:
      path: the file; its folder is made if missing.
      title: the heading.
      provenance: what was measured.
      results: at least one; all of them stand in the table.
      predictions: a row a question, with at least PREDICTION_COLUMNS; may be empty. Each of its tasks, measured in one of
        the ways in SECTIONS, is shown in detail, under its first prompt rule. In retrieval `key` is the query's own
        picture; in image retrieval `label_name` is the query and `guess_name` the key of the picture found, in text
        retrieval `guess_name` is a text.
      prompts: the texts that made the classifiers.
      classes: task -> names of its classes.
      thumbnails: (task, keys) -> pictures by key, of any size; keys without a picture are left out. Called once a section.
      tables: of `Outcome.tables`; those of SHOWN_TABLES are shown beside predictions.
      date: when it was measured, as it is to be shown.
      versions: of the libraries that took part.

    Raises:
      ValueError: there are no results, or predictions lack a column.
      OSError: the file cannot be written.
    """
    if not results:
        raise ValueError("there are no results to report; evaluate at least one task")
    lacking = [column for column in PREDICTION_COLUMNS if column not in predictions.columns]
    if lacking and len(predictions):
        raise ValueError(f"predictions lack the columns {lacking}; a report needs {list(PREDICTION_COLUMNS)}: "
                         "evaluate again to write them anew")
    tasks = _shown_tasks(results, predictions, prompts, classes,
                         {title: table for title, table in (tables or {}).items() if title in SHOWN_TABLES})
    body = "\n".join((
        _header(title, provenance, results, date, versions or {}),
        _navigation(tasks),
        results_tables(results),
        *(_section(number, shown, thumbnails) for number, shown in enumerate(tasks)),
        "<footer>Intervals hold the true value in 95 of 100 such evaluations. Each bar runs from 0 to 100%.</footer>",
    ))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, page(title, body))


def _header(title: str, provenance: Provenance, results: Sequence[Result], date: str, versions: Mapping[str, str]) -> str:
    weights = provenance.weights_sha256 or ""
    model = name(provenance.name) + (f" <small>{name(provenance.pretrained)}</small>" if provenance.pretrained else "")
    return f'<p class="eyebrow">clipkit evaluation</p><h1>{name(title)}</h1>' + facts([
        ("Model", model),
        ("Weights (SHA-256)", f'<code title="{escape(weights)}">{escape(weights[:12])}</code>' if weights else ""),
        ("Step", f"{provenance.step:,}" if provenance.step is not None else ""),
        ("Precision", escape(provenance.precision)),
        ("Tasks", str(len({(one.task, one.kind) for one in results}))),
        ("Date", escape(date)),
        ("Versions", "<br>".join(f"{escape(library)} {escape(version)}" for library, version in
                                 {"clipkit": provenance.clipkit_version, **versions}.items())),
    ])


def _navigation(tasks: Sequence[ShownTask]) -> str:
    if len(tasks) < 2:
        return ""
    several = len({shown.kind for shown in tasks}) > 1
    links = "".join(f'<a href="#task-{number}">{name(shown.task)}{f" <small>{kind_title(shown.kind)}</small>" * several}</a>'
                    for number, shown in enumerate(tasks))
    return f'<nav aria-label="Tasks">{links}</nav>'


def _shown_tasks(results: Sequence[Result], predictions: "DataFrame", prompts: Prompts, classes: Mapping[str, Sequence[str]],
                 tables: "Mapping[str, DataFrame]") -> list[ShownTask]:
    """Each task and way of measuring it that is shown in detail, in the order of the results."""
    def of(frame: "DataFrame", task: str, kind: str) -> "DataFrame":
        return frame.loc[(frame["task"] == task) & (frame["kind"] == kind)] if len(frame) else frame

    shown = []
    frames = [frame for frame in (predictions, *tables.values()) if len(frame)]
    found = dict.fromkeys(pair for frame in frames for pair in zip(frame["task"], frame["kind"], strict=True))
    ordered = [pair for pair in dict.fromkeys((result.task, result.kind) for result in results) if pair in found]
    for task, kind in dict.fromkeys([*ordered, *found]):
        frame = of(predictions, task, kind)
        if kind not in SECTIONS or (kind in WITH_ANSWERS and not len(frame)):
            continue
        own = {title: part for title, table in tables.items() if len(part := of(table, task, kind))}
        rules = [str(rule) for rule in dict.fromkeys(rule for part in (frame, *own.values()) if len(part)
                                                     for rule in part["prompts"])]
        split = next((result.split for result in results if (result.task, result.kind) == (task, kind)), "")
        answers = read_answers(frame.loc[frame["prompts"] == rules[0]]) if len(frame) else []
        shown.append(ShownTask(task, kind, split, rules, answers, classes.get(task, ()), prompts.get(task, {}),
                               [result for result in results if result.task == task], own))
    return shown


def _section(number: int, shown: ShownTask, thumbnails: Thumbnails) -> str:
    others = f", one of {len(shown.rules)} rules; the others stand in the table" if len(shown.rules) > 1 else ""
    by_texts = shown.classes and shown.kind in (CLASSIFICATION, MULTI_LABEL)
    about = [kind_title(shown.kind), f"split {name(shown.split)}" if shown.split else "",
             counted(len(shown.classes), "class", "classes") if shown.classes else "",
             f"prompts \u201c{name(shown.rules[0])}\u201d{others}" if shown.rules[0] and by_texts else ""]
    line = " \u00b7 ".join(part for part in about if part)
    return (f'<section id="task-{number}"><h2>{breakable(shown.task)}</h2><p class="soft">{line}</p>'
            f"{SECTIONS[shown.kind](shown, thumbnails)}{groups_section(shown)}</section>")
