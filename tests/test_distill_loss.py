"""The loss of distillation against the divergence written out in float64, on one process and on two."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from clipkit.losses import distill_loss

G, D, T, HIDDEN = 8, 6, 4, 5
LEARNED = ("image_tower", "text_tower", "log_scale")


def towers() -> dict[str, torch.Tensor]:
    """Two linear towers with a log temperature, their inputs, and what a wider teacher makes of the pairs."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"images": (G, HIDDEN), "texts": (G, HIDDEN), "image_tower": (HIDDEN, D), "text_tower": (HIDDEN, D),
              "teacher_images": (G, T), "teacher_texts": (G, T)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors | {"log_scale": torch.tensor(2.0, dtype=torch.float64)}


def loss_and_gradients(loss, rows: slice) -> tuple[torch.Tensor, ...]:
    tensors = towers()
    leaves = [tensors[name].requires_grad_() for name in LEARNED]
    images, texts, teacher_images, teacher_texts = (
        F.normalize(tensor[rows], dim=-1) for tensor in (tensors["images"] @ leaves[0], tensors["texts"] @ leaves[1],
                                                         tensors["teacher_images"], tensors["teacher_texts"]))
    value = loss(images, texts, leaves[2].exp(), teacher_image_features=teacher_images, teacher_text_features=teacher_texts,
                 teacher_logit_scale=20.0)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def slow_loss(images, texts, scale, *, teacher_image_features, teacher_text_features, teacher_logit_scale):
    """One row and one direction at a time, with the divergence written out."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other, teacher_one, teacher_other in ((images, texts, teacher_image_features, teacher_text_features),
                                                   (texts, images, teacher_text_features, teacher_image_features)):
        for row in range(len(one)):
            given = torch.softmax(scale * (other @ one[row]), dim=0)
            wanted = torch.softmax(teacher_logit_scale * (teacher_other @ teacher_one[row]), dim=0)
            total = total + (wanted * (wanted.log() - given.log())).sum()
    return total / (2 * len(images))


def test_value_and_gradients_are_those_of_the_divergence_written_out():
    for found, wanted in zip(loss_and_gradients(distill_loss, slice(None)), loss_and_gradients(slow_loss, slice(None)),
                             strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    features = F.normalize(torch.randn(2, G, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(20.0, requires_grad=True)
    value = distill_loss(*features, scale, teacher_image_features=features[0], teacher_text_features=features[1],
                         teacher_logit_scale=20.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and scale.grad is not None and scale.grad.abs() < 1e-6


def test_features_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="must have one shape: one row per pair"):
        distill_loss(torch.ones(2, D), torch.ones(2, D), torch.tensor(1.0), teacher_image_features=torch.ones(2, T),
                     teacher_text_features=torch.ones(3, T), teacher_logit_scale=1.0)


def one_rank(rank: int, world_size: int, port: int, queue) -> None:
    """The means over processes, as DDP takes them."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found = loss_and_gradients(distill_loss, slice(rank * G // world_size, (rank + 1) * G // world_size))
    for tensor in found:
        dist.all_reduce(tensor)
    if rank == 0:
        queue.put([(tensor / world_size).tolist() for tensor in found])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_two_ranks_give_loss_and_gradient_of_the_whole_batch(free_port):
    queue = mp.get_context("spawn").Queue()
    mp.spawn(one_rank, args=(2, free_port, queue), nprocs=2)
    for found, wanted in zip(queue.get(timeout=30), loss_and_gradients(slow_loss, slice(None)), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-10, atol=1e-12)
