"""Training on frozen features: what a batch is, and that its step is PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipkit.losses import make_loss
from clipkit.model.locked_pair import Projections
from clipkit.training.locked_pair import Pairs, draw_pairs, train_step


def test_every_pass_takes_each_picture_once_with_a_caption_of_its_own():
    images, texts = torch.arange(10.0)[:, None], torch.arange(20.0)[:, None]
    captions = [torch.tensor([2 * number, 2 * number + 1][: 1 + number % 2]) for number in range(10)]

    def first(num_batches: int, seed: int) -> list[Pairs]:
        return [pairs for pairs, _ in zip(draw_pairs(images, texts, captions, torch.arange(10), batch_size=5, seed=seed),
                                          range(num_batches), strict=False)]

    seen = set()
    for one, two in zip(*[iter(first(40, 0))] * 2, strict=True):
        rows = torch.cat([one.group_ids, two.group_ids])
        assert sorted(rows.tolist()) == list(range(10))
        for pairs in (one, two):
            for row, image, text in zip(pairs.group_ids.tolist(), pairs.image_features, pairs.text_features, strict=True):
                assert image.item() == row and text.item() in captions[row]
                seen.add((image.item(), text.item()))
    assert len(seen) == 5 + 2 * 5  # every caption comes
    assert all(torch.equal(a.group_ids, b.group_ids) for a, b in zip(first(3, 1), first(3, 1), strict=True))


def test_steps_are_those_of_plain_pytorch():
    torch.manual_seed(0)
    projections = Projections(6, 5, 4, image_kind="mlp", init_logit_scale=10)
    image = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4, bias=False))
    text, scale = nn.Linear(5, 4, bias=False), nn.Parameter(torch.tensor(math.log(10.0)))
    image.load_state_dict(dict(zip(image.state_dict(), projections.image.state_dict().values(), strict=True)))
    text.load_state_dict(projections.text.state_dict())
    ours = torch.optim.AdamW(projections.parameters(), lr=0.01)
    plain = torch.optim.AdamW([*image.parameters(), *text.parameters(), scale], lr=0.01)
    groups = torch.tensor([0, 1, 1, 2])
    same = (groups[:, None] == groups) & ~torch.eye(4, dtype=torch.bool)
    for _ in range(5):
        pairs = Pairs(torch.randn(4, 6), F.normalize(torch.randn(4, 5), dim=-1), groups)
        step = train_step(projections, ours, pairs, lr=0.01, loss_function=make_loss("clip", block_size=None, bf16=False),
                          masked=True, max_grad_norm=None)
        one, two = F.normalize(image(pairs.image_features), dim=-1), F.normalize(text(pairs.text_features), dim=-1)
        logits = (scale.exp() * one @ two.T).masked_fill(same, -torch.inf)
        loss = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
        plain.zero_grad()
        loss.backward()
        plain.step()
        assert step.loss == pytest.approx(loss.item(), abs=1e-5)
    for found, wanted in zip(projections.image.parameters(), image.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert projections.logit_scale.item() == pytest.approx(scale.item(), abs=1e-5)


def test_a_step_that_is_not_finite_ends_the_run():
    projections = Projections(6, 5, 4, image_kind="linear", init_logit_scale=10)
    with pytest.raises(ValueError, match="the gradient is not finite"):
        train_step(projections, torch.optim.AdamW(projections.parameters(), fused=True), Pairs(
            torch.full((2, 6), torch.nan), torch.ones(2, 5), torch.arange(2)), lr=0.1,
            loss_function=make_loss("clip", block_size=None, bf16=False), masked=False, max_grad_norm=1.0)
