"""When things are due, who a process is, what a step will cost, how a run is planned."""

import dataclasses

import pytest
import torch

from clipkit.training.distributed import any_process, from_main, gather_objects, ranks_from_environment, start_process
from clipkit.training.due import Timetable
from clipkit.training.estimate import estimate_step
from clipkit.training.precision import autocast
from tests.conftest import TINY, settings


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def timetable(clock=None, **changes):
    options = {"total_steps": 100, "log_every": 10, "evaluate_every": 25, "checkpoint_steps": 40,
               "checkpoint_minutes": None, "clock": clock or Clock()}
    return Timetable(**(options | changes))


def test_log_lines_evaluations_and_checkpoints_come_at_their_steps_and_at_the_end():
    table = timetable()
    dues = {done: table.after(done, stop=False) for done in range(1, 101)}
    assert [done for done, due in dues.items() if due.log] == list(range(10, 101, 10))
    assert [done for done, due in dues.items() if due.evaluation] == [25, 50, 75]  # the last step has the final one
    assert [done for done, due in dues.items() if due.checkpoint] == [40, 80, 100]
    assert not any(due.stop for due in dues.values())
    assert [done for done in range(1, 81) if timetable(evaluate_every=None, total_steps=80).after(done, stop=False)
            .evaluation] == [10, 20, 30, 40, 50, 60, 70]  # an eighth of the run


def test_minutes_count_from_the_last_checkpoint():
    clock = Clock()
    table = timetable(clock, checkpoint_steps=None, checkpoint_minutes=2)
    saved = []
    for done in range(1, 31):
        clock.now += 30
        if table.after(done, stop=False).checkpoint:
            saved.append(done)
    assert saved == [5, 10, 15, 20, 25, 30]


def test_a_stop_saves_at_once_and_is_no_stop_at_the_end():
    due = timetable().after(7, stop=True)
    assert (due.stop, due.checkpoint, due.log) == (True, True, False)
    last = timetable().after(100, stop=True)
    assert (last.stop, last.checkpoint) == (False, True)


def test_several_processes_agree_only_at_log_lines():
    table = timetable(world_size=4)
    assert not table.after(7, stop=True).stop
    assert table.after(10, stop=True).stop


@pytest.mark.parametrize(("variables", "expected"), [
    ({}, (0, 1, 0, 1)),
    ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
    ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, (9, 16, 1, 8)),
    ({"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_LOCALID": "1"}, (1, 2, 1, 2)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1)),  # one task of Slurm is a single process
])
def test_a_process_reads_who_it_is_from_torchrun_or_slurm(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
                 "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SUBMITIT_LOCAL_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks_from_environment() == expected


def test_a_single_process_needs_no_others():
    process = start_process("cpu", 10)
    assert process.is_main
    assert process.device == torch.device("cpu")
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert any_process(True, False) == (True, False)
    assert from_main("x") == "x"


def test_the_estimate_grows_with_the_batch_and_leaves_the_model_as_it_was(tiny_model):
    tiny_model.train()
    before = {name: tensor.clone() for name, tensor in tiny_model.towers.state_dict().items()}
    small, large = (estimate_step(tiny_model, batch_size=size, precision="fp32") for size in (32, 3200))
    weights = sum(tensor.nbytes for tensor in tiny_model.parameters()) / 1e9
    assert small.memory_gb > 4 * weights  # weights, gradients, two moments
    # 100 times the rows: what is above weights, gradients and moments is 100 times as much.
    assert large.memory_gb - 4 * weights == pytest.approx(100 * (small.memory_gb - 4 * weights), rel=0.01)
    assert small.seconds is not None and small.seconds > 0
    assert tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.towers.state_dict().items())


def test_freed_memory_is_kept_where_the_c_library_is_glibc():
    import platform

    from clipkit.training.allocator import keep_freed_memory

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_bf16_autocast_rounds_and_fp32_does_not():
    a = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with autocast(torch.device("cpu"), "amp_bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert (a @ a).dtype == torch.float32


def test_a_plan_counts_steps_and_refuses_what_cannot_be_counted():
    from clipkit.training.plan import make_plan

    config = settings("data.train=x", "name=x", "train.epochs=2", "train.global_batch_size=16", "schedule.warmup=10%")
    plan = make_plan(config.train, config.schedule, num_samples=100, lanes=4)
    assert (plan.total_steps, plan.warmup_steps) == (12, 1)  # 200 samples are 12 whole batches
    with pytest.raises(ValueError, match=r"give train\.samples="):
        make_plan(config.train, config.schedule, num_samples=None, lanes=4)
    with pytest.raises(ValueError, match="10 samples, fewer than one batch"):
        make_plan(config.train, config.schedule, num_samples=10, lanes=4)


@pytest.mark.parametrize(("given", "advised"), [((), True), (("train.micro_batch_size=8",), False),
                                                (("train.global_batch_size=256",), False)])
def test_a_small_batch_is_told_how_a_larger_one_fits(given, advised, tiny_model):
    from clipkit.training.estimate import StepCost
    from clipkit.training.plan import make_plan, summary

    chosen = {one.partition("=")[0]: one for one in ("train.global_batch_size=32", "train.epochs=1", *given)}
    config = settings("data.train=x", "name=x", *chosen.values())
    plan = make_plan(config.train, config.schedule, num_samples=5000, lanes=4)
    text = summary(tiny_model, plan, StepCost(1.0, 1.0), train=config.train, schedule=config.schedule, lr=1e-3, shards=[["x"]],
                   world_size=2, device="cpu", workers=0)
    assert ("train.global_batch_size=256 train.micro_batch_size=16 takes about the memory" in text) == advised


@pytest.mark.parametrize(("has_units", "chosen"), [(True, "amp_bf16"), (False, "fp32")])
def test_automatic_precision_is_bfloat16_only_where_the_device_has_units_for_it(has_units, chosen, monkeypatch):
    from clipkit.training import precision

    config = settings("data.train=x.tar", "name=x")
    assert config.train.precision == "auto"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.with_precision(config, torch.device("cpu")).train.precision == chosen
    assert precision.with_precision(config, None).train.precision == "amp_bf16"
    assert precision.with_precision(config, torch.device("mps")).train.precision == "fp32"
    given = settings("data.train=x.tar", "name=x", "train.precision=amp_bf16")
    assert precision.with_precision(given, torch.device("cpu")) is given


def test_a_tokenizer_with_more_ids_than_the_tower_has_embeddings_is_refused_before_the_first_step():
    from clipkit.training.trained_model import make_model

    config = settings("data.train=x.tar", "name=x", "model=tiny")
    small = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 1000}}
    with pytest.raises(ValueError, match=r"embeddings of 1,000 tokens, and its tokenizer 49,408 ids; give text_cfg.vocab_size"):
        make_model(dataclasses.replace(config, model=dataclasses.replace(config.model, config=small)))
