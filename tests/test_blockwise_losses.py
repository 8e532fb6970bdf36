"""The blockwise losses against the reference losses and open_clip: values, gradients, memory, products, on 1, 2 and 4 ranks."""

import itertools
import json
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.config.loss import LossConfig
from clipkit.config.schema import SettingsError, parse
from clipkit.losses import BLOCKWISE_LOSSES, LOSSES, make_loss
from clipkit.losses.blockwise import multiply
from scripts.bench.peer_loss import make as open_clip_loss  # without the seconds that open_clip's import takes
from tests.test_losses import LEARNED, loss_and_gradients, relative, towers

NAMES = ("clip", "siglip")
GRADIENTS = ("image_features", "text_features", "logit_scale", "logit_bias")
GROUPS = {"all negatives": lambda num: None, "groups of three": lambda num: torch.arange(num) // 3,
          "no negatives": lambda num: torch.zeros(num, dtype=torch.int64)}


def pairs(num, embed_dim=8, *, nearness=0.0, dtype=torch.float64, seed=0):
    """Unit features of `num` pairs; the nearer to infinity `nearness`, the more alike are partners."""
    generator = torch.Generator().manual_seed(seed)
    image_features, noise = (F.normalize(torch.randn(num, embed_dim, generator=generator, dtype=torch.float64), dim=-1)
                             for _ in range(2))
    return image_features.to(dtype), F.normalize(noise + nearness * image_features, dim=-1).to(dtype)


