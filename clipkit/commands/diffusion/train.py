"""`clipkit diffusion train`: train a U-Net on latents and what conditions them. The story, from settings to the pipeline."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.config.diffusion.train import NO_AUTOENCODER, DiffusionTrainConfig
from clipkit.config.launch import launch
from clipkit.config.schema import identity

# Settings groups that follow from a setting: other data than the embedded default.
IMPLIED = {"data.train": {"data": "shards", "train": "shards"}}
DEFAULT_NAME = "emoji_diffusion"


def main(arguments: Sequence[str]) -> None:
    launch("diffusion/train", DiffusionTrainConfig, train_diffusion, arguments, IMPLIED)


class Training(NamedTuple):
    """Everything that the loop works with."""

    config: DiffusionTrainConfig
    process: Any  # training.distributed.Process
    autoencoder: Any  # frozen; None where the pixels themselves are made
    conditioning: Any  # diffusion.conditioning.Conditioning, frozen
    unet: Any
    denoise: Any  # diffusion.unet.Denoise over the U-Net, wrapped for several processes, or compiled
    schedule: Any  # diffusion.noise_schedule.Schedule, on the device
    optimizer: Any
    average: Any  # training.average.WeightAverage | None
    loader: Any  # data.loader.TrainLoader
    plan: Any  # training.plan.Plan
    shards: list[str]
    timer: Any  # training.step_timer.StepTimer
    log: Any  # training.run_log.RunLog
    run_dir: Path


def train_diffusion(config: DiffusionTrainConfig) -> int | None:
    """Train a diffusion model and save its pipeline; go on where the run of that name stopped.

    Returns:
      None when the run is finished, EXIT_STOPPED when a signal asked for a stop.

    Raises:
      ValueError: a setting does not fit the data, the networks or the run of that name.
      FileNotFoundError: there are no such shards, autoencoder or encoder.
    """
    print(f"clipkit diffusion train: {Path(config.runs_dir) / (config.name or DEFAULT_NAME)} (loading)", flush=True)
    from clipkit.training.loop import run_steps
    from clipkit.training.process import training_process
    from clipkit.training.stop import EXIT_STOPPED

    with training_process(config.device, timeout_seconds=config.parallel.timeout_seconds,
                          threads=config.train.threads) as process, contextlib.ExitStack() as cleanup:
        t, start = prepare(config, process, cleanup)
        if run_steps(config, t.plan, start, process=process, optimizer=t.optimizer, loader=t.loader, timer=t.timer, log=t.log,
                     batches=device_batches(t), train_step=partial(train_step, t), evaluate_every=config.sheets.every,
                     evaluate=partial(draw_sheet, t), save=partial(save, t)) == EXIT_STOPPED:
            return EXIT_STOPPED
        finish(t)
    return None


def prepare(config: DiffusionTrainConfig, process: Any, cleanup: contextlib.ExitStack) -> tuple[Training, int]:
    """Build everything, take up the newest checkpoint; return what the loop works with, and the step to begin at."""
    from clipkit.data.captions import with_captions
    from clipkit.diffusion.autoencoder import load_autoencoder
    from clipkit.diffusion.conditioning import make_conditioning
    from clipkit.diffusion.noise_schedule import make_schedule
    from clipkit.diffusion.process import check_prediction
    from clipkit.diffusion.training_latents import latent_shape, make_loader
    from clipkit.diffusion.unet import Denoise
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
    settings, optim = config.process, config.optim
    schedule = make_schedule(settings.schedule, num_timesteps=settings.num_timesteps,
                             zero_terminal_snr=settings.zero_terminal_snr)
    check_prediction(settings.prediction, schedule)
    name = check_run_name(config.name or DEFAULT_NAME)
    autoencoder = None if config.autoencoder == NO_AUTOENCODER else load_autoencoder(config.autoencoder, device=process.device)
    channels, side = latent_shape(autoencoder, config.model.image_size)
    conditioning = make_conditioning(config.conditioning, image_size=config.model.image_size, side=side).to(process.device)
    sources, shards, plan = plan_run(config.data, config.train, config.schedule, world_size=process.world_size)
    unet = build_unet(config, conditioning, channels=channels, side=side).to(process.device)
    run, saved = open_run(config.runs_dir, name, config=dataclasses.asdict(config), identity=identity(config), process=process)
    if run:
        cleanup.callback(run.close)  # its lock
    config = dataclasses.replace(config, data=with_captions(config.data))
    optimizer = make_optimizer(list(unet.named_parameters()), name=optim.name, recipe=optim.recipe, lr=optim.lr,
                               weight_decay=optim.weight_decay, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)
    average = WeightAverage(unet, config.train.ema_decay) if config.train.ema_decay else None
    if saved:
        check_shards(saved, shards)
        take_up(saved, model=unet, optimizer=optimizer, average=average, process=process)
    start = saved.step if saved else 0
    loader = make_loader(config, sources, plan.lanes, process, autoencoder, conditioning,
                         saved.state["loader"] if saved else None)
    run_dir = Path(config.runs_dir) / name
    log = cleanup.enter_context(RunLog(run_dir, total_steps=plan.total_steps, resume_step=start, to=config.log.to,
                                       config=dataclasses.asdict(config), is_main=process.is_main))
    t = Training(config, process, autoencoder, conditioning, unet,
                 make_parallel(Denoise(unet), process, compile=config.train.compile), schedule.to(process.device), optimizer,
                 average, loader, plan, shards, StepTimer(), log, run_dir)
    log.say(summary(t, sources))
    if saved:
        finished = start == plan.total_steps
        log.say(f"finished  {saved.path} is the last" if finished else f"goes on   at step {start:,}, from {saved.path}")
    return t, start


def build_unet(config: DiffusionTrainConfig, conditioning: Any, *, channels: int, side: int) -> Any:
    """The U-Net with the random weights of the run's seed, in the layout that the settings ask for."""
    import torch

    from clipkit.diffusion.unet import make_unet
    from clipkit.training.random_state import seed_all

    seed_all(config.seed)  # the same weights on every process
    unet: Any = make_unet(config.model.config, side=side, channels=channels, conditioning=conditioning)
    if config.train.activation_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.train.channels_last:  # before the optimizer is made or taken up: its state has the weights' layout
        unet.to(memory_format=torch.channels_last)
    return unet


