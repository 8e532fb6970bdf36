"""`clipkit pretrain`: train a CLIP on image-text shards. The whole story, from settings to the final table."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.config import PretrainConfig, identity
from clipkit.config.launch import launch
from clipkit.config.model import as_start

# Settings groups that follow from a setting: other data or another model than the embedded default.
IMPLIED = {
    "model.start": {"model": "start"},
    "data.train": {"data": "shards", "model": "open_clip", "loss": "clip", "optim": "adamw", "train": "shards",
                   "evaluation": "shards"},
    "model.name": {"model": "open_clip"},
}


def main(arguments: Sequence[str]) -> None:
    launch("pretrain", PretrainConfig, pretrain, as_start(arguments), IMPLIED)


class Training(NamedTuple):
    """Everything that the loop works with."""

    config: PretrainConfig
    process: Any  # training.distributed.Process
    model: Any  # model.image_text.ImageTextModel
    parallel: Any  # the model as it is called: wrapped for several processes, or compiled
    plain: Any  # where weights are shared out over the processes, the model without them; else None
    optimizer: Any
    start_weights: list[Any]  # of what learns, in the optimizer's order; empty where nothing pulls back to them
    average: Any  # training.average.WeightAverage | None
    validation: Any  # evaluation.validation.Validation | None
    teacher: Any  # training.teacher.Teacher | None
    loader: Any  # data.loader.TrainLoader
    plan: Any  # training.plan.Plan
    shards: list[str]
    writer: Any  # training.background.BackgroundWriter | None
    timer: Any  # training.step_timer.StepTimer
    log: Any  # training.run_log.RunLog
    run_dir: Path


def pretrain(config: PretrainConfig) -> int | None:
    """Train, evaluate and save a model; go on where the run of that name stopped.

    Returns:
      None when the run is finished, EXIT_STOPPED when a signal asked for a stop.

    Raises:
      ValueError: a setting does not fit the data, the model or the run of that name.
      FileNotFoundError: there are no such shards or weights.
    """
    what = "the plan" if config.plan else Path(config.runs_dir) / (config.name or "emoji")
    print(f"clipkit pretrain: {what} (loading)", flush=True)
    from clipkit.training.process import training_process
    from clipkit.training.stop import EXIT_STOPPED

    if config.plan:
        from clipkit.training.forecast import forecast_run
        from clipkit.training.trained_model import make_model

        return print(forecast_run(config, make_model(config)))
    with training_process(config.device, timeout_seconds=config.parallel.timeout_seconds,
                          threads=config.train.threads) as process, contextlib.ExitStack() as cleanup:
        training, start = prepare(config, process, cleanup)
        stopped = train(training, start) == EXIT_STOPPED
        if training.writer:
            training.writer.wait()
        if stopped:
            return EXIT_STOPPED
        finish(training)
    return None


def prepare(config: PretrainConfig, process: Any, cleanup: contextlib.ExitStack) -> tuple[Training, int]:
    """Build everything, take up the newest checkpoint if there is one, and say what is about to happen.

    Returns:
      What the loop works with, and the step to begin at.
    """
    from clipkit.data.captions import with_captions
    from clipkit.data.loader import default_workers, make_train_loader
    from clipkit.data.samples import PictureExamples
    from clipkit.evaluation.teacher_features import load_teacher
    from clipkit.evaluation.validation import open_validation
    from clipkit.training.average import WeightAverage
    from clipkit.training.background import BackgroundWriter
    from clipkit.training.estimate import estimate_step
    from clipkit.training.finetune import keep_start, learned_parameters, make_tower_optimizer
    from clipkit.training.parallel import make_parallel, spread_weights
    from clipkit.training.plan import plan_run, summary
    from clipkit.training.precision import with_precision
    from clipkit.training.random_state import seed_all
    from clipkit.training.resume import check_shards, open_run, take_up
    from clipkit.training.run_folder import check_run_name
    from clipkit.training.run_log import RunLog
    from clipkit.training.step_timer import StepTimer
    from clipkit.training.threads import settle_threads
    from clipkit.training.trained_model import make_model

    config = with_precision(config, process.device)
    data, size = with_captions(config.data), config.train.global_batch_size
    shards, all_shards, plan = plan_run(data, config.train, config.schedule, world_size=process.world_size,
                                        set_aside=config.train.validation_fraction or 0)
    name = check_run_name(config.name or "emoji")
    run, saved = open_run(config.runs_dir, name, config=dataclasses.asdict(config), identity=identity(config), process=process,
                          mirror=config.checkpoint.mirror)
    if run:
        cleanup.callback(run.close)  # its lock

    run_dir = Path(config.runs_dir) / name
    teacher = load_teacher(config.distill, data, all_shards, run_dir=run_dir, process=process)
    seed_all(config.seed)  # the same weights on every process
    model = make_model(config).to(process.device)
    if config.model.start:
        keep_start(run_dir, config.model.start, model.source_sha256, is_main=process.is_main)
    if config.train.threads == 0 and process.device.type == "cpu":
        settle_threads(model, saved.state if saved else None, batch_size=size // process.world_size,
                       workers=default_workers(process.local_world_size) if data.workers is None else data.workers,
                       local_world_size=process.local_world_size, precision=config.train.precision)
    cost = estimate_step(model, batch_size=size // process.world_size, micro_batch_size=config.train.micro_batch_size,
                         precision=config.train.precision)
    plain = spread_weights(model, process, config.parallel, compile=config.train.compile)
    optimizer = make_tower_optimizer(model.towers, config.optim)
    start_weights = [w.detach().clone() for w in learned_parameters(optimizer)] if config.optim.towards_start else []
    seed_all(config.seed + 1 + process.rank)  # dropout differs between processes
    average = WeightAverage(model.towers, config.train.ema_decay) if config.train.ema_decay else None
    if saved:
        check_shards(saved, all_shards)
        take_up(saved, model=model, optimizer=optimizer, average=average, process=process)
    start = saved.step if saved else 0
    validation = (open_validation(config, data, run_dir, all_shards, process, step=start)
                  if config.train.validation_fraction else None)
    position = saved.state["loader"] if saved and not config.train.overfit_batches else None
    loader = make_train_loader(
        data, shards=shards, lanes=plan.lanes, tokenize=model.tokenize,
        examples=PictureExamples(data=data, image_size=model.image_size, group_by=config.loss.mask_false_negatives,
                                 for_teacher=teacher is not None),
        seed=config.seed, global_batch_size=size, rank=process.rank, world_size=process.world_size,
        local_world_size=process.local_world_size, pin_memory=process.device.type == "cuda", state=position,
        leave_out=validation.split.holds_out if validation else None)
    log = cleanup.enter_context(RunLog(run_dir, total_steps=plan.total_steps, resume_step=start, to=config.log.to,
                                       config=dataclasses.asdict(config), is_main=process.is_main))
    log.say(summary(model, plan, cost, train=config.train, schedule=config.schedule, lr=config.optim.lr, shards=shards,
                    world_size=process.world_size, device=str(process.device), workers=loader.workers))
    if saved:
        finished = start == plan.total_steps
        log.say(f"finished  {saved.path} is the last" if finished else f"goes on   at step {start:,}, from {saved.path}")
    parallel = make_parallel(model, process, compile=False, strategy=config.parallel.strategy)
    writer = cleanup.enter_context(contextlib.closing(BackgroundWriter())) if config.checkpoint.asynchronous else None
    return Training(config, process, model, parallel, plain, optimizer, start_weights, average, validation, teacher, loader,
                    plan, all_shards, writer, StepTimer(), log, run_dir), start


def train(t: Training, start: int) -> int | None:
    """Run the steps from `start` to the end of the plan. Legend: B batch (this process), L tokens, D embed_dim."""
    from clipkit.losses import make_loss
    from clipkit.training.device_batches import device_batches
    from clipkit.training.due import Timetable
    from clipkit.training.finetune import hold_statistics, learned_parameters, pull_towards_start
    from clipkit.training.gradient_cache import cached_backward
    from clipkit.training.meter import Meter
    from clipkit.training.optim import clip_gradient, optimizer_step, set_learning_rate
    from clipkit.training.precision import autocast
    from clipkit.training.schedule import learning_rate
    from clipkit.training.sharding import average_scalars
    from clipkit.training.stop import EXIT_STOPPED, StopRequest
    from clipkit.training.watch import Watch

    config, plan, log = t.config, t.plan, t.log
    loss_function = make_loss(config.loss.name, block_size=config.loss.block_size, bf16=config.loss.bf16)
    forward_context = partial(autocast, t.process.device, config.train.precision)
    masked = config.loss.mask_false_negatives != "none"
    parameters = learned_parameters(t.optimizer)
    meter = Meter(global_batch_size=plan.global_batch_size, num_samples=plan.num_samples,
                  max_skipped_steps=config.train.max_skipped_steps, device=t.process.device)
    timetable = Timetable(total_steps=plan.total_steps, log_every=config.log.every, evaluate_every=config.evaluation.every,
                          checkpoint_steps=config.checkpoint.every_steps,
                          checkpoint_minutes=config.checkpoint.every_minutes, world_size=t.process.world_size,
                          watchdog=t.process.watchdog)
    watch = Watch(log=log, timer=t.timer, plan=plan, start=start, lr=config.optim.lr, masked=masked,
                  workers=t.loader.workers, local_world_size=t.process.local_world_size, decode=config.data.decode,
                  pad_id=t.model.tokenize.pad_id,
                  chance_loss=math.log(plan.global_batch_size) if config.loss.name == "clip" and not t.teacher else None)
    if t.validation and t.validation.is_over:
        return None
    if start == 0:
        measure_before(t)
        evaluate_and_log(t, 0)
    t.parallel.train()
    if config.optim.frozen_norms or config.model.lora_rank:
        hold_statistics(t.model)
    batches = device_batches(t.loader, t.process.device, only=config.train.overfit_batches, host_tokens=t.model.trims_text,
                             channels_last=config.train.channels_last)
    with StopRequest() as stop, contextlib.closing(t.loader):
        for step, batch in zip(range(start, plan.total_steps), t.timer.batches(batches), strict=False):
            lr = learning_rate(step, name=config.schedule.name, peak=config.optim.lr, warmup=plan.warmup_steps,
                               total_steps=plan.total_steps, cooldown=config.schedule.cooldown)
            set_learning_rate(t.optimizer, lr)
            loss_of = partial(loss_function, group_ids=batch.group_ids if masked else None)
            loss_of = t.teacher.beside(loss_of, batch.teacher_ids) if t.teacher else loss_of
            if config.train.micro_batch_size:
                features, loss = cached_backward(t.parallel, batch.images, batch.tokens, loss=loss_of, autocast=forward_context,
                                                 micro_batch_size=config.train.micro_batch_size)
            else:
                with forward_context():
                    features = t.parallel(batch.images, batch.tokens)  # image_features (B, D), text_features (B, D), ...
                loss = loss_of(*features)
                loss.backward()
            average_scalars(parameters)
            grad_norm = clip_gradient(parameters, config.optim.max_grad_norm)
            skipped = optimizer_step(t.optimizer, grad_norm)
            if t.start_weights:
                pull_towards_start(t.optimizer, t.start_weights, config.optim.towards_start, skipped)
            t.model.clamp_logit_scale()
            if t.average:
                t.average.update(step)
            meter.add(loss, grad_norm, skipped, t.teacher.terms if t.teacher else None)

            done = step + 1
            due = timetable.after(done, stop=stop.wanted)
            if due.log:
                numbers = meter.take(done, lr=lr, features=features, bad=t.loader.bad, by_source=t.loader.by_source)
                log.step(done, watch.look(done, numbers, features, batch))
            with t.timer.paused():
                if due.evaluation:
                    evaluate_and_log(t, done)
                found = validate(t, done, loss_function) if due.evaluation or done == plan.total_steps else None
                if due.checkpoint or (found and found.wants_checkpoint):
                    save(t, done)
            if found and found.is_over:
                log.say(f"ended     at step {done:,}: no lower validation loss since step {t.validation.best_step:,}")
                return None
            if due.stop:
                log.say(f"stopped at step {done:,}; run the same command again to go on")
                return EXIT_STOPPED
    return None


def evaluate_and_log(t: Training, step: int) -> None:
    """Measure the model (its average, where there is one) on the tasks of the run."""
    from clipkit.evaluation.zero_shot import evaluate
    from clipkit.training.parallel import whole_model

    settings = t.config.evaluation
    if settings.tasks:
        with whole_model(t.model, t.average, t.plain) as model:
            results = evaluate(model, settings.tasks, batch_size=settings.batch_size, cache_dir=t.config.data.cache_dir)
        t.log.evaluation(step, map(dataclasses.asdict, results))


def validate(t: Training, step: int, loss_function: Any) -> Any:
    """Measure the model on the pairs that are set aside, where there are some; return what follows from it."""
    from clipkit.training.parallel import whole_model

    if t.validation is None:
        return None
    with whole_model(t.model, t.average, t.plain) as model:
        verdict = t.validation.measure(model, step, loss_function, batch_size=t.plan.global_batch_size,
                                       masked=t.config.loss.mask_false_negatives != "none")
    t.log.evaluation(step, [verdict.record])
    return verdict


def measure_before(t: Training) -> None:
    """Keep what the model that fine-tuning starts from answers, at its own image size: `finish` compares."""
    from clipkit.evaluation.won_and_forgotten import measure_start
    from clipkit.model.folder import load_model

    settings, start, pretrained = t.config.evaluation, t.config.model.start, t.config.model.pretrained
    if start and settings.final_tasks:
        model = load_model(start, pretrained=pretrained, device=t.process.device)
        measure_start(model, settings.final_tasks, start, pretrained, folder=t.run_dir / "zero_shot",
                      is_main=t.process.is_main, batch_size=settings.batch_size, cache_dir=t.config.data.cache_dir)


def save(t: Training, step: int) -> None:
    from clipkit.training.resume import save_run

    save_run(t.run_dir, step, model=t.model, optimizer=t.optimizer, average=t.average, loader=t.loader, shards=t.shards,
             process=t.process, keep=t.config.checkpoint.keep, keep_every_steps=t.config.checkpoint.keep_every_steps,
             writer=t.writer, mirror=t.config.checkpoint.mirror, keeps_model=not t.validation or t.validation.keeps(step))


def finish(t: Training) -> None:
    """Evaluate the finished model, and leave a table, curves and a sheet of predictions."""
    from clipkit import __version__
    from clipkit.evaluation.contact_sheet import draw_contact_sheet
    from clipkit.evaluation.nearest_neighbour import emoji_pixel_baselines
    from clipkit.evaluation.predictions import predict
    from clipkit.evaluation.results import Provenance, results_table
    from clipkit.evaluation.won_and_forgotten import compare_with_before, measure_tasks, write_measured
    from clipkit.model.folder import load_model
    from clipkit.training.curves import plot_curves
    from clipkit.training.run_log import closing_words

    settings, folder, cache_dir = t.config.evaluation, t.run_dir / "zero_shot", t.config.data.cache_dir
    model = load_model(t.run_dir / "model", device=t.process.device)  # what others will load is what is measured
    fine_tuned = t.config.model.start is not None
    outcome = measure_tasks(model, settings.final_tasks, batch_size=settings.batch_size, cache_dir=cache_dir,
                            thorough=fine_tuned)
    if not t.process.is_main:
        return
    if outcome.results:
        if not (folder / "results.csv").exists():  # else this is a look at a finished run
            t.log.evaluation(t.plan.total_steps, map(dataclasses.asdict, outcome.results))
        outcome = outcome._replace(results=outcome.results + emoji_pixel_baselines(settings.final_tasks))
        step = t.validation.best_step if t.validation and t.validation.patience else t.plan.total_steps
        provenance = Provenance(t.run_dir.name, None, "fp32", model.source_sha256, step, __version__)
        write_measured(folder, outcome, provenance)
        draw_contact_sheet(predict(model, settings.final_tasks[0], cache_dir=cache_dir), t.run_dir / "predictions.png",
                           title=f"{t.run_dir.name}: {settings.final_tasks[0]}, three nearest texts")
        print("\n" + results_table(outcome.results))
        if fine_tuned:
            print("\n" + compare_with_before(folder))
    plot_curves(t.run_dir)
    print(closing_words(t.run_dir, with_sheet=bool(outcome.results)))
