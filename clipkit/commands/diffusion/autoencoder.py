"""`clipkit diffusion autoencoder`: train pictures to latents and back. The whole story, from settings to the report."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.config.diffusion.autoencoder import AutoencoderConfig
from clipkit.config.launch import launch
from clipkit.config.schema import identity

# Settings groups that follow from a setting: other data than the embedded default.
IMPLIED = {"data.train": {"data": "shards", "train": "shards", "evaluation": "shards"}}
DEFAULT_NAME = "emoji_autoencoder"


def main(arguments: Sequence[str]) -> None:
    launch("diffusion/autoencoder", AutoencoderConfig, train_autoencoder, arguments, IMPLIED)


class Training(NamedTuple):
    """Everything that the loop works with."""

    config: AutoencoderConfig
    process: Any  # training.distributed.Process
    networks: Any  # ModuleDict: all that learns, the autoencoder and the discriminator (if it ever joins)
    reconstruct: Any  # diffusion.autoencoder.Reconstruct over the autoencoder, wrapped for several processes, or compiled
    judge: Any  # the discriminator likewise
    perceptual: Any  # frozen; None without a perceptual loss
    optimizer: Any  # one over both networks: a step touches only what has a gradient
    average: Any  # training.average.WeightAverage of the autoencoder | None
    loader: Any  # data.loader.TrainLoader
    plan: Any  # training.plan.Plan
    shards: list[list[str]]  # of each source
    timer: Any  # training.step_timer.StepTimer
    log: Any  # training.run_log.RunLog
    run_dir: Path

    @property
    def autoencoder(self) -> Any:
        return self.networks["autoencoder"]

    @property
    def joining_step(self) -> int:
        """The first step of the discriminator; beyond the last step if it never joins."""
        return round(self.config.loss.discriminator_start * self.plan.total_steps)


def train_autoencoder(config: AutoencoderConfig) -> int | None:
    """Train, measure and save an autoencoder; go on where the run of that name stopped.

    Returns:
      None when the run is finished, EXIT_STOPPED when a signal asked for a stop.

    Raises:
      ValueError: a setting does not fit the data, the networks or the run of that name.
      FileNotFoundError: there are no such shards, or no such model for the perceptual distance.
    """
    print(f"clipkit diffusion autoencoder: {Path(config.runs_dir) / (config.name or DEFAULT_NAME)} (loading)", flush=True)
    from clipkit.training.process import training_process
    from clipkit.training.stop import EXIT_STOPPED

    with training_process(config.device, timeout_seconds=config.parallel.timeout_seconds,
                          threads=config.train.threads) as process, contextlib.ExitStack() as cleanup:
        training, start = prepare(config, process, cleanup)
        if train(training, start) == EXIT_STOPPED:
            return EXIT_STOPPED
        if process.is_main:
            finish(training)
    return None


def prepare(config: AutoencoderConfig, process: Any, cleanup: contextlib.ExitStack) -> tuple[Training, int]:
    """Build everything, take up the newest checkpoint; return what the loop works with, and the step to begin at."""
    from clipkit.data.captions import with_captions
    from clipkit.diffusion.autoencoder import Reconstruct, make_networks
    from clipkit.training.average import WeightAverage
    from clipkit.training.optim import make_optimizer
    from clipkit.training.parallel import make_parallel
    from clipkit.training.plan import plan_run
    from clipkit.training.precision import with_precision
    from clipkit.training.resume import check_shards, open_run, take_up
    from clipkit.training.run_folder import check_run_name
    from clipkit.training.run_log import RunLog
    from clipkit.training.step_timer import StepTimer

    config = with_precision(config, process.device)
    optim = config.optim
    shards, all_shards, plan = plan_run(config.data, config.train, config.schedule, world_size=process.world_size)
    networks, perceptual = make_networks(config, process.device)
    autoencoder: Any = networks["autoencoder"]
    name = check_run_name(config.name or DEFAULT_NAME)
    run, saved = open_run(config.runs_dir, name, config=dataclasses.asdict(config), identity=identity(config), process=process)
    if run:
        cleanup.callback(run.close)  # its lock
    config = dataclasses.replace(config, data=with_captions(config.data))
    optimizer = make_optimizer(list(networks.named_parameters()), name=optim.name, recipe=optim.recipe, lr=optim.lr,
                               weight_decay=optim.weight_decay, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
    average = WeightAverage(autoencoder, config.train.ema_decay) if config.train.ema_decay else None
    if saved:
        check_shards(saved, all_shards)
        take_up(saved, model=networks, optimizer=optimizer, average=average, process=process)
    start = saved.step if saved else 0
    loader = make_loader(config, shards, plan.lanes, process, saved.state["loader"] if saved else None)
    run_dir = Path(config.runs_dir) / name
    log = cleanup.enter_context(RunLog(run_dir, total_steps=plan.total_steps, resume_step=start, to=config.log.to,
                                       config=dataclasses.asdict(config), is_main=process.is_main))
    reconstruct = make_parallel(Reconstruct(autoencoder), process, compile=config.train.compile)
    judge = make_parallel(networks["discriminator"], process, compile=False) if "discriminator" in networks else None
    t = Training(config, process, networks, reconstruct, judge, perceptual, optimizer, average, loader, plan, shards,
                 StepTimer(), log, run_dir)
    log.say(summary(t))
    if saved:
        finished = start == plan.total_steps
        log.say(f"finished  {saved.path} is the last" if finished else f"goes on   at step {start:,}, from {saved.path}")
    return t, start


def make_loader(config: AutoencoderConfig, shards: list[list[str]], lanes: int, process: Any, state: Any = None) -> Any:
    """The loader of one process; `state` says where it goes on, unless a few fixed batches are overfitted."""
    from clipkit.data.loader import make_train_loader
    from clipkit.data.samples import PictureExamples
    from clipkit.diffusion.autoencoder import no_tokens

    return make_train_loader(config.data, shards=shards, lanes=lanes, tokenize=no_tokens, seed=config.seed,
                             examples=PictureExamples(data=config.data, image_size=config.model.image_size, group_by="none"),
                             global_batch_size=config.train.global_batch_size,
                             rank=process.rank, world_size=process.world_size, local_world_size=process.local_world_size,
                             pin_memory=process.device.type == "cuda", state=None if config.train.overfit_batches else state)


def summary(t: Training) -> str:
    """Describe the run before its first step."""
    from clipkit.training.plan import run_lines

    config = t.config
    counts = " + ".join(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M {name}"
                        for name, network in t.networks.items())
    side = config.model.image_size // config.model.downsampling
    channels = t.autoencoder.config.latent_channels
    lines = [f"model     {counts} parameters; {config.model.image_size} px, latents {side} x {side} x {channels}",
             *run_lines(t.plan, None, unit="pictures", train=config.train, schedule=config.schedule, lr=config.optim.lr,
                        shards=t.shards, world_size=t.process.world_size, device=str(t.process.device),
                        workers=t.loader.workers)]
    joins = [f"note      the discriminator joins at step {t.joining_step:,}"] if "discriminator" in t.networks else []
    return "\n".join(lines + joins)


def train(t: Training, start: int) -> int | None:
    """Run the steps from `start` to the end of the plan."""
    from clipkit.training.loop import run_steps

    return run_steps(t.config, t.plan, start, process=t.process, optimizer=t.optimizer, loader=t.loader, timer=t.timer,
                     log=t.log, batches=device_images(t), train_step=partial(train_step, t),
                     evaluate_every=t.config.evaluation.every, evaluate=partial(evaluate_and_log, t), save=partial(save, t))


def train_step(t: Training, step: int, images: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Train the autoencoder on pictures (B, 3, H, W) in [-1, 1], then, once it has joined, the discriminator.

    Returns:
      Loss, gradient norm, 1 if a step was skipped else 0, and the terms of the loss by name.
    """
    import torch

    from clipkit.diffusion.autoencoder_loss import autoencoder_loss
    from clipkit.diffusion.discriminator import discriminator_loss
    from clipkit.diffusion.draws import latent_noise
    from clipkit.training.optim import clip_gradient, optimizer_step
    from clipkit.training.precision import autocast

    settings, process, max_norm, precision = t.config.loss, t.process, t.config.optim.max_grad_norm, t.config.train.precision
    discriminator = t.networks["discriminator"] if step >= t.joining_step else None
    side = t.config.model.image_size // t.config.model.downsampling
    noise = latent_noise((len(images), t.autoencoder.config.latent_channels, side, side), seed=t.config.seed, step=step,
                         rank=process.rank).to(process.device)  # (B, C, h, w)
    with autocast(process.device, precision):
        reconstruction, mean, logvar = t.reconstruct(images, noise)  # (B, 3, H, W), (B, C, h, w) twice
        found = autoencoder_loss(images, reconstruction, mean, logvar, perceptual=t.perceptual,
                                 perceptual_weight=settings.perceptual_weight, kl_weight=settings.kl_weight,
                                 discriminator=discriminator, discriminator_weight=settings.discriminator_weight,
                                 last_layer=t.autoencoder.decoder.conv_out.weight)
    found.loss.backward()
    grad_norm = clip_gradient(list(t.autoencoder.parameters()), max_norm)
    skipped = optimizer_step(t.optimizer, grad_norm)
    judged = torch.zeros((), device=process.device)
    if discriminator is not None:
        with autocast(process.device, precision):
            judged = discriminator_loss(t.judge, images, reconstruction)
        judged.backward()
        skipped = skipped.maximum(optimizer_step(t.optimizer, clip_gradient(list(t.judge.parameters()), max_norm)))
    if t.average:
        t.average.update(step)
    terms = found._asdict() | {"discriminator_loss": judged.detach()}
    del terms["loss"]
    return found.loss, grad_norm, skipped, terms


