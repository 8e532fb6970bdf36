"""`clipkit diffusion train` as a person uses it: each conditioning, resumed runs, cached latents; bad input in one line."""

import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from clipkit.commands.diffusion.train import IMPLIED, train_diffusion
from clipkit.config.diffusion.train import DiffusionTrainConfig, ProcessConfig
from clipkit.diffusion.autoencoder import load_autoencoder, make_autoencoder, save_autoencoder, to_pixel_values
from clipkit.diffusion.conditioning import MapConditioning, load_text_conditioning, mix_conditions
from clipkit.diffusion.draws import Draws, draw_rows
from clipkit.diffusion.generate import Sampling, generate
from clipkit.diffusion.latent_cache import cached_latents
from clipkit.diffusion.noise_schedule import make_schedule
from clipkit.diffusion.objective import Latents, diffusion_loss
from clipkit.diffusion.pipeline_folder import load_pipeline
from clipkit.diffusion.sheets import still_examples
from clipkit.interop.export import export_text_encoder
from clipkit.training.stop import EXIT_STOPPED
from tests.conftest import command_settings, write_tar

# diffusers hands tensors to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

STEPS, BATCH = 6, 8
SMALL = {"name": "small", "model": "tiny", "train.global_batch_size": BATCH, "train.samples": STEPS * BATCH,
         "train.epochs": "null", "train.precision": "fp32", "train.ema_decay": 0.9, "data.workers": 0, "data.lanes": 4,
         "log.every": 1, "log.to": "[]", "device": "cpu", "sheets": "first", "sheets.num_samples": 0, "autoencoder": "vae",
         "conditioning.source": "text"}
TINY_CONFIG = {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
               "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with vae/ (32 px to 16 x 16 latents) and text/ (an exported text encoder), random weights."""
    from clipkit.model.build import build_model
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_autoencoder(make_autoencoder(TINY_CONFIG, image_size=32), folder / "vae", scaling_factor=0.7)
    export_text_encoder(build_model(config=TINY), folder / "text")
    return folder


@pytest.fixture(autouse=True)
def in_folder_with_networks(networks, tmp_path, monkeypatch):
    for name in ("vae", "text"):
        (tmp_path / name).symlink_to(networks / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))


def config_of(shards: str, **more) -> DiffusionTrainConfig:
    """The settings of a small run; `process__weight="min_snr"` stands for process.weight=min_snr."""
    chosen = {**SMALL, "data.train": shards, **{key.replace("__", "."): value for key, value in more.items()}}
    arguments = [f"{key}={value}" for key, value in chosen.items()]
    return command_settings("diffusion/train", DiffusionTrainConfig, *arguments, implied=IMPLIED)


