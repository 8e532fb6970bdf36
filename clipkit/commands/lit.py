"""`clipkit lit`: two frozen encoders, their features computed once, and only projections and the temperature learn."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.config import identity
from clipkit.config.launch import launch
from clipkit.config.lit import LitConfig

TIMEOUT_SECONDS = 3600
IMPLIED = {"data.train": {"data": "shards", "evaluation": "shards"}}  # as in pretrain


def main(arguments: Sequence[str]) -> None:
    launch("lit", LitConfig, lit, arguments, IMPLIED)


class Locked(NamedTuple):
    """Frozen encoders and what they made of the data."""

    image: Any  # model.image_text.ImageTextModel that encodes pictures
    text: Any  # the same for texts
    features: Any  # evaluation.locked_features.LockedFeatures, on the device
    tasks: dict[str, Any]  # name -> evaluation.locked_features.LockedTask; those of classification


def lit(config: LitConfig) -> None:
    """Encode the data once, train the projections, write the model folder and measure it. A finished run is measured again.

    Raises:
      ValueError: a setting does not fit the data, the encoders or the run of that name.
      FileNotFoundError: there is no such encoder or shard.
    """
    run_dir = Path(config.runs_dir) / config.name
    print(f"clipkit lit: {run_dir} (loading)", flush=True)
    from clipkit.model.folder import WEIGHTS_NAME
    from clipkit.training.process import training_process
    from clipkit.training.run_folder import open_run_folder

    with training_process(config.device, timeout_seconds=TIMEOUT_SECONDS, threads=config.train.threads) as process, \
            contextlib.ExitStack() as cleanup:
        if process.world_size > 1:
            raise ValueError(f"{process.world_size} processes are started, and clipkit lit runs on one; leave torchrun out")
        finished = (run_dir / "model" / WEIGHTS_NAME).is_file()
        locked = None if finished else load_locked(config, process.device)  # before there is a run: it may need other settings
        run = open_run_folder(config.runs_dir, config.name, config=dataclasses.asdict(config), identity=identity(config))
        cleanup.callback(run.close)  # its lock
        results = train(config, run_dir, process.device, locked) if locked else {}
        finish(config, run_dir, process.device, results)


def load_locked(config: LitConfig, device: Any) -> Locked:
    """Load both encoders and encode the training data and the tasks, or read from the store what was encoded before.

    Raises:
      ValueError: there are fewer pictures than one batch, or an encoder cannot be used.
      FileNotFoundError: there is no such encoder or shard.
    """
    from clipkit.data.sources import find_sources
    from clipkit.evaluation.locked_features import locked_features, locked_task, training_task
    from clipkit.evaluation.progress_line import ProgressLine
    from clipkit.evaluation.store import EmbeddingStore
    from clipkit.evaluation.tasks import CLASSIFICATION, load_task
    from clipkit.model.locked_pair import image_encoder, text_encoder

    data, store, size = config.data, EmbeddingStore(config.data.cache_dir), config.train.global_batch_size
    image = image_encoder(config.image, pretrained=tag_of(config.image, config), weights=config.image_weights,
                          image_size=config.image_size).to(device)
    text = text_encoder(config.text, pretrained=tag_of(config.text, config), context_length=config.context_length).to(device)
    task = training_task(", ".join(data.train), find_sources(data.train, weighted=False, cache_dir=data.cache_dir)[0],
                         caption_fields=data.caption_fields, group_by=data.mask_false_negatives)
    started, cpu = time.monotonic(), time.process_time()
    with contextlib.ExitStack() as lines:
        features = locked_features(
            image, text, task, batch_size=data.batch_size, workers=data.workers, store=store,
            progress=lambda part: lines.enter_context(ProgressLine(f"encoding  {part}: ", True, unit="done")).show)
        tasks = [load_task(name, cache_dir=data.cache_dir)
                 for name in dict.fromkeys((*config.evaluation.tasks, *config.evaluation.final_tasks))]
        measured = {one.name: locked_task(image, text, one, batch_size=data.batch_size, store=store,
                                          progress=lines.enter_context(ProgressLine(f"encoding  {one.name}: ", True)).show)
                    for one in tasks if one.kind == CLASSIFICATION}
    num_images = len(features.captions)
    bad = f" ({features.num_bad:,} bad samples left out)" if features.num_bad else ""
    seconds = f"{time.monotonic() - started:.1f} s ({time.process_time() - cpu:.1f} CPU s)"
    print(f"features  {num_images:,} pictures{bad}, {len(features.texts):,} captions: {seconds}, kept in {store.folder}",
          flush=True)
    if num_images < size:
        raise ValueError(f"the data have {num_images} pictures, fewer than one batch of train.global_batch_size={size}; give "
                         f"train.global_batch_size={max(2, num_images // 2)} or more data")
    return Locked(image, text, features._replace(images=features.images.to(device), texts=features.texts.to(device),
                                                 group_ids=features.group_ids.to(device)), measured)


def tag_of(source: str, config: LitConfig) -> str | None:
    """The weights of an encoder that is an open_clip name."""
    return None if ":" in source or Path(source).expanduser().is_dir() else config.pretrained


def train(config: LitConfig, run_dir: Path, device: Any, locked: Locked) -> dict[str, Any]:
    """Train on cached features to the end, and write the model folder.

    Returns:
      {task: results} of the final tasks that were measured on cached features.
    """
    from clipkit.evaluation.locked_features import measure_projections
    from clipkit.model.folder import save_model_folder
    from clipkit.model.locked_pair import Projections, locked_pair
    from clipkit.training.random_state import seed_all
    from clipkit.training.run_log import RunLog

    features, size = locked.features, config.train.global_batch_size
    total_steps = max(1, round(config.train.epochs * len(features.captions)) // size)
    seed_all(config.seed)
    projections = Projections(features.images.shape[-1], features.texts.shape[-1], config.embed_dim,
                              image_kind=config.image_projection, init_logit_scale=config.init_logit_scale).to(device)
    locked_pair(locked.image, locked.text, projections)  # what open_clip cannot express is refused before anything is learned
    print(f"schedule  {total_steps:,} steps of {size:,} pairs, {sum(p.numel() for p in projections.parameters()) / 1e6:.2f} M "
          f"parameters learn on {device}", flush=True)
    on_the_way = [locked.tasks[name] for name in config.evaluation.tasks if name in locked.tasks]
    with RunLog(run_dir, total_steps=total_steps, to=config.log.to, config=dataclasses.asdict(config)) as log:
        run_steps(config, total_steps, features, projections, log=log,
                  evaluate=partial(evaluate_and_log, log, on_the_way, projections))
    save_model_folder(locked_pair(locked.image, locked.text, projections), run_dir / "model")
    return {name: measure_projections(projections, locked.tasks[name]) for name in config.evaluation.final_tasks
            if name in locked.tasks}


def run_steps(config: LitConfig, total_steps: int, features: Any, projections: Any, *, log: Any, evaluate: Any) -> None:
    """Take all steps; log them, and measure now and then."""
    from clipkit.losses import make_loss
    from clipkit.training.locked_pair import draw_pairs, train_step
    from clipkit.training.optim import make_optimizer
    from clipkit.training.schedule import learning_rate, warmup_steps

    optim, size = config.optim, config.train.global_batch_size
    warmup = warmup_steps(config.schedule.warmup, total_steps=total_steps, global_batch_size=size)
    optimizer = make_optimizer(list(projections.named_parameters()), name=optim.name, recipe=optim.recipe, lr=optim.lr,
                               weight_decay=optim.weight_decay, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
    loss_function = make_loss("clip", block_size=None, bf16=False)
    pairs = draw_pairs(features.images, features.texts, features.captions, features.group_ids, batch_size=size,
                       seed=config.seed)
    started = time.monotonic()
    evaluate(0)
    for done, batch in enumerate(islice(pairs, total_steps), 1):
        lr = learning_rate(done - 1, name=config.schedule.name, peak=optim.lr, warmup=warmup, total_steps=total_steps,
                           cooldown=config.schedule.cooldown)
        step = train_step(projections, optimizer, batch, lr=lr, loss_function=loss_function,
                          masked=config.data.mask_false_negatives != "none", max_grad_norm=optim.max_grad_norm)
        if done % config.log.every == 0 or done == total_steps:
            log.step(done, {"samples_seen": done * size, "loss": step.loss, "loss_minus_log_batch": step.loss - math.log(size),
                            "in_batch_accuracy_image": step.accuracy_image, "in_batch_accuracy_text": step.accuracy_text,
                            "lr": lr, "logit_scale": step.logit_scale, "grad_norm": step.grad_norm,
                            "samples_per_second": done * size / (time.monotonic() - started)})
        if done % (config.evaluation.every or max(1, total_steps // 8)) == 0:
            evaluate(done)


def evaluate_and_log(log: Any, tasks: Sequence[Any], projections: Any, step: int) -> None:
    """Measure the projections on cached features."""
    from clipkit.evaluation.locked_features import measure_projections

    for task in tasks:
        log.evaluation(step, map(dataclasses.asdict, measure_projections(projections, task)))


def finish(config: LitConfig, run_dir: Path, device: Any, results: dict[str, Any]) -> None:
    """Measure the model that others will load on the tasks without results, and leave a table and curves."""
    from clipkit import __version__
    from clipkit.evaluation.results import Provenance, results_table, write_results
    from clipkit.evaluation.zero_shot import evaluate
    from clipkit.model.folder import load_model
    from clipkit.training.curves import plot_curves

    model, settings = load_model(run_dir / "model", device=device), config.evaluation
    rows = [row for task in settings.final_tasks for row in results.get(task) or evaluate(
        model, [task], batch_size=settings.batch_size, cache_dir=config.data.cache_dir)]
    if rows:
        provenance = Provenance(run_dir.name, None, "fp32", model.source_sha256, None, __version__)
        write_results(run_dir / "zero_shot", rows, provenance)
        print("\n" + results_table(rows))
    plot_curves(run_dir)
    print(f"\nmodel     {run_dir / 'model'} (open_clip: local-dir:{run_dir / 'model'})\n"
          f"pictures  {run_dir / 'curves.png'}\n"
          f"next      clipkit zero-shot model={run_dir} images=photos/ 'classes=[cat,dog]'")
