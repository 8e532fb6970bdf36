"""Every kind of tower trains: fifty steps on coloured squares, with falling loss."""

import json

import pytest

from clipkit.commands.pretrain import pretrain
from tests.conftest import TINY, settings

TEXT = TINY["text_cfg"]
KINDS = {
    "RN50-shaped + CBOW": ({"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": [3, 4, 6, 3], "width": 8,
                                                             "head_width": 16},
                            "text_cfg": {"kind": "cbow", "width": 32, "context_length": 16}}, ()),
    "ViT + Transformer": ({**TINY, "embed_dim": 32}, ()),
    "timm + Transformer": ({"embed_dim": 32, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet",
                                                             "timm_pool": "avg", "timm_proj": "linear"},
                            "text_cfg": TEXT}, ()),
    "locked image tower": ({**TINY, "embed_dim": 32}, ("model.lock_image=true",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_bring_the_loss_down(kind, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, more = KINDS[kind]
    (tmp_path / "own" / "model").mkdir(parents=True)
    model = {"start": None, "lora_rank": None, "lora_alpha": None, "name": None, "pretrained": None, "config": config,
             "image_weights": None, "image_size": None, "patch_dropout": None, "lock_image": False, "unlocked_image_groups": 0,
             "lock_text": False, "unlocked_text_layers": 0}
    (tmp_path / "own" / "model" / "mine.yaml").write_text(json.dumps(model))
    options = (f"data.train={shards}", "name=small", "train.global_batch_size=32", "train.samples=1600", "train.epochs=null",
               "train.precision=fp32", "data.workers=0", "log.every=5", "log.to=[]", "device=cpu", "optim.lr=2e-3",
               "data.caption_fields=[colour]", "loss.mask_false_negatives=caption", *more)
    assert pretrain(settings(*options, config_dir=tmp_path / "own", model="mine")) is None
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "runs/small/metrics.jsonl").read_text().splitlines())
              if "loss" in line]
    assert losses[-1] < 0.7 * losses[0], losses