def summary(t: Training, sources: list[list[str]]) -> str:
    """Describe the run before its first step."""
    from clipkit.training.plan import run_lines

    config, settings = t.config, t.config.process
    channels, side = t.unet.config.out_channels, t.unet.config.sample_size
    what = "pixels" if t.autoencoder is None else f"latents of {config.autoencoder}"
    source = f" ({config.conditioning.source})" if config.conditioning.source else ""
    return "\n".join([
        f"model     {sum(p.numel() for p in t.unet.parameters()) / 1e6:.2f} M parameters; {config.model.image_size} px, "
        f"{what}: {side} x {side} x {channels}",
        f"process   {settings.schedule}, predicts {settings.prediction}; conditioned by {config.conditioning.kind}{source}, "
        f"left out for {config.conditioning.drop:.0%}",
        *run_lines(t.plan, None, unit="pictures", train=config.train, schedule=config.schedule, lr=config.optim.lr,
                   shards=sources, world_size=t.process.world_size, device=str(t.process.device), workers=t.loader.workers)])


def train_step(t: Training, step: int, batch: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Train the U-Net on one batch.

    Args:
      t: The run.
      step: Steps done.
      batch: images (B, 2C, h, w) of cached latents or (B, 3, H, W) uint8, and tokens (B, L).

    Returns:
      Loss, gradient norm, 1 if the step was skipped else 0, and no further terms.
    """
    from clipkit.diffusion.conditioning import mix_conditions
    from clipkit.diffusion.draws import draw_rows
    from clipkit.diffusion.objective import diffusion_loss
    from clipkit.diffusion.training_latents import encode, latent_scale
    from clipkit.training.optim import clip_gradient, optimizer_step
    from clipkit.training.precision import autocast

    config, process = t.config, t.process
    with autocast(process.device, config.train.precision):
        latents, images = encode(batch.images, t.config, t.autoencoder)
        draws = draw_rows(tuple(latents.mean.shape), num_levels=config.process.num_timesteps, drop=config.conditioning.drop,
                          seed=config.seed, step=step, rank=process.rank, world_size=process.world_size)
        draws = type(draws)(*(tensor.to(process.device, non_blocking=True) for tensor in draws))
        condition = mix_conditions(t.conditioning(batch.tokens, images), t.conditioning.empty, draws.dropped)
        loss = diffusion_loss(t.denoise, latents, condition, draws, t.schedule, scale=latent_scale(t.autoencoder),
                              process=config.process)
    loss.backward()
    grad_norm = clip_gradient(list(t.unet.parameters()), config.optim.max_grad_norm)
    skipped = optimizer_step(t.optimizer, grad_norm)
    if t.average:
        t.average.update(step)
    return loss, grad_norm, skipped, {}


def device_batches(t: Training) -> Iterator[Any]:
    """This process's batches on its device, without end; `train.overfit_batches` repeats the first few."""
    num = t.config.train.overfit_batches
    for batch in cycle(list(islice(t.loader, num))) if num else t.loader:
        yield type(batch)(*(tensor.to(t.process.device, non_blocking=True) for tensor in batch))


def save(t: Training, step: int) -> None:
    """Write a checkpoint, and the pipeline as it is now, from which anyone can sample."""
    from clipkit.diffusion.pipeline_folder import FACTS, FOLDER, save_pipeline
    from clipkit.interop.whole_folder import whole_folder
    from clipkit.training.resume import save_run

    save_run(t.run_dir, step, model=t.unet, optimizer=t.optimizer, average=t.average, loader=t.loader, shards=t.shards,
             process=t.process, keep=t.config.checkpoint.keep, keep_every_steps=t.config.checkpoint.keep_every_steps)
    if t.process.is_main:
        with (t.average.applied() if t.average else contextlib.nullcontext(),
              whole_folder(t.run_dir / FOLDER, overwrite=True, marker=FACTS) as folder):
            save_pipeline(folder, unet=t.unet, autoencoder=t.autoencoder, conditioning=t.conditioning, process=t.config.process,
                          image_size=t.config.model.image_size, facts={"name": t.run_dir.name, "step": step})


def draw_sheet(t: Training, step: int) -> None:
    """Draw samples of the present weights (their average, where there is one) into sheets/. Rank 0 does it for all."""
    from clipkit.diffusion.generate import Sampling
    from clipkit.diffusion.pipeline_folder import Pipeline
    from clipkit.diffusion.sheets import draw_samples, sheet_conditions
    from clipkit.diffusion.unet import Denoise
    from clipkit.training.distributed import wait_for_all

    config, settings = t.config, t.config.sheets
    if t.process.is_main and step and settings.num_samples:
        pipeline = Pipeline(Denoise(t.unet), t.autoencoder, t.conditioning, config.process, t.schedule,
                            config.model.image_size, {})
        conditions = sheet_conditions(t.conditioning, t.shards, data=config.data, image_size=config.model.image_size,
                                      num_samples=settings.num_samples, prompts=settings.prompts)
        how = Sampling(steps=settings.steps, guidance_scale=settings.guidance_scale)
        with t.average.applied() if t.average else contextlib.nullcontext():
            draw_samples(pipeline, conditions, how, batch_size=config.train.global_batch_size // t.process.world_size,
                         path=t.run_dir / "sheets" / f"step-{step:08d}.png", title=f"{t.run_dir.name}, step {step:,}")
    wait_for_all()


def finish(t: Training) -> None:
    """Leave the last sheet and the curves, and say what is where."""
    from clipkit.training.curves import metric_panel, plot_curves

    draw_sheet(t, t.plan.total_steps)
    if not t.process.is_main:
        return
    plot_curves(t.run_dir, panels=[metric_panel("loss", "loss"), metric_panel("gradient norm", "grad_norm"),
                                   metric_panel("learning rate", "lr")])
    sheets = sorted((t.run_dir / "sheets").glob("*.png"))
    print(f"\npipeline  {t.run_dir / 'pipeline'}\n"
          f"pictures  {', '.join(map(str, [*sheets[-1:], t.run_dir / 'curves.png']))}\n"
          f"next      clipkit diffusion sample model={t.run_dir}")
