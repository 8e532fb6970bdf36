"""Models that are measured: their names, the folders that their results go to, and the step that a run is at."""

from collections.abc import Sequence
from pathlib import Path


def model_names(sources: Sequence[str]) -> list[str]:
    """Short names of models: of a run or a folder its own name, else open_clip's.

    Raises:
      ValueError: two models would have one name, and so one folder for their results.
    """
    names = []
    for source in sources:
        path = Path(source).expanduser()
        of_run = path.parent if path.name == "model" and (path.parent / "config.yaml").is_file() else path
        names.append(of_run.resolve().name if path.is_dir() else source.removeprefix("hf-hub:").replace("/", "-"))
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"several models are called {', '.join(twice)}; measure them one by one, each with its own out=...")
    return names


def results_folders(sources: Sequence[str], names: Sequence[str], out: str | None) -> list[Path]:
    """Where the results of models go: into the run, else zero_shot/<name>; or `out`, of several models a folder each in it."""
    if out:
        return [Path(out).expanduser() / (name if len(names) > 1 else "") for name in names]
    folders = []
    for source, name in zip(sources, names, strict=True):
        path = Path(source).expanduser()
        run = path.parent if path.name == "model" else path
        folders.append(run / "zero_shot" if (run / "config.yaml").is_file() else Path("zero_shot") / name)
    return folders


def run_step(source: str) -> int | None:
    """The step that a run's model is of: its newest checkpoint. None where there is no run."""
    path = Path(source).expanduser()
    latest = (path.parent if path.name == "model" else path) / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step-")) if latest.is_file() else None