def device_images(t: Training) -> Iterator[Any]:
    """This process's pictures in [-1, 1] on its device, without end; `train.overfit_batches` repeats the first few."""
    from clipkit.diffusion.autoencoder import to_pixel_values

    num = t.config.train.overfit_batches
    for batch in cycle(list(islice(t.loader, num))) if num else t.loader:
        yield to_pixel_values(batch.images.to(t.process.device, non_blocking=True))


def evaluate_and_log(t: Training, step: int) -> None:
    """Measure the autoencoder (its average, where there is one) on the tasks of the run; rank 0 does it for all."""
    from clipkit.training.distributed import wait_for_all

    if t.process.is_main:
        with t.average.applied() if t.average else contextlib.nullcontext():
            for task in t.config.evaluation.tasks:
                t.log.evaluation(step, measure(t, t.autoencoder, task).records)
    if t.config.evaluation.tasks:
        wait_for_all()


def measure(t: Training, autoencoder: Any, task: str) -> Any:
    from clipkit.diffusion.reconstruction_report import measure_reconstruction

    return measure_reconstruction(autoencoder, task, image_size=t.config.model.image_size, perceptual=t.perceptual,
                                  batch_size=t.config.evaluation.batch_size, cache_dir=t.config.data.cache_dir)


def save(t: Training, step: int) -> None:
    from clipkit.training.resume import save_run

    save_run(t.run_dir, step, model=t.networks, optimizer=t.optimizer, average=t.average, loader=t.loader,
             shards=list(chain.from_iterable(t.shards)), process=t.process, keep=t.config.checkpoint.keep,
             keep_every_steps=t.config.checkpoint.keep_every_steps)


