"""`clipkit compare`: two models on the same questions, and whether their difference is more than chance."""

from collections.abc import Sequence
from pathlib import Path

from clipkit.config.launch import launch
from clipkit.config.zero_shot import CompareConfig


def main(arguments: Sequence[str]) -> None:
    launch("compare", CompareConfig, compare, arguments)


def compare(config: CompareConfig) -> None:
    """Compare the predictions of two evaluations question by question, on the tasks and prompts of both; print a table.

    Raises:
      FileNotFoundError: one of them has no predictions.parquet.
      ValueError: they are about different questions.
    """
    print(f"clipkit compare: {config.b} against {config.a}", flush=True)
    from dataclasses import asdict

    from pandas import DataFrame

    from clipkit.evaluation.comparison import comparison_table, read_predictions
    from clipkit.evaluation.paired import compare_predictions
    from clipkit.evaluation.prediction_files import on_shared_questions

    a, b, notes = on_shared_questions(read_predictions(Path(config.a)), read_predictions(Path(config.b)))
    for note in notes:
        print(f"note      {note}")
    results = compare_predictions(a, b)
    print(comparison_table(results))
    if config.out:
        path = Path(config.out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        DataFrame([asdict(result) for result in results]).to_csv(path, index=False)
        print(f"written   {path}")
