"""Fine-tuning: the start, rates per tower and layer, norms that stay, the pull to the start, and before against after."""

import csv
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from clipkit.commands.pretrain import IMPLIED, pretrain
from clipkit.config.model import as_start
from clipkit.data.samples import SampleError, choose_caption
from clipkit.evaluation.won_and_forgotten import compare_with_before
from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from clipkit.training.finetune import hold_statistics, learning_rate_scales, levels_below_top, pull_towards_start
from clipkit.training.optim import make_optimizer, optimizer_step, set_learning_rate
from clipkit.training.trained_model import make_model
from tests.conftest import TINY, settings
from tests.test_pretrain import STEPS, assert_bit_equal, only_last, run_in_two_parts, weights

SMALL = ("name=tuned", "experiment=finetune", "train.global_batch_size=16", f"train.samples={STEPS * 16}", "train.epochs=null",
         "train.precision=fp32", "data.workers=0", "log.every=1", "log.to=[]", "device=cpu", "optim.lr=1e-3")
RESNET = {"embed_dim": 8, "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear",
                                         "image_size": 32}, "text_cfg": TINY["text_cfg"]}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(shards: str, start: str, *more: str) -> int | None:
    return pretrain(settings(*only_last((*SMALL, f"data.train={shards}", f"model.start={start}", *more))))


def levels(config, beginnings) -> dict[str, set[int]]:
    """{the first beginning that a parameter's name has, else the name: the levels found there}."""
    found: dict[str, set[int]] = {}
    for name, level in levels_below_top(build_model(config=config).towers).items():
        place = next((beginning for beginning in beginnings if name.startswith(beginning)), name)
        found.setdefault(place, set()).add(level)
    return found


TEXT = {"token_embedding": 2, "positional_embedding": 2, "transformer.resblocks.0.": 1, "ln_final": 1, "text_projection": 0,
        "logit_scale": 0}


@pytest.mark.parametrize(("config", "expected"), [
    ({**TINY, "vision_cfg": {**TINY["vision_cfg"], "layers": 3}},
     {"visual.class_embedding": 4, "visual.positional_embedding": 4, "visual.conv1": 4, "visual.ln_pre": 4,
      "visual.transformer.resblocks.0.": 3, "visual.transformer.resblocks.1.": 2, "visual.transformer.resblocks.2.": 1,
      "visual.ln_post": 1, "visual.proj": 0, **TEXT}),
    ({**TINY, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}},
     {"visual.conv1": 5, "visual.conv2": 5, "visual.conv3": 5, "visual.bn1": 5, "visual.bn2": 5, "visual.bn3": 5,
      "visual.layer1.": 4, "visual.layer2.": 3, "visual.layer3.": 2, "visual.layer4.": 1, "visual.attnpool.": 0, **TEXT}),
    (RESNET, {"visual.trunk.conv1": 5, "visual.trunk.bn1": 5, "visual.trunk.layer1.0.": 4, "visual.trunk.layer2.0.": 3,
              "visual.trunk.layer3.0.": 2, "visual.trunk.layer4.0.": 1, "visual.head.": 0, **TEXT}),
    ({**TINY, "text_cfg": {**TINY["text_cfg"], "kind": "cbow"}},
     {"visual.class_embedding": 2, "visual.positional_embedding": 2, "visual.conv1": 2, "visual.ln_pre": 2,
      "visual.transformer.resblocks.0.": 1, "visual.ln_post": 1, "visual.proj": 0, "text.token_embedding": 1, "text.ln": 0,
      "text.mlp": 0, "text.text_projection": 0, "logit_scale": 0}),
], ids=["vit", "open_clip-resnet", "timm-resnet", "cbow"])
def test_layers_count_down_from_the_projection_to_the_embeddings(config, expected):
    assert levels(config, expected) == {place: {level} for place, level in expected.items()}