def finish(t: Training) -> None:
    """Write vae/ with the measured scale, and leave numbers, curves and a sheet of reconstructions. Rank 0 alone."""
    from clipkit.diffusion.autoencoder import FOLDER, latent_scale, load_autoencoder, save_autoencoder
    from clipkit.diffusion.reconstruction_report import draw_curves, write_report

    folder, alone = t.run_dir / FOLDER, t.process._replace(rank=0, world_size=1)
    if not folder.exists():
        batches = -(-t.config.scale_images // t.plan.global_batch_size)
        with (t.average.applied() if t.average else contextlib.nullcontext(),
              contextlib.closing(make_loader(t.config, t.shards, t.plan.lanes, alone)) as loader):
            measured = latent_scale(t.autoencoder, (batch.images for batch in islice(loader, batches)))
            save_autoencoder(t.autoencoder, folder, scaling_factor=measured)
    autoencoder = load_autoencoder(folder, device=t.process.device)  # what others will load is what is measured
    scale = autoencoder.config.scaling_factor  # pyright: ignore[reportAttributeAccessIssue]
    reports = [measure(t, autoencoder, task) for task in t.config.evaluation.final_tasks]
    if reports:
        if not (t.run_dir / "results.json").exists():  # else this is a look at a finished run
            t.log.evaluation(t.plan.total_steps, [record for report in reports for record in report.records])
        loss = t.config.loss
        write_report(t.run_dir, reports, autoencoder=folder, step=t.plan.total_steps,
                     perceptual=" ".join(filter(None, (loss.perceptual, loss.perceptual_model))))
    draw_curves(t.run_dir)
    print(f"\nmodel     {folder} (diffusers.AutoencoderKL), latent scale {scale:.4f}\n"
          f"pictures  {', '.join(str(path) for path in sorted(t.run_dir.glob('*.png')))}\n"
          f"next      tensorboard --logdir {t.run_dir}")
