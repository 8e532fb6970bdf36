"""`clipkit interpolate`: between a model and what it was fine-tuned to, or the mean of several: measured, chosen, written."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipkit.config.interpolate import InterpolateConfig
from clipkit.config.launch import launch

TIMEOUT_SECONDS = 3600
MARKER = "interpolation.json"  # a folder that has it may be replaced


def main(arguments: Sequence[str]) -> None:
    launch("interpolate", InterpolateConfig, interpolate, arguments)


def interpolate(config: InterpolateConfig) -> None:
    """Measure the line between two models, or soups of several, on what they were tuned for and on other tasks.

    The folder gets points.csv (a row a number), curve.png (of a line), interpolation.json (what was chosen, and why) and
    model/, the model folder of the chosen one.

    Raises:
      FileNotFoundError: there is no such model or task.
      ValueError: the models do not fit each other, or the folder is taken.
    """
    print(f"clipkit interpolate: {', '.join(config.models or (str(config.base), str(config.model)))} (loading)", flush=True)
    from clipkit.evaluation.interpolation import measure_point
    from clipkit.evaluation.measured_models import model_names
    from clipkit.evaluation.store import EmbeddingStore
    from clipkit.evaluation.tasks import load_task
    from clipkit.interop.whole_folder import refuse_taken
    from clipkit.training.distributed import start_process

    sources = config.models or (str(config.base), str(config.model))
    names = model_names(config.models or sources[1:])
    out = Path(config.out or Path("soup" if config.models else "interpolate") / names[0]).expanduser()
    refuse_taken(out, overwrite=config.overwrite, marker=MARKER)
    target, against = ([load_task(name, cache_dir=config.cache_dir, templates=config.templates) for name in names_of_kind]
                       for names_of_kind in (config.task, config.against))
    process = start_process(config.device, TIMEOUT_SECONDS)
    if process.world_size > 1:
        raise ValueError(f"{process.world_size} processes are started, and clipkit interpolate runs on one; leave torchrun out")
    models = [load_end(source, config.pretrained, process.device) for source in sources]
    measure_model = partial(measure_point, target=target, against=against, batch_size=config.batch_size,
                            store=EmbeddingStore(config.cache_dir) if config.store else None, workers=config.workers)
    if config.models:
        write_soup(config, out, dict(zip(names, models, strict=True)), measure_model)
    else:
        write_line(config, out, names[0], models[0], models[1], measure_model)


def load_end(source: str, pretrained: str | None, device: Any) -> Any:
    """Load one of the models; `pretrained` is about those that are open_clip names."""
    from clipkit.model.folder import load_model

    return load_model(source, pretrained=None if Path(source).expanduser().is_dir() else pretrained, device=device)


def write_line(config: InterpolateConfig, out: Path, name: str, base: Any, tuned: Any, measure_model: Any) -> None:
    """Measure the line between two models, and write the one at its knee."""
    from clipkit.evaluation.interpolation import alphas, knee, points_table, sweep
    from clipkit.evaluation.interpolation_report import draw_line, points_text
    from clipkit.model.interpolate import interpolated_model

    points = sweep(base, tuned, alphas(config.points), with_line(measure_model, config.points))
    chosen = knee(points)
    print("\n" + points_text({f"{alpha:g}": point for alpha, point in points.items()}, f"{chosen:g}") + "\n")
    print(f"chosen    alpha {chosen:g}: the highest sum of the mean accuracy on task and that on against")
    write(out, config, table=points_table(points, "alpha"), model=interpolated_model(base, tuned, chosen),
          facts={"base": config.base, "model": config.model, "alpha": chosen},
          draw=lambda folder: draw_line(points, chosen, folder / "curve.png", title=name))


def write_soup(config: InterpolateConfig, out: Path, models: Mapping[str, Any], measure_model: Any) -> None:
    """Measure the models, their mean and the greedy soup, and write the soup that is asked for."""
    from clipkit.evaluation.interpolation import greedy_soup, points_table
    from clipkit.evaluation.interpolation_report import points_text
    from clipkit.model.interpolate import soup_model

    every = list(models.values())
    measure_model = with_line(measure_model, 2 * len(models))  # each, the mean, and all but one step of the greedy soup
    uniform = soup_model(every)  # before anything is measured: those that do not fit are refused here
    points = {name: measure_model(model) for name, model in models.items()}
    numbers, greedy = greedy_soup(every, list(points.values()), measure_model)
    points |= {"uniform soup": measure_model(uniform), "greedy soup": greedy}
    print("\n" + points_text(points, f"{config.soup} soup") + "\n")
    inside = [list(models)[number] for number in numbers]
    print(f"greedy    {', '.join(inside)}: the best first, then each that makes the soup no worse")
    write(out, config, table=points_table(points, "model"),
          model=uniform if config.soup == "uniform" else soup_model([models[name] for name in inside]),
          facts={"models": list(config.models or ()), "soup": config.soup,
                 "inside": list(models) if config.soup == "uniform" else inside}, draw=lambda folder: None)


def with_line(measure_model: Any, total: int) -> Any:
    """Say after each model how many of about `total` are measured."""
    count = iter(range(1, total + 1))

    def measure_and_say(model: Any) -> Any:
        point = measure_model(model)
        values = ", ".join(f"{result.task} {result.value:.3f}" for result in (*point.target, *point.against))
        print(f"measured  {next(count)} of {total}: {values}", flush=True)
        return point

    return measure_and_say


def write(out: Path, config: InterpolateConfig, *, table: Any, model: Any, facts: dict[str, Any], draw: Any) -> None:
    """Write the folder whole, and say what to do with it."""
    import json

    from clipkit import __version__
    from clipkit.interop.whole_folder import whole_folder
    from clipkit.model.folder import save_model_folder

    with whole_folder(out, overwrite=config.overwrite, marker=MARKER) as folder:
        table.to_csv(folder / "points.csv", index=False, lineterminator="\n")
        draw(folder)
        save_model_folder(model, folder / "model")
        record = {"clipkit_version": __version__, **facts, "task": list(config.task), "against": list(config.against)}
        (folder / MARKER).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    first = config.base or (config.models or ("",))[0]
    print(f"written   {out}: points.csv, {'' if config.models else 'curve.png, '}{MARKER}, model\n"
          f"next      clipkit zero-shot 'model=[{first},{out / 'model'}]' task=<a set that was not chosen on> (paired tests)")
