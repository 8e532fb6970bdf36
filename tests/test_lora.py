"""LoRA: the update against its formula, the start bit for bit, what learns, merged folders, resuming, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parametrize

from clipkit.commands.pretrain import pretrain
from clipkit.model.attention import fuse_attention
from clipkit.model.build import build_model, lock_towers
from clipkit.model.folder import WEIGHTS_NAME, load_model, save_model_folder
from clipkit.training.estimate import estimate_step
from clipkit.training.finetune import freeze_norms, levels_below_top
from clipkit.training.lora import LowRankUpdate, add_lora, merged_weights
from clipkit.training.trained_model import make_model
from tests.conftest import TINY, settings
from tests.test_pretrain import assert_bit_equal, lines, only_last, run_in_two_parts, weights

SMALL = ("name=adapted", "experiment=finetune", "train.global_batch_size=16", "train.samples=96", "train.epochs=null",
         "train.precision=fp32", "data.workers=0", "log.every=1", "log.to=[]", "device=cpu", "optim.lr=1e-2",
         "model.lora_rank=4", "schedule.warmup=1")
RESNET = {**TINY, "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}}
TIMM = {**TINY, "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 32}}
CBOW = {**TINY, "text_cfg": {**TINY["text_cfg"], "kind": "cbow"}}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(shards: str, start: str, *more: str) -> int | None:
    return pretrain(settings(*only_last((*SMALL, f"data.train={shards}", f"model.start={start}", *more))))


def batch(model):
    images = torch.randint(256, (4, 3, model.image_size, model.image_size), generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8), model.tokenize(["a", "a red cat on a mat", "two dogs", "a square, 7 of shard 2"])


def adapt(model, *, rank=4, alpha=None) -> int:
    freeze_norms(model.towers)
    return add_lora(model.towers, levels_below_top(model.towers), rank=rank, alpha=alpha, seed=0)


def adapted(config):
    """A model of which each matrix has an update that is not zero."""
    torch.manual_seed(0)
    model = build_model(config=config).eval()
    adapt(model)
    with torch.no_grad():
        for name, parameter in model.towers.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    return model


def test_values_and_gradients_equal_those_of_the_formula_written_out():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5, dtype=torch.float64)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    update = LowRankUpdate(layer.weight, 2, 1.5, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(update.lora_B)
    a, b = (p.detach().clone().requires_grad_() for p in (update.lora_A, update.lora_B))
    parametrize.register_parametrization(layer, "weight", update)
    inputs = torch.randn(7, 6, dtype=torch.float64)
    found = layer(inputs)
    wanted = inputs @ weight.T + 1.5 * (inputs @ a.T) @ b.T + bias
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(update.lora_A.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(update.lora_B.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_the_update_is_computed_in_full_precision_under_autocast():
    update = LowRankUpdate(torch.zeros(5, 6), 2, 1.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(update.lora_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = update(torch.zeros(5, 6))
    assert torch.equal(found, update(torch.zeros(5, 6)))


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_features_are_those_of_the_start_bit_for_bit(tiny_model, fused):
    if fused:
        fuse_attention(tiny_model.towers, causal_text=True)
    images, tokens = batch(tiny_model)
    images, tokens = images.float(), tokens.long()
    before = tiny_model.towers.encode_image(images), tiny_model.towers.encode_text(tokens)
    assert adapt(tiny_model) == 8  # two blocks of four matrices
    assert torch.equal(tiny_model.towers.encode_image(images), before[0])
    assert torch.equal(tiny_model.towers.encode_text(tokens), before[1])


@pytest.mark.parametrize("config", [TINY, TIMM], ids=["open_clip", "timm"])
def test_a_model_folder_holds_merged_weights_under_open_clips_names(config, tmp_path):
    model = adapted(config)
    save_model_folder(model, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / WEIGHTS_NAME).keys() == build_model(config=config).towers.state_dict().keys()
    plain = load_model(tmp_path / "merged")
    fuse_attention(model.towers, causal_text=True)
    for found, wanted in zip(plain(*batch(plain))[:2], model(*batch(plain))[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_merged_folder_opens_in_open_clip(tmp_path):
    import open_clip

    model = adapted(TINY)
    save_model_folder(model, tmp_path / "merged")
    theirs: Any = open_clip.create_model(f"local-dir:{tmp_path}/merged").eval()
    images, tokens = batch(model)
    pictures = (images.float() / 255 - model.mean) / model.std
    torch.testing.assert_close(theirs.encode_image(pictures, normalize=True), model(images, tokens).image_features,
                               rtol=0, atol=1e-6)


def test_a_weight_made_anew_is_counted_once_however_many_rows_there_are(tiny_model, monkeypatch):
    add_lora(tiny_model.towers, levels_below_top(tiny_model.towers), rank=4, alpha=None, seed=0)
    from_few = estimate_step(tiny_model, batch_size=160, precision="fp32").memory_gb
    monkeypatch.setattr("clipkit.training.estimate.PROBE_ROWS", 160)
    assert from_few == pytest.approx(estimate_step(tiny_model, batch_size=160, precision="fp32").memory_gb, rel=0.01)


def test_weights_without_lora_pass_as_they_are(tiny_model):
    given = tiny_model.towers.state_dict()
    found = merged_weights(given)
    assert list(found) == list(given) and all(found[name] is given[name] for name in given)


def test_an_adapted_model_can_be_copied():
    model = adapted(TINY)
    images, tokens = batch(model)
    assert torch.equal(copy.deepcopy(model)(images, tokens).image_features, model(images, tokens).image_features)


def test_alpha_over_rank_is_the_scale_and_two_by_default(tiny_model):
    other = copy.deepcopy(tiny_model)
    for model, alpha, scale in ((tiny_model, None, 2.0), (other, 2.0, 0.5)):
        adapt(model, alpha=alpha)
        assert {float(value) for name, value in model.towers.state_dict().items() if name.endswith(".scale")} == {scale}


def learning(model) -> set[str]:
    return {name.replace("parametrizations.", "") for name, p in model.towers.named_parameters() if p.requires_grad}


def test_updates_projections_and_temperature_learn_and_locked_towers_do_not(tiny_model):
    lock_towers(tiny_model, image=True)
    adapt(tiny_model)
    block = "transformer.resblocks.0."
    matrices = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert learning(tiny_model) == {"logit_scale", "text_projection", *(
        f"{block}{matrix}.0.{part}" for matrix in matrices for part in ("lora_A", "lora_B"))}


def test_of_a_locked_tower_the_unlocked_layers_are_adapted():
    torch.manual_seed(0)
    model = build_model(config={**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": 3}})
    lock_towers(model, image=True, unlocked_image_groups=2)  # the projection, and the last block with the norm after it
    assert adapt(model) == 8
    assert {name.split(".")[3] for name in learning(model) if name.startswith("visual.transformer")} == {"2"}
    assert "visual.proj" in learning(model) and "visual.ln_post.weight" not in learning(model)


def test_the_optimizer_of_rank_8_keeps_a_quarter_at_most():
    """Two fp32 moments for each number that learns, on the shapes of ViT-B-32; the weights themselves are not allocated."""
    import open_clip

    with torch.device("meta"):
        towers = open_clip.CLIP(**(open_clip.get_model_config("ViT-B-32") or {}))
    full = sum(p.numel() for p in towers.parameters())
    freeze_norms(towers)
    add_lora(towers, levels_below_top(towers), rank=8, alpha=None, seed=0)
    rank_8 = sum(p.numel() for p in towers.parameters() if p.requires_grad)
    assert (full, rank_8) == (151_277_313, 2_621_441)
    assert rank_8 <= full / 4


def test_a_run_learns_updates_alone_resumes_to_the_same_bits_and_leaves_merged_averages(shards, start, tmp_path, monkeypatch):
    one_shard = shards.replace("{000..003}", "000")
    more = ("checkpoint.every_steps=3", "train.ema_decay=0.5", "data.caption_fields=[colour]",
            f"evaluation.tasks=[{one_shard}]", f"evaluation.final_tasks=[{one_shard}]")
    assert run(shards, start, "name=whole", *more) is None
    run_in_two_parts(lambda: run(shards, start, "name=parts", *more), monkeypatch)
    whole = weights(tmp_path / "runs" / "whole")
    assert_bit_equal(weights(tmp_path / "runs" / "parts"), whole)

    begun = load_file(f"{start}/{WEIGHTS_NAME}")
    changed = {name for name, tensor in whole["model.safetensors"].items()
               if not torch.equal(tensor, begun.get(name.replace("parametrizations.", "").removesuffix(".original"),
                                                    torch.zeros_like(tensor)))}
    assert {name.rsplit(".", 1)[-1] for name in changed} == {"lora_A", "lora_B", "scale",  # these are not in the start
                                                             "proj", "text_projection", "logit_scale"}
    merged = merged_weights(whole["ema.safetensors"])
    folder = load_file(tmp_path / "runs" / "whole" / "model" / WEIGHTS_NAME)
    assert folder.keys() == begun.keys() and all(torch.equal(folder[name], merged[name]) for name in folder)
    losses = [line["loss"] for line in lines(tmp_path / "runs" / "whole") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0], losses


def test_it_says_what_a_run_would_cost(start, shards, capsys):
    assert run(shards, start, "plan=2xa100-80gb") is None
    assert "M learn" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "message"), [
    (("model.lora_rank=0",), r"model\.lora_rank is 0; it must be at least 1"),
    (("model.lora_rank=-4",), r"model\.lora_rank is -4; it must be at least 1"),
    (("model.lora_alpha=8",), r"lora_alpha is 8, but model\.lora_rank is null, so nothing reads it; give model\.lora_rank=8"),
    (("model.lora_rank=4", "model.lora_alpha=0"), r"model\.lora_alpha is 0\.0; it must be above 0"),
    (("model.start=null", "model.name=RN50", "model.lora_rank=4"), r"starts from random weights, .* give model\.start"),
])
def test_settings_that_do_not_fit_are_answered_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        settings(*only_last(("data.train=x.tar", "name=x", "model.start=runs/a", *given)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("config", "given", "message"), [
    (TINY, ("model.lora_rank=33",), r"lora_rank is 33, above the smaller side of \S+ \(\d+, \d+\); give at most 32"),
    (RESNET, (), r"the image tower has no linear matrices in its blocks; give model\.lock_image=true"),
    (CBOW, (), r"the text tower has no linear matrices in its blocks; give model\.lock_text=true"),
    (TINY, ("model.lock_image=true", "model.lock_text=true"), r"both towers are locked: no matrix is left .*; unlock one"),
    (TINY, ("parallel.strategy=fsdp",), r"strategy is 'fsdp' and model\.lora_rank is 4: .* give parallel\.strategy=ddp"),
    (TINY, ("optim.towards_start=0.1",), r"towards_start is 0\.1 and model\.lora_rank is 4: .* give optim\.towards_start=0"),
])
def test_models_that_do_not_fit_are_answered_in_one_line(tmp_path, config, given, message):
    save_model_folder(build_model(config=config), tmp_path / "start")
    with pytest.raises(ValueError, match=message) as caught:
        make_model(settings(*only_last(("data.train=x.tar", "name=x", f"model.start={tmp_path}/start", "model.lora_rank=4",
                                        *given))))
    assert "\n" not in str(caught.value)


def test_a_tower_without_matrices_can_be_locked(tmp_path):
    save_model_folder(build_model(config=RESNET), tmp_path / "start")
    model = make_model(settings("data.train=x.tar", "name=x", f"model.start={tmp_path}/start", "model.lora_rank=4",
                                "model.lock_image=true"))
    assert not any("trunk" in name for name in learning(model)) and "text_projection" in learning(model)
