"""Micro-batches with cached feature gradients against the whole batch at once, and against open_clip's accumulation."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from clipkit.losses import clip_loss, siglip_loss
from clipkit.model.build import build_model
from clipkit.training.gradient_cache import cached_backward
from tests.conftest import TINY

BATCH = 12


def model_and_batch(loss: str = "clip", **vision):
    torch.manual_seed(0)
    model = build_model(config={**TINY, "vision_cfg": {**TINY["vision_cfg"], **vision}}, loss=loss).double().train()
    images = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)
    texts = ["a", "red square", "two blue cats on a mat", "rain again"] * (BATCH // 4)
    return model, images, model.tokenize([f"{text} {number}" for number, text in enumerate(texts)])


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, wanted, tolerance: float = 1e-10):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-15, name


@pytest.mark.parametrize("rows", [1, 5, 12, 100])
@pytest.mark.parametrize(("name", "loss"), [("clip", clip_loss), ("siglip", siglip_loss)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, loss, rows):
    model, images, tokens = model_and_batch(name)
    whole = copy.deepcopy(model)
    wanted = loss(*whole(images, tokens))
    wanted.backward()
    features, value = cached_backward(model, images, tokens, loss=loss, micro_batch_size=rows)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)  # features are fp32
    torch.testing.assert_close(features.text_features, whole.encode_text(tokens).detach())
    assert_same_gradients(gradients_of(model), gradients_of(whole), 1e-5)  # through fp32 features; sums in another order
    assert "towers.logit_scale" in gradients_of(model)


def test_texts_may_go_through_their_tower_in_another_order():
    model, images, tokens = model_and_batch()
    whole = copy.deepcopy(model)
    cached_backward(whole, images, tokens, loss=clip_loss, micro_batch_size=4)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    features, _ = cached_backward(model, images, tokens, loss=clip_loss, micro_batch_size=4, text_order=order)
    torch.testing.assert_close(features.text_features, whole.encode_text(tokens).detach())
    assert_same_gradients(gradients_of(model), gradients_of(whole), 1e-5)


def test_each_micro_batch_meets_the_same_random_numbers_twice():
    """With patches left out at random, the loss belongs to the gradient only if both passes leave out the same."""
    model, images, tokens = model_and_batch(patch_dropout=0.5)
    slow = copy.deepcopy(model)
    torch.manual_seed(3)
    features, value = cached_backward(model, images, tokens, loss=clip_loss, micro_batch_size=4)
    after = torch.rand(1)
    torch.manual_seed(3)
    pieces = [slow(images[first:first + 4], tokens[first:first + 4]) for first in range(0, BATCH, 4)]
    assert torch.equal(after, torch.rand(1))
    image_features, text_features = (torch.cat([piece[side] for piece in pieces]) for side in (0, 1))
    torch.testing.assert_close(features.image_features, image_features.detach())
    wanted = clip_loss(image_features, text_features, pieces[0].logit_scale)
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_same_gradients(gradients_of(model), gradients_of(slow), 1e-5)


def test_a_locked_tower_gets_no_gradient():
    model, images, tokens = model_and_batch()
    model.towers.visual.requires_grad_(False)
    cached_backward(model, images, tokens, loss=clip_loss, micro_batch_size=4)
    assert all(not name.startswith("towers.visual") for name in gradients_of(model))


def test_running_statistics_change_once():
    """As with the micro-batches one after another, and not twice for each."""
    torch.manual_seed(0)
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    model = build_model(config={**TINY, "vision_cfg": vision}).train()
    slow = copy.deepcopy(model)
    images, tokens = torch.randn(8, 3, 32, 32), model.tokenize(["a"] * 8)
    cached_backward(model, images, tokens, loss=clip_loss, micro_batch_size=4)
    for first in (0, 4):
        slow.encode_image(images[first:first + 4])
    for (name, found), wanted in zip(model.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)


def one_rank(rank: int, world_size: int, port: int, folder) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    model, images, tokens = model_and_batch()
    rows = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    calls = count_all_reduces(parallel)
    cached_backward(parallel, images[rows], tokens[rows], loss=clip_loss, micro_batch_size=2)
    if rank == 0:
        save_file(gradients_of(model) | {"calls": torch.tensor(len(calls))}, folder / "gradients.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def count_all_reduces(parallel) -> list:
    """DDP calls the hook once for each bucket that it averages."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        return allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, hook)
    return calls


@pytest.mark.multiprocess
def test_two_ranks_with_micro_batches_give_the_gradient_of_one_batch_and_average_once(free_port, tmp_path):
    mp.spawn(one_rank, args=(2, free_port, tmp_path), nprocs=2)
    found = load_file(tmp_path / "gradients.safetensors")
    buckets = found.pop("calls").item()
    model, images, tokens = model_and_batch()
    clip_loss(*model(images, tokens)).backward()
    assert_same_gradients(found, gradients_of(model), 1e-5)
    assert buckets <= 2  # of three micro-batches, one is averaged; DDP has one or two buckets for so small a model
