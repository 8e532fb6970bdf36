"""Before and after fine-tuning: the same questions to both models, and what was won and what was forgotten."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from clipkit import __version__
from clipkit.evaluation.comparison import read_predictions
from clipkit.evaluation.outcome import Outcome, join
from clipkit.evaluation.paired import PairedResult, compare_predictions
from clipkit.evaluation.prediction_files import on_shared_questions, write_predictions_file
from clipkit.evaluation.results import Provenance, align, short_name, write_results
from clipkit.evaluation.tasks import load_task
from clipkit.evaluation.zero_shot import measure
from clipkit.model.image_text import ImageTextModel
from clipkit.training.atomic_files import write_text_atomically

NAMES = {"value_a": "before", "value_b": "after", "only_a": "forgotten", "only_b": "won"}  # questions, the last two


def measure_tasks(model: ImageTextModel, tasks: Sequence[str], *, batch_size: int = 256, cache_dir: str | Path | None = None,
                  thorough: bool = True) -> Outcome:
    """Measure a model on several tasks, with the answer to every question; arguments as in `measure` and `evaluate`."""
    return join([measure(model, load_task(task, cache_dir=cache_dir), batch_size=batch_size, thorough=thorough)
                 for task in tasks])


def measure_start(model: ImageTextModel, tasks: Sequence[str], start: str, pretrained: str | None, *, folder: Path,
                  is_main: bool, batch_size: int, cache_dir: str | Path | None) -> None:
    """Measure the model that fine-tuning starts from, and keep its answers in `before/` of a run's folder of results.

    Args:
      model: Not yet trained.
      tasks, batch_size, cache_dir: As in `evaluate`.
      start, pretrained: Where the model came from.
      folder: The run's folder of results.
      is_main: Whether this process writes; all measure.
    """
    outcome = measure_tasks(model, tasks, batch_size=batch_size, cache_dir=cache_dir)
    if is_main:
        write_measured(folder / "before", outcome, Provenance(start, pretrained, "fp32", model.source_sha256, 0, __version__))


def write_measured(folder: Path, outcome: Outcome, provenance: Provenance) -> None:
    """Write numbers and, where they were kept, answers."""
    if outcome.predictions is not None:
        write_predictions_file(folder, outcome.predictions, provenance)
    write_results(folder, outcome.results, provenance)


def compare_with_before(folder: Path) -> str:
    """Compare the answers in a run's folder of results with those in its `before/`; write won_and_forgotten.csv.

    Returns:
      A table for people, or a line that says why there is none.
    """
    from pandas import DataFrame

    try:
        before, after, notes = on_shared_questions(read_predictions(folder / "before"), read_predictions(folder))
        results = compare_predictions(before, after)
    except (FileNotFoundError, ValueError) as error:  # the tasks of the end are not those of the start, or have no answers
        return f"note      no comparison with the start: {error}"
    table = DataFrame([asdict(result) for result in results]).rename(columns=NAMES)
    write_text_atomically(folder / "won_and_forgotten.csv", table.to_csv(index=False, lineterminator="\n"))
    shown = [f"note      {note.replace('only a', 'only before,').replace('only b', 'only after,')}" for note in notes]
    return "\n".join([won_and_forgotten_table(results), *shown])


def won_and_forgotten_table(results: Sequence[PairedResult]) -> str:
    """Write before -> after as plain text: both values, the difference with its 95 % interval, questions won and forgotten."""
    cells = [["task", "prompts", "metric", "n", "before", "after", "difference", "95 %", "won", "forgotten", "p (Holm)"]]
    cells += [[result.task, result.prompts, short_name(result.metric), f"{result.n:,}", f"{result.value_a:.1%}",
               f"{result.value_b:.1%}", f"{result.difference * 100:+.1f}",
               f"{result.ci_low * 100:+.1f} to {result.ci_high * 100:+.1f}", f"{result.only_b:,}", f"{result.only_a:,}",
               f"{result.p_holm:.2g}"] for result in results]
    return align(cells)
