"""Between two models: the ends are the ends, what lies between is the mean, and what is chosen is chosen by the rule."""

import csv
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.commands.export import export
from clipkit.commands.interpolate import interpolate as run_command
from clipkit.config.export import ExportConfig
from clipkit.config.interpolate import InterpolateConfig
from clipkit.config.schema import SettingsError
from clipkit.evaluation.interpolation import Point, alphas, greedy_soup, knee
from clipkit.evaluation.results import Result
from clipkit.evaluation.tasks import load_task
from clipkit.evaluation.zero_shot import measure
from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from clipkit.model.interpolate import interpolate, interpolated_model, soup
from tests.conftest import TINY, command_settings

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(7, 5, generator=generator), "logit_scale": torch.tensor(math.log(10.0 * seed)),
            "half": torch.randn(3, generator=generator).half(), "num_batches_tracked": torch.tensor(seed)}


def test_at_0_and_1_the_ends_come_back_bit_for_bit():
    base, tuned = weights(1), weights(2)
    for alpha, end in ((0, base), (1, tuned), (0.0, base), (1.0, tuned)):
        found = interpolate(base, tuned, alpha)
        assert list(found) == list(end)
        assert all(torch.equal(found[name], end[name]) and found[name].dtype == end[name].dtype for name in end)


def test_between_them_lies_the_weighted_mean_and_whole_numbers_are_the_tuned_ones():
    base, tuned = weights(1), weights(2)
    found = interpolate(base, tuned, 0.3)
    torch.testing.assert_close(found["w"].double(), 0.7 * base["w"].double() + 0.3 * tuned["w"].double(), atol=1e-6, rtol=0)
    assert found["logit_scale"].exp().item() == pytest.approx(10**0.7 * 20**0.3, rel=1e-6)  # the geometric mean
    assert found["num_batches_tracked"] == 2


def test_a_soup_is_the_mean_and_of_one_model_the_model():
    models = [weights(1), weights(2), weights(3)]
    torch.testing.assert_close(soup(models)["w"], torch.from_numpy(np.mean([model["w"].numpy() for model in models], axis=0)))
    alone = soup(models[:1])
    assert all(torch.equal(alone[name], models[0][name]) for name in alone)
    assert soup(models)["num_batches_tracked"] == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"w": torch.zeros(7, 4)}, r"w is \(7, 5\) float32 in the first and \(7, 4\) float32 in the second"),
    ({"more": torch.zeros(1)}, r"more is nothing in the first and \(1,\) float32 in the second"),
    ({"half": torch.zeros(3)}, r"half is \(3,\) float16 in the first and \(3,\) float32"),
])
def test_weights_that_do_not_fit_are_refused_with_the_first_name_that_differs(change, message):
    for mix in (partial(interpolate, alpha=0.5), lambda base, tuned: soup([base, tuned])):
        with pytest.raises(ValueError, match=message):
            mix(weights(1), {**weights(2), **change})


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_outside_of_0_to_1_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; give a number from 0"):
        interpolate(weights(1), weights(2), alpha)
    with pytest.raises(ValueError, match="a soup needs at least one model"):
        soup([])


def test_models_with_another_activation_are_refused_though_their_weights_fit(tiny_model):
    other = build_model(config={**TINY, "quick_gelu": True})
    with pytest.raises(ValueError, match=r"model_cfg.quick_gelu is None in the first and True in the second"):
        interpolated_model(tiny_model, other, 0.5)


def point(target: float, against: float = 0.0) -> Point:
    def results(value: float) -> tuple[Result, ...]:
        return (Result("t", "test", "zeroshot_classification", "acc1", value, 10, 0.0, 1.0, 2, "plain", 0),)

    return Point(results(target), results(against))


def test_the_knee_is_where_what_is_won_and_what_is_kept_add_up_to_most():
    assert alphas(5) == [0, 0.25, 0.5, 0.75, 1]
    assert knee({0.0: point(0.2, 0.8), 0.5: point(0.6, 0.75), 1.0: point(0.65, 0.6)}) == 0.5
    assert knee({0.0: point(0.2, 0.8), 1.0: point(0.3, 0.7)}) == 1.0  # a draw goes to the fine-tuned
    assert knee({0.0: point(0.2, 0.8), 0.5: point(0.1 + 0.2, 0.7), 1.0: point(0.3, 0.7)}) == 1.0  # rounding is no difference