def test_towers_and_layers_have_their_rates_and_the_temperature_the_full_one(tiny_model):
    scales = learning_rate_scales(tiny_model.towers, image=0.5, text=2.0, layer_decay=0.8)
    assert scales["visual.proj"] == 0.5 and scales["visual.conv1.weight"] == pytest.approx(0.5 * 0.8**2)
    assert scales["text_projection"] == 2.0 and scales["transformer.resblocks.0.ln_1.weight"] == pytest.approx(2 * 0.8)
    assert scales["logit_scale"] == 1.0
    assert set(learning_rate_scales(tiny_model.towers, image=1.0, text=1.0, layer_decay=None).values()) == {1.0}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_with_scales_and_a_pull_equal_plain_pytorch(name):
    """Against torch's optimizer with the groups written out, and the pull as the formula says it."""
    torch.manual_seed(0)
    net, plain = (torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    ours = make_optimizer(list(net.named_parameters()), name=name, lr=0.1, weight_decay=0.1, beta1=0.9, beta2=0.98, eps=1e-6,
                          lr_scales={n: 0.3 if n.startswith("0.") else 1.0 for n, _ in net.named_parameters()})
    rates = {"0.weight": (0.3, 0.1), "0.bias": (0.3, 0.0), "2.weight": (1.0, 0.1), "2.bias": (1.0, 0.0)}
    kind = {"adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6),
            "sgd": lambda groups: torch.optim.SGD(groups)}[name]
    theirs = kind([{"params": [p], "lr": 0.1 * rates[n][0], "weight_decay": rates[n][1]} for n, p in plain.named_parameters()])
    begun = [p.detach().clone() for group in ours.param_groups for p in group["params"]]
    first = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for step in range(5):
        inputs, lr = torch.randn(4, 5), 0.1 / (step + 1)
        set_learning_rate(ours, lr)
        net(inputs).square().mean().backward()
        pull_towards_start(ours, begun, 2.0, optimizer_step(ours, torch.tensor(1.0)))
        plain(inputs).square().mean().backward()
        for group, (scale, _) in zip(theirs.param_groups, rates.values(), strict=True):
            group["lr"] = lr * scale
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():
            for n, p in plain.named_parameters():
                p.sub_(lr * rates[n][0] * 2.0 * (p - first[n]))
    for (n, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=n)  # fused and plain AdamW round differently
        assert not torch.equal(p, first[n])


def test_a_skipped_step_pulls_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([("weight", weight)], lr=0.1, weight_decay=0, beta1=0.9, beta2=0.98, eps=1e-6)
    pull_towards_start(optimizer, [torch.zeros(3)], 5.0, torch.tensor(1.0))
    assert torch.equal(weight, torch.ones(3))
    pull_towards_start(optimizer, [torch.zeros(3)], 5.0, torch.tensor(0.0))
    assert torch.allclose(weight, torch.full((3,), 0.5))


def test_frozen_norms_neither_learn_nor_gather_statistics(tmp_path):
    save_model_folder(build_model(config=RESNET), tmp_path / "resnet")
    model = make_model(settings("data.train=x.tar", "name=x", f"model.start={tmp_path}/resnet", "optim.frozen_norms=true"))
    model.train()
    hold_statistics(model)
    before = {name: tensor.clone() for name, tensor in model.towers.state_dict().items()}
    model.encode_image(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    after = model.towers.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "running" in name)
    norms = {name for name, p in model.towers.named_parameters() if not p.requires_grad}
    assert {"visual.trunk.bn1.weight", "ln_final.bias", "transformer.resblocks.0.ln_1.weight"} <= norms
    assert all(model.towers.get_parameter(name).ndim == 1 for name in norms)


def test_fine_tuning_tells_what_was_won_and_forgotten(shards, start, tmp_path, capsys):
    tasks = f"evaluation.final_tasks=[{shards}]"
    assert run(shards, start, tasks, "optim.towards_start=0.1", "optim.text_lr_scale=0.5") is None
    shown = capsys.readouterr().out
    assert "difference" in shown and "forgotten" in shown
    folder = tmp_path / "runs" / "tuned" / "zero_shot"
    rows = read_csv(folder / "won_and_forgotten.csv")
    assert [row["direction"] for row in rows] == ["image_retrieval", "text_retrieval"]
    by_metric = [{row["metric"]: float(row["value"]) for row in read_csv(where / "results.csv")}
                 for where in (folder / "before", folder)]
    for row in rows:
        assert float(row["before"]) == pytest.approx(by_metric[0][row["metric"]])
        assert float(row["after"]) == pytest.approx(by_metric[1][row["metric"]])
        assert float(row["difference"]) == pytest.approx(float(row["after"]) - float(row["before"]))
        assert float(row["ci_low"]) <= float(row["difference"]) <= float(row["ci_high"])
        assert (int(row["won"]) - int(row["forgotten"])) / int(row["n"]) == pytest.approx(float(row["difference"]))
    assert json.loads((tmp_path / "runs" / "tuned" / "start.json").read_text())["start"] == start


def test_before_is_the_start_at_its_own_image_size(shards, start, tmp_path):
    from clipkit.evaluation.zero_shot import evaluate

    assert run(shards, start, f"evaluation.final_tasks=[{shards}]", "model.image_size=48") is None
    found = {row["metric"]: float(row["value"]) for row in read_csv(tmp_path / "runs/tuned/zero_shot/before/results.csv")}
    wanted = {result.metric: result.value for result in evaluate(load_model(start), [shards])}
    assert wanted.items() <= found.items()
    assert load_model(tmp_path / "runs/tuned").image_size == 48


def read_csv(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_an_end_without_the_tasks_of_the_start_says_so(tmp_path):
    assert compare_with_before(tmp_path).startswith("note      no comparison with the start: ")


def test_a_fine_tuning_resumes_to_the_same_bits(shards, start, tmp_path, monkeypatch):
    more = ("optim.towards_start=5", "optim.image_lr_scale=0.5", "optim.frozen_norms=true", "checkpoint.every_steps=4")
    assert run(shards, start, "name=whole", *more) is None

    run_in_two_parts(lambda: run(shards, start, "name=parts", *more), monkeypatch)
    assert_bit_equal(weights(tmp_path / "runs" / "parts"), weights(tmp_path / "runs" / "whole"))
    whole = weights(tmp_path / "runs" / "whole")["model.safetensors"]
    begun = load_file(f"{start}/open_clip_model.safetensors")
    assert torch.equal(whole["ln_final.weight"], begun["ln_final.weight"])
    assert not torch.equal(whole["text_projection"], begun["text_projection"])


def test_a_start_whose_weights_changed_is_not_gone_on_from(shards, start, tmp_path):
    assert run(shards, start) is None
    torch.manual_seed(1)
    save_model_folder(build_model(config=TINY), tmp_path / "start")
    with pytest.raises(ValueError, match=r"began from other weights than .*start holds .* give another name"):
        run(shards, start)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["model=runs/emoji"], ["model.start=runs/emoji"]),
    (["model=hf-hub:org/name"], ["model.start=hf-hub:org/name"]),
    (["model=RN50", "model.pretrained=openai"], ["model.start=RN50", "model.pretrained=openai"]),
    (["model=tiny", "seed=1"], ["model=tiny", "seed=1"]),
])
def test_a_model_that_is_no_choice_of_settings_is_a_start(arguments, expected):
    assert as_start(arguments) == expected


