"""Which weights decay, the learning rate, skipped steps, and the average of the weights."""

import math

import pytest
import torch

from clipkit.training.average import WeightAverage
from clipkit.training.optim import clip_gradient, is_decayed, make_optimizer, optimizer_step, set_learning_rate
from clipkit.training.schedule import learning_rate, warmup_steps

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6}


def test_recipe_open_clip_decays_what_open_clip_train_decays(tiny_model):
    """The rule of open_clip_train 3.3: fewer than two dimensions, or bn, ln, bias, logit_scale in the name: no decay."""
    for name, parameter in tiny_model.towers.named_parameters():
        excluded = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
        assert is_decayed(name, parameter, "open_clip") == (not excluded), name


def test_recipe_clipkit_spares_positions_too(tiny_model):
    decayed = {name for name, p in tiny_model.towers.named_parameters() if is_decayed(name, p, "clipkit")}
    by_open_clip = {name for name, p in tiny_model.towers.named_parameters() if is_decayed(name, p, "open_clip")}
    assert by_open_clip - decayed == {"positional_embedding", "visual.positional_embedding"}
    assert "token_embedding.weight" in decayed and "visual.class_embedding" not in decayed


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("SGD", "SGD"), ("adagrad", "Adagrad"), ("lion", "Lion"),
                                            ("lamb", "Lamb")])
def test_optimizers_come_by_name_and_keep_the_groups(tiny_model, name, kind):
    optimizer = make_optimizer(list(tiny_model.towers.named_parameters()), name=name, **OPTIONS)
    assert type(optimizer).__name__ == kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    features = tiny_model(torch.zeros(2, 3, 32, 32), tiny_model.tokenize(["a", "b"]))
    features.image_features.sum().backward()
    before = tiny_model.towers.visual.proj.detach().clone()
    optimizer_step(optimizer, torch.tensor(1.0))
    assert not torch.equal(tiny_model.towers.visual.proj, before)


def test_an_unknown_optimizer_is_answered_with_the_known_ones(tiny_model):
    with pytest.raises(ValueError, match=r"optim.name is 'adamx'; choose one of .*adamw"):
        make_optimizer(list(tiny_model.towers.named_parameters()), name="adamx", **OPTIONS)
    tiny_model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to learn"):
        make_optimizer(list(tiny_model.towers.named_parameters()), **OPTIONS)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_bad_gradient_changes_nothing(name, bad):
    torch.manual_seed(0)
    parameters = [("w.weight", torch.nn.Parameter(torch.randn(3, 4))), ("w.bias", torch.nn.Parameter(torch.randn(4)))]
    optimizer = make_optimizer(parameters, name=name, **OPTIONS)

    def step(factor: float) -> float:
        for _, parameter in parameters:
            parameter.grad = torch.full_like(parameter, factor)
        return optimizer_step(optimizer, clip_gradient([p for _, p in parameters], 1.0)).item()

    assert step(0.5) == 0
    before = [parameter.detach().clone() for _, parameter in parameters]
    state = {key: value.clone() for key, value in optimizer.state[parameters[0][1]].items() if torch.is_tensor(value)}
    assert step(bad) == 1
    assert all(torch.equal(p, b) for (_, p), b in zip(parameters, before, strict=True))
    assert all(torch.equal(optimizer.state[parameters[0][1]][key], value) for key, value in state.items())
    assert step(0.5) == 0
    assert not torch.equal(parameters[0][1], before[0])
    assert all(parameter.grad is None for _, parameter in parameters)


def test_clipping_returns_the_norm_and_scales_to_the_limit():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    assert clip_gradient([parameter], None).item() == 6 and parameter.grad.norm() == 6
    assert clip_gradient([parameter], 1.5).item() == 6
    assert parameter.grad.norm().item() == pytest.approx(1.5, rel=1e-5)


def test_warmup_reads_steps_shares_and_samples():
    read = {text: warmup_steps(text, total_steps=1000, global_batch_size=100)
            for text in ("500", "2%", "50k samples", "1.5k", "0", "20000 samples")}
    assert read == {"500": 500, "2%": 20, "50k samples": 500, "1.5k": 1500, "0": 0, "20000 samples": 200}
    with pytest.raises(ValueError, match=r"schedule\.warmup is 'soon'"):
        warmup_steps("soon", total_steps=1, global_batch_size=1)


def test_cosine_equals_the_formula_of_open_clip_train():
    """There (3.3, scheduler.py): base * (s + 1) / W in warm-up, then 0.5 * (1 + cos(pi * (s - W) / (T - W))) * base."""
    peak, warmup, total = 3e-4, 7, 50
    for step in range(total):
        wanted = (peak * (step + 1) / warmup if step < warmup
                  else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * peak)
        found = learning_rate(step, name="cosine", peak=peak, warmup=warmup, total_steps=total)
        assert found == pytest.approx(wanted, rel=1e-12)


def test_constant_stays_and_cooldown_falls_to_zero():
    constant = [learning_rate(s, name="constant", peak=1.0, warmup=0, total_steps=10) for s in range(10)]
    assert constant == [1.0] * 10
    falling = [learning_rate(s, name="constant_with_cooldown", peak=1.0, warmup=0, total_steps=10, cooldown=0.4)
               for s in range(11)]
    assert falling[:7] == [1.0] * 7
    assert falling[7:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_the_rate_reaches_every_group(tiny_model):
    optimizer = make_optimizer(list(tiny_model.towers.named_parameters()), **OPTIONS)
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_groups_with_scales_learn_at_their_multiple_of_the_rate(tiny_model):
    named = list(tiny_model.towers.named_parameters())
    scales = {name: 0.25 if name.startswith("visual.") else 1.0 for name, _ in named}
    optimizer = make_optimizer(named, lr_scales=scales, **OPTIONS)
    set_learning_rate(optimizer, 0.5)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {id(p): (0.5 * scales[name], 0.1 if is_decayed(name, p, "clipkit") else 0.0) for name, p in named}


def test_the_average_follows_the_formula_and_steps_aside():
    module = torch.nn.BatchNorm1d(2)
    average = WeightAverage(module, decay=0.9)
    wanted = module.weight.detach().clone()
    for step, value in enumerate([2.0, 5.0, -1.0]):
        module.weight.data.fill_(value)
        module.num_batches_tracked += 1
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
    assert torch.allclose(average.weights["weight"], wanted)
    assert average.weights["num_batches_tracked"] == 3
    with average.applied():
        assert torch.allclose(module.weight, wanted)
    assert (module.weight == -1).all()