def run(shards: str, **more) -> int | None:
    return train_diffusion(config_of(shards, **more))


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def weights(name: str) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint; copies, as safetensors gives the file itself, mapped."""
    checkpoints = Path("runs", name, "checkpoints")
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    return {f"{file.stem}/{key}": tensor.clone() for file in newest.glob("*.safetensors")
            for key, tensor in load_file(file).items()}


def test_a_run_leaves_a_pipeline_that_diffusers_samples_alike(shards, capsys):
    from diffusers import StableDiffusionPipeline

    assert run(shards, sheets__num_samples=3, sheets__steps=2, sheets__every=3) is None
    run_dir = Path("runs/small")
    assert {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "checkpoints", "pipeline", "sheets"} <= {
        path.name for path in run_dir.iterdir()}
    assert [path.name for path in sorted((run_dir / "sheets").iterdir())] == ["step-00000003.png", "step-00000006.png"]
    steps = lines("small")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)) and all(line["loss"] > 0 for line in steps)
    shown = capsys.readouterr().out
    for word in ("latents   1 of 4 shards", "model ", "process   scaled_linear, predicts v", "schedule ", "pipeline ", "next "):
        assert word in shown
    assert not list(run_dir.rglob("*.bin")) + list(run_dir.rglob("*.pt"))  # no pickle anywhere

    texts, seeds = ["a red square, 3 of shard 0", "a blue square"], [5, 6]
    theirs = StableDiffusionPipeline.from_pretrained(run_dir / "pipeline", local_files_only=True, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(texts, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images
    pipeline = load_pipeline(run_dir)
    found = generate(pipeline, pipeline.conditioning.from_texts(texts), seeds, Sampling(steps=4, guidance_scale=3.0))
    assert torch.allclose(found, wanted, atol=1e-5)
    averaged = {name.removeprefix("ema/"): tensor for name, tensor in weights("small").items() if name.startswith("ema/")}
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in pipeline.denoise.unet.state_dict().items())

    before = lines("small")
    assert run(shards, sheets__num_samples=0) is None
    assert "finished" in capsys.readouterr().out and lines("small") == before


def test_a_flow_model_is_saved_with_the_solver_that_its_pipeline_can_run(shards):
    from diffusers import StableDiffusionPipeline

    assert run(shards, process="flow", train__samples=BATCH) is None
    theirs = StableDiffusionPipeline.from_pretrained("runs/small/pipeline", local_files_only=True, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.scheduler.config.use_flow_sigmas and theirs.scheduler.config.prediction_type == "flow_prediction"
    image = theirs("a red square", num_inference_steps=3, output_type="pt").images
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()


@pytest.mark.parametrize(("kind", "more"), [
    ("image", {"conditioning__source": "clip"}),
    ("low_resolution", {"model": "tiny_map", "conditioning__source": "null"}),
    ("semantic_map", {"model": "tiny_map", "conditioning__source": "null"}),
])
def test_pictures_and_maps_condition_too(kind, more, shards, tiny_model):
    from clipkit.model.folder import save_model_folder

    save_model_folder(tiny_model, Path("clip/model"))
    assert run(shards, conditioning=kind, train__samples=2 * BATCH, sheets__num_samples=2, sheets__steps=2, **more) is None
    pipeline = load_pipeline("runs/small")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    found = generate(pipeline, pipeline.conditioning(None, images), [0, 1], Sampling(steps=2))
    assert found.shape == (2, 3, 32, 32) and found.isfinite().all()
    assert not Path("runs/small/pipeline/model_index.json").exists()  # no StableDiffusionPipeline: nobody shall take it for one
    assert Path("runs/small/sheets/step-00000002.png").is_file()


def test_the_pixels_themselves_can_be_made(shards):
    assert run(shards, autoencoder="none", train__samples=BATCH) is None
    pipeline = load_pipeline("runs/small")
    assert pipeline.autoencoder is None and pipeline.latent_shape == (3, 32, 32)
    assert generate(pipeline, pipeline.conditioning.from_texts(["x"]), [0], Sampling(steps=2)).shape == (1, 3, 32, 32)


def test_a_stopped_run_resumes_to_the_same_bits_on_other_workers(shards, monkeypatch):
    from clipkit.training.due import Timetable

    assert run(shards, name="whole") is None
    after = Timetable.after
    monkeypatch.setattr(Timetable, "after", lambda self, done, *, stop: after(self, done, stop=done == 3))
    assert run(shards, name="parts") == EXIT_STOPPED
    assert lines("parts")[-1]["step"] == 3 and load_pipeline("runs/parts").facts["step"] == 3  # can be sampled from meanwhile
    monkeypatch.setattr(Timetable, "after", after)
    assert run(shards, name="parts", data__workers=2) is None
    found, wanted = weights("parts"), weights("whole")
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
    assert [line["loss"] for line in lines("parts")] == [line["loss"] for line in lines("whole")]


def one_rank(rank: int, port: int, shards: str, options: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert run(shards, name="two", **options) is None


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"conditioning": "semantic_map", "model": "tiny_map", "conditioning__source": "null"}],
                         ids=["text", "map"])
def test_two_processes_train_as_one(options, shards, free_port):
    """With plain gradient descent: Adam would blow the rounding of gradients near 0 up to steps of full size."""
    options |= {"optim__name": "sgd", "optim__lr": 0.05}
    assert run(shards, name="one", **options) is None
    shutil.rmtree("cache", ignore_errors=True)  # each of the two encodes its share
    mp.spawn(one_rank, args=(free_port, shards, options), nprocs=2)
    one, two = weights("one"), weights("two")
    learned = [name for name in one if name.startswith(("model/", "ema/"))]
    assert learned and all(torch.allclose(two[name], one[name], atol=1e-5) for name in learned)
    assert [line["loss"] for line in lines("two")] == pytest.approx([line["loss"] for line in lines("one")], rel=1e-5)


def test_the_loss_is_the_weighted_error_of_each_row_in_float64():
    generator = torch.Generator().manual_seed(0)
    mean, noise, latent = (torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    std, condition = torch.full_like(mean, 0.3), torch.randn(5, 3, 6, generator=generator, dtype=torch.float64)
    schedule = make_schedule("scaled_linear")
    draws = Draws(latent, noise, torch.tensor([0, 10, 400, 800, 999]), torch.zeros(5, dtype=torch.bool))
    process = ProcessConfig(schedule="scaled_linear", prediction="v", num_timesteps=1000, zero_terminal_snr=True,
                            weight="min_snr")

    def network(x_t, timesteps, condition):
        return x_t.sin() * (timesteps[:, None, None, None] / 500) + condition.mean(dim=(1, 2))[:, None, None, None]

    found = diffusion_loss(network, Latents(mean, std), condition, draws, schedule, scale=2.0, process=process)
    errors = []
    for row, level in enumerate(draws.level.tolist()):
        alpha, sigma = schedule.alpha[level], schedule.sigma[level]
        x0 = 2 * (mean[row] + 0.3 * latent[row])
        x_t = alpha * x0 + sigma * noise[row]
        output = x_t.sin() * (level / 500) + condition[row].mean()
        ratio = (alpha / sigma) ** 2
        weight = ratio.clamp(0.05, 5) / (ratio + 1)  # of v: min(snr, 5) / (snr + 1), with the floor of min_snr_weight
        errors.append((weight * (output - (alpha * noise[row] - sigma * x0)) ** 2).mean())
    assert found.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)  # the error itself is taken in fp32


def test_the_draws_of_a_row_do_not_depend_on_the_number_of_processes():
    whole = draw_rows((8, 2, 3, 3), num_levels=1000, drop=0.5, seed=1, step=7)
    parts = [draw_rows((2, 2, 3, 3), num_levels=1000, drop=0.5, seed=1, step=7, rank=rank, world_size=4) for rank in range(4)]
    assert all(torch.equal(torch.cat(rows), all_rows) for rows, all_rows in zip(zip(*parts, strict=True), whole, strict=True))
    other = draw_rows((8, 2, 3, 3), num_levels=1000, drop=0.5, seed=1, step=8)
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.level, other.level)


def test_levels_are_even_over_a_batch_and_uniform_over_steps():
    levels = torch.stack([draw_rows((4, 1, 1, 1), num_levels=8, drop=0.25, seed=0, step=step).level for step in range(500)])
    assert (levels.sort(dim=1).values.diff(dim=1) == 2).float().mean() == 1  # every second level of the 8, in each step
    share = torch.bincount(levels[:, 0], minlength=8) / 500  # a row's own levels, over steps
    assert (share - 1 / 8).abs().max() < 0.05
    dropped = torch.cat([draw_rows((4, 1, 1, 1), num_levels=8, drop=0.25, seed=0, step=step).dropped for step in range(500)])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_dropped_rows_get_the_empty_condition():
    condition, empty = torch.ones(3, 2, 4), torch.zeros(2, 4)
    mixed = mix_conditions(condition, empty, torch.tensor([False, True, False]))
    assert mixed.sum(dim=(1, 2)).tolist() == [8, 0, 8]
    maps = mix_conditions(torch.ones(2, 3, 4, 4), torch.zeros(3, 4, 4), torch.tensor([True, False]))
    assert maps.sum(dim=(1, 2, 3)).tolist() == [0, 48]


def test_a_small_picture_reaches_the_network_whole_and_a_map_names_its_colours():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    finer = MapConditioning("low_resolution", side=8, small=16)
    given = finer.condition_of(images)
    assert finer.width == 12 and torch.allclose(given[0, :, 0, 0], images[0, :, :2, :2].mean(dim=(1, 2)))
    assert torch.equal(torch.pixel_shuffle(finer(None, images), 2), given)
    coarser = MapConditioning("low_resolution", side=16, small=8)
    assert coarser.width == 3 and coarser(None, images).shape == (2, 3, 16, 16)
    map_of = MapConditioning("semantic_map", side=2)
    colours = torch.tensor([[-1., 1, 1], [1, -1, 1]])[:, :, None, None].expand(2, 3, 2, 2)  # cyan and magenta
    assert map_of.from_condition(colours).argmax(dim=1)[:, 0, 0].tolist() == [3, 5]
    with pytest.raises(ValueError, match="neither is a multiple of the other"):
        MapConditioning("low_resolution", side=16, small=12)


def shards_of(config: DiffusionTrainConfig) -> list[str]:
    from clipkit.data.sources import find_sources

    return find_sources(config.data.train, weighted=False)[0]


def read_cache(places: list[str], config: DiffusionTrainConfig) -> list:
    import random

    from clipkit.data.tars import read_numbered
    from clipkit.diffusion.latent_cache import LatentExamples

    make = LatentExamples(data=config.data, channels=4, side=16)
    return [make(raw, random.Random(1)) for place in places for _, raw in read_numbered(place, with_npy=True)]


def test_cached_latents_are_those_of_the_pictures_with_their_captions(shards):
    config = config_of(shards)
    autoencoder = load_autoencoder("vae")
    places = cached_latents(shards_of(config), autoencoder, source="vae", data=config.data, image_size=32)
    found = read_cache(places, config)
    pictures = list(still_examples(shards_of(config), data=config.data, image_size=32))
    assert [one.caption for one in found] == [one.caption for one in pictures] and len(found) == 128
    with torch.no_grad():
        wanted = autoencoder.encode(to_pixel_values(torch.stack([one.image for one in pictures]))).latent_dist
    moments = torch.stack([one.image for one in found])
    assert torch.allclose(moments, torch.cat([wanted.mean, wanted.std], dim=1), atol=1e-5)


def test_a_flipped_picture_has_latents_of_its_own(shards):
    config = config_of(shards, data__augment__flip=1)
    autoencoder = load_autoencoder("vae")
    places = cached_latents(shards_of(config)[:1], autoencoder, source="vae", data=config.data, image_size=32)
    picture = next(still_examples(shards_of(config), data=config.data, image_size=32)).image
    with torch.no_grad():
        wanted = autoencoder.encode(to_pixel_values(picture.flip(2)[None])).latent_dist.mean[0]
    assert torch.allclose(read_cache(places, config)[0].image[:4], wanted, atol=1e-5)


def test_only_a_damaged_shard_of_the_cache_is_encoded_again(shards, monkeypatch):
    config, autoencoder = config_of(shards), load_autoencoder("vae")

    def cached() -> list[str]:
        return cached_latents(shards_of(config), autoencoder, source="vae", data=config.data, image_size=32)

    places = [Path(place) for place in cached()]
    before = [place.read_bytes() for place in places]
    times = [place.stat().st_mtime_ns for place in places]
    places[1].write_bytes(before[1][:1000])
    places[2].with_suffix(".json").unlink()  # as a process that was killed leaves it
    cached()
    assert [place.read_bytes() for place in places] == before
    assert [place.stat().st_mtime_ns == time for place, time in zip(places, times, strict=True)] == [True, False, False, True]
    assert not [path for path in places[0].parent.iterdir() if path.name.startswith(".")]
    changed = replace(config.data, augment=replace(config.data.augment, flip=0.5))
    other = cached_latents(shards_of(config)[:1], autoencoder, source="vae", data=changed, image_size=32)
    assert Path(other[0]).parent != places[0].parent  # nothing is taken for what it is not


def test_latents_that_are_none_are_bad_samples(shards):
    config = config_of(shards)
    place = write_tar(Path("bad.tar"), [("a.npy", b"no array"), ("a.txt", b"x"), ("b.txt", b"x")])
    found = read_cache([place], config)
    assert [one.cause for one in found] == ["bad latents", "bad latents"] and "remove the cache's folder" in found[0].detail


def test_bad_pictures_are_counted_and_too_many_stop_the_run(shards, capsys):
    with tarfile.open(shards_of(config_of(shards))[0]) as good:
        members = [(member.name, good.extractfile(member).read()) for member in good]
    few = write_tar(Path("few.tar"), [*members, ("zz.png", b"no picture"), ("zz.txt", b"x")])
    assert run(few, data__lanes=1, train__samples=BATCH) is None
    assert "without 1 bad pictures: 1 not an image" in capsys.readouterr().out
    many = write_tar(Path("many.tar"), [*members[:3], *((f"z{n}.png", b"no picture") for n in range(9))])
    with pytest.raises(ValueError, match=r"9 of 10 samples of many\.tar have no latents \(9 .*\), allowed are 5%"):
        run(many, data__lanes=1, name="other", train__global_batch_size=2)


BAD_SETTINGS = {
    "no autoencoder there": ({"autoencoder": "runs/none"}, "runs/none holds no autoencoder"),
    "no text encoder there": ({"conditioning__source": "nowhere"}, "nowhere holds no text encoder; write it with: clipkit"),
    "no source": ({"conditioning__source": "null"}, "conditioning.source is empty"),
    "a size between those that fit": ({"model__image_size": 36}, "image_size is 36.*multiple of 8; the nearest are 32 and 40"),
    "a size that the U-Net cannot halve": (
        {"model__image_size": 40, "model__config__block_out_channels": "[8,8,8,8]",
         "model__config__norm_num_groups": 8}, "20 cells a side, and a U-Net of 4 levels halves them 3 times; .* 16 and 24"),
    "an unknown argument": ({"model__config__in_channels": 4}, "'in_channels', which diffusers' UNet2DConditionModel does not"),
    "blocks that do not fit": ({"model__config__down_block_types": "[DownBlock2D]"}, "does not make a U-Net"),
    "a prediction that does not fit": ({"process__prediction": "flow"}, "the prediction is 'flow' but the noise schedule is"),
    "noise under a schedule without signal": ({"process__prediction": "noise"}, "choose the prediction 'v'"),
    "pictures that are augmented anew": ({"data__augment__rotate_degrees": 5}, "rotate_degrees change a picture each time"),
    "prompts for pictures": ({"conditioning": "semantic_map", "model": "tiny_map", "sheets__prompts": "[a]"}, "are texts, and"),
    "an unknown conditioning": ({"conditioning": "sound"}, "no such choice; choose one of image"),
    "a factor that does not divide": (
        {"conditioning": "low_resolution", "model": "tiny_map", "conditioning__factor": 5},
        "factor is 5, which does not divide"),
    "too few pictures": ({"train__global_batch_size": 512}, "128 samples, fewer than one batch"),
    "no name": ({"name": "null"}, "name is required"),
    "an empty name": ({"name": ""}, "name is empty"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_one_line_and_leave_nothing(case, shards):
    given, message = BAD_SETTINGS[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(shards, **given)
    assert "\n" not in str(error.value)
    assert not list(Path("runs").glob("*/metrics.jsonl"))


def test_a_loss_that_is_never_finite_stops_the_run(shards):
    with pytest.raises(ValueError, match=r"not finite in \d+ steps in a row.*lower optim.lr"):
        run(shards, optim__lr="1e30", optim__max_grad_norm="null", train__max_skipped_steps=3, schedule__warmup=0)


def test_a_tokenizer_of_another_encoder_is_refused(networks):
    shutil.copytree(networks / "text", "mixed")
    config = json.loads(Path("mixed/tokenizer_config.json").read_text())
    Path("mixed/tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    with pytest.raises(ValueError, match=r"context length 77 in the tokenizer, 16 in config\.json; write") as error:
        load_text_conditioning("mixed")
    assert "\n" not in str(error.value)


def test_an_export_of_other_weights_than_the_runs_is_refused(networks, tiny_model):
    from clipkit.model.folder import save_model_folder

    save_model_folder(tiny_model, Path("runs/clip/model"))
    Path("runs/clip/config.yaml").write_text("name: clip\n")
    with pytest.raises(FileNotFoundError, match="holds no text encoder; write it with: clipkit export model=runs/clip"):
        load_text_conditioning("runs/clip")
    shutil.copytree(networks / "text", "runs/clip/export/text_encoder")
    with pytest.raises(ValueError, match=r"exported from other weights than runs/clip has .*model=runs/clip overwrite"):
        load_text_conditioning("runs/clip")


@pytest.mark.parametrize("chosen", ["model=emoji", "model=stable_diffusion", "process=flow", "process=noise", "data=emoji",
                                    "data.train=x.tar", "sheets=emoji", "conditioning=image", "optim=adamw"])
def test_each_choice_of_a_group_gives_every_value(chosen):
    """parse() refuses a missing value and a strange one."""
    config = command_settings("diffusion/train", DiffusionTrainConfig, chosen, "name=x", "sheets.prompts=null", implied=IMPLIED)
    assert config.process.num_timesteps == 1000