def test_the_greedy_soup_takes_each_model_that_makes_it_no_worse(tiny_model):
    models, values = [], {}
    for shift in (0.0, 1.0, 4.0):
        model = build_model(config=TINY)
        model.load_state_dict(tiny_model.state_dict())
        with torch.no_grad():
            model.towers.logit_scale.fill_(shift)
        models.append(model)
    values = {0.0: 0.5, 1.0: 0.6, 4.0: 0.4, 0.5: 0.7, 5 / 3: 0.65}  # accuracy by the soup's logit_scale
    chosen, best = greedy_soup(models, [point(values[shift]) for shift in (0.0, 1.0, 4.0)],
                               lambda model: point(values[min(values, key=lambda v: abs(v - model.towers.logit_scale.item()))]))
    assert (chosen, best.target_mean) == ([1, 0], 0.7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two models and a set of coloured squares with their names."""
    root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    for seed, name in ((0, "before"), (1, "after")):
        torch.manual_seed(seed)
        save_model_folder(build_model(config=TINY), root / name)
    for name, colour in COLOURS.items():
        (root / "squares" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(np.array(colour) + rng.integers(-60, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "squares" / name / f"{number}.png")
    return root


def run(folders: Path, *arguments: str) -> None:
    run_command(command_settings("interpolate", InterpolateConfig, f"task={folders / 'squares'}", "device=cpu",
                                 f"cache_dir={folders / 'cache'}", *arguments))


def test_the_sweep_measures_the_line_draws_it_and_writes_the_model_of_the_knee(folders, tmp_path, capsys):
    out = tmp_path / "between"
    run(folders, f"base={folders / 'before'}", f"model={folders / 'after'}", f"against={folders / 'squares'}", "points=3",
        f"out={out}")
    rows = [row for row in csv.DictReader((out / "points.csv").read_text().splitlines()) if row["role"] == "target"]
    task, ends = load_task(str(folders / "squares")), [load_model(folders / name) for name in ("before", "after")]
    for row, model in zip((rows[0], rows[-1]), ends, strict=True):
        wanted = measure(model, task, thorough=False).results[0]
        assert [float(row[name]) for name in ("value", "ci_low", "ci_high")] == [wanted.value, wanted.ci_low, wanted.ci_high]
    record = json.loads((out / "interpolation.json").read_text())
    best = max(rows, key=lambda row: (float(row["value"]), float(row["alpha"])))
    assert record["alpha"] == float(best["alpha"])
    written = load_model(out / "model").towers.state_dict()
    wanted = interpolate(ends[0].towers.state_dict(), ends[1].towers.state_dict(), record["alpha"])
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    with Image.open(out / "curve.png") as picture:
        assert picture.width > 500
    assert f"chosen    alpha {record['alpha']:g}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists; give another folder, or overwrite=true"):
        run(folders, f"base={folders / 'before'}", f"model={folders / 'after'}", f"out={out}")


def test_a_soup_of_several_models_is_written(folders, tmp_path, capsys):
    run(folders, f"models=[{folders / 'before'},{folders / 'after'}]", "soup=uniform", f"out={tmp_path / 'soup'}")
    written = load_model(tmp_path / "soup" / "model").towers.state_dict()
    wanted = soup([load_model(folders / name).towers.state_dict() for name in ("before", "after")])
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert "greedy soup" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "given are no models; give base=... and model=..."),
    (("base=a",), "given are base; give base"),
    (("base=a", "model=b", "models=[c,d]"), "given are base and model and models"),
    (("models=[c]",), "a soup needs at least 2"),
    (("base=a", "model=b", "points=2"), "points is 2; it must be at least 3"),
    (("base=a", "model=b", "task=[]"), "task is empty"),
])
def test_settings_that_do_not_go_together_are_answered_in_one_line(folders, arguments, message):
    with pytest.raises(SettingsError, match=message):
        command_settings("interpolate", InterpolateConfig, *arguments)


def test_an_export_between_two_models_is_the_model_between_them(folders, tmp_path):
    arguments = (f"model={folders / 'after'}", f"base={folders / 'before'}", "format=open_clip")
    export(command_settings("export", ExportConfig, *arguments, "interpolate=0.25", f"out={tmp_path / 'quarter'}"))
    written = load_model(tmp_path / "quarter").towers.state_dict()
    before, after = (load_model(folders / name).towers.state_dict() for name in ("before", "after"))
    wanted = interpolate(before, after, 0.25)
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    record = json.loads((tmp_path / "quarter" / "clipkit_export.json").read_text())
    assert record["interpolated"] == {"base": "before", "alpha": 0.25}
    with pytest.raises(SettingsError, match=r"interpolate is 1.5; it must be from 0 to 1"):
        command_settings("export", ExportConfig, *arguments, "interpolate=1.5")
    with pytest.raises(SettingsError, match="give both, as in base=ViT-B-32"):
        command_settings("export", ExportConfig, *arguments)
