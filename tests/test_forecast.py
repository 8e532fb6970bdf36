"""What a run would cost is what it costs: arithmetic by hand, memory as autograd keeps it, traffic by the ring's formula."""

import pytest
import torch

from clipkit.commands.pretrain import pretrain
from clipkit.model.attention import fuse_attention
from clipkit.training.estimate import estimate_step
from clipkit.training.forecast import DEVICES, Booking, forecast, memory_lines, model_cost, network_line, read_booking
from clipkit.training.plan import Plan
from tests.conftest import settings

EIGHT = Booking(8, "a100-40gb", DEVICES["a100-40gb"])


def text_of(model, booking=EIGHT, **changes) -> str:
    config = settings("train.epochs=null", "train.samples=8192", "train.global_batch_size=64", *changes.pop("more", ()))
    return forecast(model, Plan(128, 2, 64, None, 8), booking, train=config.train, parallel=config.parallel,
                    measured_seconds=changes.get("measured_seconds"))


def test_arithmetic_is_that_of_the_towers_matrices(tiny_model):
    width, tokens, texts = 32, 1 + (32 // 16) ** 2, tiny_model.tokenize.context_length
    block = 12 * width * width  # query, key, value, out, and four times the width there and back
    image = tokens * block + 2 * tokens * tokens * width + (tokens - 1) * 3 * 16 * 16 * width + width * 32
    text = texts * block + 2 * texts * texts * width + width * 32
    backward = 2 * (image + text) - (tokens - 1) * 3 * 16 * 16 * width  # pixels have no gradient
    assert model_cost(tiny_model, "fp32").flops == pytest.approx(2 * (image + text + backward), rel=0.02)


def test_activations_are_what_autograd_keeps_of_real_rows(tiny_model):
    fuse_attention(tiny_model.towers, causal_text=True)
    counted = model_cost(tiny_model, "fp32").activation_bytes
    tiny_model.trims_text = False  # texts of full length, as they are counted
    some, more = (estimate_step(tiny_model, batch_size=rows, precision="fp32").memory_gb * 1e9 for rows in (16, 1616))
    assert (more - some) / 1600 == pytest.approx(counted, rel=0.1)  # uint8 pictures are normalised there, too
    assert model_cost(tiny_model, "amp_bf16").activation_bytes < counted


def test_the_model_is_left_as_it_was(tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    model_cost(tiny_model, "amp_bf16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_meta for parameter in tiny_model.parameters())


@pytest.mark.parametrize(("strategy", "wanted"), [("ddp", lambda p: 2 * 7 / 8 * p * 4), ("fsdp", lambda p: 3 * 7 / 8 * p * 4),
                                                  ("hsdp", lambda p: 3 * 1 / 2 * p * 4 + 2 * 3 / 4 * p * 4 / 2)])
def test_traffic_follows_the_formula_of_a_ring(tiny_model, strategy, wanted):
    config = settings("train.precision=fp32", f"parallel.strategy={strategy}", "parallel.processes_per_copy=2",
                      "train.global_batch_size=64")
    cost = model_cost(tiny_model, "fp32")
    line = network_line(tiny_model, cost, EIGHT, batch_size=8, embed_dim=32, train=config.train, parallel=config.parallel)
    parameters = sum(one.numel() for one in tiny_model.parameters())
    features = 7 * 4 * 8 * 32 * 4
    assert float(line.split()[1]) == pytest.approx((wanted(parameters) + features) / 1e9, abs=0.006)


def test_too_much_memory_is_answered_with_what_to_set(tiny_model):
    config = settings("train.precision=fp32", "train.global_batch_size=64")
    cost = model_cost(tiny_model, "fp32")._replace(activation_bytes=1e9)
    lines = memory_lines(tiny_model, cost, EIGHT, batch_size=64, embed_dim=32, train=config.train, parallel=config.parallel)
    assert "too much: set train.micro_batch_size=32 or parallel.strategy=fsdp or train.activation_checkpointing" in lines[1]
    assert len(memory_lines(tiny_model, cost, EIGHT, batch_size=8, embed_dim=32, train=config.train,
                            parallel=config.parallel)) == 1


def test_the_lines_say_what_is_assumed_and_what_was_measured(tiny_model):
    text = text_of(tiny_model)
    for words in ("8 x a100-40gb, ddp", "GFLOP a pair", "GB a process of 40", "if 40% of", "device hours", "cores, at 426"):
        assert words in text
    here = text_of(tiny_model, Booking(1, "this machine", None), measured_seconds=0.5)
    assert "0.50 s a step, as a few rows took here; 128 steps: 1m04s" in here and "none: one process" in here
    assert "not told: run it for some steps" in text_of(tiny_model, Booking(1, "this machine", None))


def test_bad_plans_are_one_line(tiny_model):
    assert read_booking("TRUE", 2) == Booking(2, "this machine", None)
    assert read_booking("64xH200", 1) == Booking(64, "h200", DEVICES["h200"])
    for plan in ("64", "64xabacus", "0xh200", "h200"):
        with pytest.raises(ValueError, match=f"plan is '{plan}'; give plan=true .* one of v100-32gb, .*=64xa100-80gb"):
            read_booking(plan, 1)
    with pytest.raises(ValueError, match=r"global_batch_size is 64, and plan asks for 7 processes; give a number"):
        text_of(tiny_model, Booking(7, "h200", DEVICES["h200"]))


def test_the_command_plans_without_data_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain(settings("model=tiny", "data.train=not-there-{000..999}.tar", "train.samples=1000000", "train.epochs=null",
                             "train.global_batch_size=1024", "plan=16xh100-80gb")) is None
    assert "976 steps of 1,024 pairs, 64 a process" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