def test_a_start_brings_its_architecture_past_what_the_data_imply():
    assert next(iter(IMPLIED)) == "model.start"
    assert settings("model.start=emoji", "name=x").model.start == "emoji"  # a folder of that name, not the embedded data
    config = settings("experiment=finetune", "model.start=runs/emoji", "data.train=x.tar", "name=x")
    assert (config.model.start, config.model.name, config.model.config) == ("runs/emoji", None, None)
    assert config.optim.layer_decay == 0.8 and config.train.epochs == 10


@pytest.mark.parametrize(("given", "message"), [
    (("model.start=runs/a", "model.name=RN50"), r"model\.start is 'runs/a', which brings its architecture, and model\.name is "
                                                r"'RN50'; leave one of them out"),
    (("model.start=runs/a", "model.patch_dropout=0.5"), r"model\.patch_dropout is 0\.5; leave one"),
    (("optim.towards_start=0.1",), r"towards_start is 0\.1, but the run starts from random weights; give model\.start"),
    (("model.start=runs/a", "optim.towards_start=500", "optim.lr=1e-2"), r"towards_start is 500, times the learning rate 5; "
                                                                         r"above 1 .* past the start: give at most 100"),
    (("optim.layer_decay=1.5",), r"optim\.layer_decay is 1\.5; it must be above 0, to 1"),
    (("optim.image_lr_scale=0",), r"optim\.image_lr_scale is 0\.0; it must be above 0"),
])
def test_settings_that_do_not_fit_are_answered_in_one_line(given, message):
    with pytest.raises(ValueError, match=message):
        settings("data.train=x.tar", "name=x", *given)


def test_a_fine_tuning_needs_a_name_of_its_own():
    with pytest.raises(ValueError, match=r"name is required with model\.start; give name=\.\.\."):
        settings("model.start=runs/emoji")


@pytest.mark.parametrize(("given", "error", "message"), [
    (("model.start=RN50",), ValueError, r"model\.start is 'RN50', which is no folder, .* has no weights; give a run"),
    (("model.start=no/such",), FileNotFoundError, "there is no folder no/such"),
    (("model.start=START", "loss=siglip"), ValueError, r"trained without the bias that it needs; give loss\.name=clip"),
    (("model.start=START", "model.pretrained=openai"), ValueError, "has its own weights; leave pretrained out"),
])
def test_a_start_that_does_not_fit_is_answered_in_one_line(start, given, error, message):
    with pytest.raises(error, match=message) as caught:
        make_model(settings("data.train=x.tar", "name=x", *(text.replace("START", start) for text in given)))
    assert "\n" not in str(caught.value)


def test_labels_become_captions_through_templates():
    fields = {"label": "sea lion", "tags": ["wet", "grey"]}
    given = ("a photo of a {label}.", "{label}", "something {tags}", "{none} at all", "{txt}!")
    drawn = [choose_caption(b"text", fields, given, None, random.Random(seed)) for seed in range(400)]
    assert set(drawn) == {"a photo of a sea lion.", "sea lion", "something wet", "something grey", "text!"}
    assert 60 < drawn.count("sea lion") < 140  # each entry that the sample can fill has the same chance
    with pytest.raises(SampleError, match=r"nothing in a \{name\}"):
        choose_caption(b"text", fields, ("a {name}",), None, random.Random(0))


def test_templates_are_given_on_the_command_line_as_they_are():
    found = settings("data.train=x.tar", "name=x", "data.caption_fields=[a photo of a {label}.,{label}: an icon]")
    assert found.data.caption_fields == ("a photo of a {label}.", "{label}: an icon")