def differentiated(loss, features, *, scale=10.0, bias=-5.0, **options):
    """{"value": ..., and the gradient of each input}, 0 where there is none."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in
              (*features, features[0].new_tensor(scale), features[0].new_tensor(bias))]
    value = loss(*leaves, **options)
    value.backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return {"value": value.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def gaps(found, wanted, keys=("value", *GRADIENTS)):
    return {key: relative(found[key], wanted[key]) for key in keys}


@pytest.mark.parametrize("name", NAMES)
def test_one_process_equals_open_clip_in_float64(name):
    value, gradients = loss_and_gradients(BLOCKWISE_LOSSES[name], towers(1), slice(None))
    wanted, wanted_gradients = loss_and_gradients(open_clip_loss(name), towers(1), slice(None))
    assert value.item() == pytest.approx(wanted.item(), rel=1e-12)
    for key in LEARNED:
        assert relative(gradients[key], wanted_gradients[key]) < 1e-12, key


@pytest.mark.parametrize("block_size", [None, 1, 3, 7, 20, 1000])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_block_size_gives_the_reference_in_float64(name, groups, block_size):
    features, group_ids = pairs(20, nearness=0.5), GROUPS[groups](20)
    found = differentiated(BLOCKWISE_LOSSES[name], features, group_ids=group_ids, block_size=block_size)
    wanted = differentiated(LOSSES[name], features, group_ids=group_ids)
    assert max(gaps(found, wanted).values()) < 1e-12


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_float32_equals_the_reference_in_float64(name, scale):
    features = pairs(300, 64, nearness=0.3, dtype=torch.float32)
    found = differentiated(BLOCKWISE_LOSSES[name], features, scale=scale, block_size=64)
    wanted = differentiated(LOSSES[name], [one.double() for one in features], scale=scale)
    assert max(gaps(found, wanted).values()) < 1e-5  # sums of 300 products of 64, logits to 100


def test_float32_keeps_the_small_loss_of_sure_pairs_at_scale_100_as_the_reference_does():
    features = pairs(300, 64, nearness=0.9, dtype=torch.float32)
    wanted = differentiated(LOSSES["clip"], [one.double() for one in features], scale=100.0)
    assert 0 < wanted["value"] < 1e-4  # below a logit's own rounding: one logarithm of the sums would lose it
    blockwise, reference = (gaps(differentiated(loss["clip"], features, scale=100.0), wanted)
                            for loss in (BLOCKWISE_LOSSES, LOSSES))
    for key in ("value", "image_features", "text_features", "logit_scale"):
        assert blockwise[key] < 2 * reference[key] + 1e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    leaves = [tensor.requires_grad_() for tensor in (*pairs(5, 3), torch.tensor(4.0).double(), torch.tensor(-1.0).double())]
    used = leaves[:3] if name == "clip" else leaves
    assert torch.autograd.gradcheck(lambda *inputs: BLOCKWISE_LOSSES[name](*inputs, block_size=2), used)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_half_precision_are_summed_in_float32_and_get_gradients_of_their_type(name):
    features = pairs(50, nearness=0.5, dtype=torch.bfloat16)
    found = differentiated(BLOCKWISE_LOSSES[name], features, block_size=16)
    wanted = differentiated(LOSSES[name], [one.double() for one in features])
    assert found["value"].dtype == torch.float32 and found["image_features"].dtype == torch.bfloat16
    assert relative(found["value"], wanted["value"]) < 1e-6
    assert max(gaps(found, wanted, GRADIENTS[:2]).values()) < 2**-8  # the rounding of the gradients alone


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    features = pairs(20, nearness=0.5, dtype=torch.float32)
    wanted = differentiated(BLOCKWISE_LOSSES[name], features, block_size=6)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiated(BLOCKWISE_LOSSES[name], features, block_size=6)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", NAMES)
def test_backward_can_be_asked_twice_but_not_differentiated(name):
    image_features, text_features = (one.requires_grad_() for one in pairs(6))
    value = BLOCKWISE_LOSSES[name](image_features, text_features, torch.tensor(5.0).double())
    first, = torch.autograd.grad(value, image_features, retain_graph=True)
    second, = torch.autograd.grad(3 * value, image_features, create_graph=True)
    torch.testing.assert_close(second, 3 * first)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(second.sum(), text_features)


class Watched(TorchDispatchMode):
    """Counts matrix products; keeps the size of the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        for tensor in made if isinstance(made, tuple | list) else [made]:
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("name", "products"), [("clip", 4), ("siglip", 3)])
def test_few_products_and_no_tensor_above_two_tiles(name, products, bf16):
    features, num, rows = pairs(64, 4, dtype=torch.float32), 64, 8
    with Watched() as watched:
        differentiated(BLOCKWISE_LOSSES[name], features, group_ids=torch.arange(num) // 2, block_size=rows, bf16=bf16)
    assert watched.products == products * num / rows
    assert watched.largest <= 2 * rows * num
    with Watched() as watched:
        differentiated(LOSSES[name], features)
    assert watched.largest == num**2


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_one_product_gives_the_value(name):
    image_features, text_features = (one.requires_grad_() for one in pairs(12))
    scale, bias = torch.tensor(10.0).double(), torch.tensor(-5.0).double()
    with torch.no_grad(), Watched() as watched:
        value = BLOCKWISE_LOSSES[name](image_features, text_features, scale, bias, block_size=12)
    assert watched.products == 1 and not value.requires_grad
    assert value.item() == pytest.approx(LOSSES[name](image_features, text_features, scale, bias).item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_locked_tower_leaves_the_gradients_of_the_other_as_they_are(name):
    image_features, text_features = pairs(12)
    wanted = differentiated(LOSSES[name], (image_features, text_features), bias=0.0)
    for locked in range(2):
        leaves = [image_features.clone(), text_features.clone()]
        leaves[1 - locked].requires_grad_()
        BLOCKWISE_LOSSES[name](*leaves, torch.tensor(10.0).double()).backward()
        assert leaves[locked].grad is None
        assert relative(leaves[1 - locked].grad, wanted[GRADIENTS[1 - locked]]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_shows_in_the_value(name):
    image_features, text_features = pairs(12)
    image_features[3, 0] = torch.nan
    assert not BLOCKWISE_LOSSES[name](image_features, text_features, torch.tensor(10.0), block_size=5).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_multiplies_rounded_factors_and_adds_in_float32(name):
    features, scale = pairs(100, 64, nearness=0.3, dtype=torch.float32), 14.0
    rounded = [one.bfloat16().double() for one in (features[0] * scale, features[1])]
    value = BLOCKWISE_LOSSES[name](*features, torch.tensor(scale), torch.tensor(-5.0), block_size=32, bf16=True)
    wanted = LOSSES[name](*rounded, torch.tensor(1.0), torch.tensor(-5.0).double())
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("nearness", [0.1, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_inexact_as_is_said(name, nearness, scale):
    features = pairs(512, 256, nearness=nearness, dtype=torch.float32)
    found = differentiated(BLOCKWISE_LOSSES[name], features, scale=scale, bf16=True)
    wanted = differentiated(LOSSES[name], features, scale=scale)
    assert max(gaps(found, wanted, GRADIENTS[:2]).values()) < 0.007
    assert relative(found["value"], wanted["value"]) < 2e-3
    if name == "clip":
        assert abs(found["value"] - wanted["value"]) < 2 * scale / 256


def test_bf16_on_a_gpu_asks_for_products_that_torch_has():
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((5, 8), (8, 12)))
    for add in (False, True):
        multiply(left, right, out=torch.empty(5, 12, device="meta"), add=add)


def one_rank(rank: int, world_size: int, port: int) -> None:
    """Hold this rank's value and feature gradients, and the mean over ranks of those of scale and bias, to the reference's."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    num = 6 * world_size
    rows = slice(6 * rank, 6 * rank + 6)
    features = [one[rows] for one in pairs(num, nearness=0.5)]
    for name in NAMES:
        for groups, block_size in itertools.product(GROUPS.values(), (None, 4)):
            group_ids = groups(num)
            options = {} if group_ids is None else {"group_ids": group_ids[rows]}
            found = differentiated(BLOCKWISE_LOSSES[name], features, block_size=block_size, **options)
            wanted = differentiated(LOSSES[name], features, **options)
            for tensor in [one[key] for one in (found, wanted) for key in ("logit_scale", "logit_bias")]:
                dist.all_reduce(tensor)
            assert max(gaps(found, wanted).values()) < 1e-12, (name, block_size)
        found = differentiated(BLOCKWISE_LOSSES[name], [one.float() for one in features], bf16=True)
        assert max(gaps(found, differentiated(LOSSES[name], features), GRADIENTS[:2]).values()) < 0.01
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_gets_the_value_and_gradients_of_the_reference(world_size, free_port):
    mp.spawn(one_rank, args=(world_size, free_port), nprocs=world_size)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_without_rows_and_features_without_partners_are_refused(name):
    image_features, text_features = pairs(6)
    with pytest.raises(ValueError, match="block_size is 0; give a number of rows above 0, or None"):
        BLOCKWISE_LOSSES[name](image_features, text_features, torch.tensor(10.0), block_size=0)
    with pytest.raises(ValueError, match="one row per pair"):
        BLOCKWISE_LOSSES[name](image_features, text_features[:-1], torch.tensor(10.0))


@pytest.mark.parametrize("name", NAMES)
def test_make_loss_gives_the_reference_or_a_blockwise_loss(name):
    features = pairs(12, nearness=0.5)
    assert make_loss(name, block_size=0, bf16=False) is LOSSES[name]
    with Watched() as watched:
        found = differentiated(make_loss(name, block_size=3, bf16=False), features)
    assert watched.products == 4 * (4 if name == "clip" else 3)
    assert max(gaps(found, differentiated(LOSSES[name], features)).values()) < 1e-12


def test_bf16_of_the_reference_is_refused():
    values = {"name": "clip", "mask_false_negatives": "none", "block_size": 0, "bf16": True}
    assert parse(LossConfig, values | {"block_size": None}).bf16
    with pytest.raises(SettingsError, match=r"loss.bf16 is true and loss.block_size 0, .*; set loss.block_size to null"):
        parse(LossConfig, values)


@pytest.mark.slow
def test_the_benchmark_compares_before_it_times(tmp_path):
    from scripts.bench.loss import bench

    figures = bench(sys.executable, tmp_path / "loss.json", quick=False, sizes=(96,), rounds=1)
    assert [(figure.bench, figure.case) for figure in figures] == [
        (kind, f"{name}, B = 96") for name in NAMES for kind in ("loss", "loss memory")]
    for saved in json.loads((tmp_path / "loss.json").read_text()):
        assert max(saved["notes"]["equal_to"].values()) < 1e-5 and saved["peer_version"].startswith("open_clip_torch 3.")
