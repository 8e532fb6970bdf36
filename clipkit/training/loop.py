"""The steps of a run whose loss is its command's own: rate, log, evaluation, checkpoints, stop. pretrain has its own."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from clipkit.data.loader import TrainLoader
from clipkit.training.distributed import Process
from clipkit.training.due import Timetable
from clipkit.training.meter import Meter
from clipkit.training.optim import set_learning_rate
from clipkit.training.plan import Plan
from clipkit.training.run_log import RunLog
from clipkit.training.schedule import learning_rate
from clipkit.training.step_timer import StepTimer
from clipkit.training.stop import EXIT_STOPPED, StopRequest
from clipkit.training.watch import Watch

StepResult = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]  # loss, gradient norm, 1 if it was skipped else 0, named terms


def run_steps(config: Any, plan: Plan, start: int, *, process: Process, optimizer: Any, loader: TrainLoader, timer: StepTimer,
              log: RunLog, batches: Iterator[Any], train_step: Callable[[int, Any], StepResult], evaluate_every: int | None,
              evaluate: Callable[[int], None], save: Callable[[int], None]) -> int | None:
    """Run the steps from `start` to the end of the plan.

    Args:
      config: its groups data, optim, schedule, train, checkpoint and log are read.
      plan: how many steps.
      start: steps done already.
      process, optimizer, loader, timer, log: of the run.
      batches: on the device, without end.
      train_step: takes the number of steps done and a batch; takes the optimizer's step too.
      evaluate_every: steps between evaluations; None = an eighth of the run.
      evaluate, save: take the number of steps done.

    Returns:
      None at the end, EXIT_STOPPED when a signal asked for a stop.
    """
    meter = Meter(global_batch_size=plan.global_batch_size, num_samples=plan.num_samples,
                  max_skipped_steps=config.train.max_skipped_steps, device=process.device)
    timetable = Timetable(total_steps=plan.total_steps, log_every=config.log.every, evaluate_every=evaluate_every,
                          checkpoint_steps=config.checkpoint.every_steps,
                          checkpoint_minutes=config.checkpoint.every_minutes, world_size=process.world_size,
                          watchdog=process.watchdog)
    watch = Watch(log=log, timer=timer, plan=plan, start=start, lr=config.optim.lr, masked=False, workers=loader.workers,
                  local_world_size=process.local_world_size, decode=config.data.decode, chance_loss=None)
    if start == 0:
        evaluate(0)
    with StopRequest() as stop, contextlib.closing(loader):
        for step, batch in zip(range(start, plan.total_steps), timer.batches(batches), strict=False):
            lr = learning_rate(step, name=config.schedule.name, peak=config.optim.lr, warmup=plan.warmup_steps,
                               total_steps=plan.total_steps, cooldown=config.schedule.cooldown)
            set_learning_rate(optimizer, lr)
            meter.add(*train_step(step, batch))

            done = step + 1
            due = timetable.after(done, stop=stop.wanted)
            if due.log:
                log.step(done, watch.look(done, meter.take(done, lr=lr, bad=loader.bad, by_source=loader.by_source)))
            with timer.paused():
                if due.evaluation:
                    evaluate(done)
                if due.checkpoint:
                    save(done)
            if due.stop:
                log.say(f"stopped at step {done:,}; run the same command again to go on")
                return EXIT_STOPPED
    return None
