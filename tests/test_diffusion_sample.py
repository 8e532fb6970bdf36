"""`clipkit diffusion sample` as a person uses it: the pictures, what they hang on, and each bad input in one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.__main__ import main
from clipkit.commands.diffusion import sample as command
from clipkit.config.diffusion.sample import SampleConfig
from clipkit.config.schema import SettingsError
from clipkit.diffusion import sample_run
from clipkit.diffusion.conditioning import ImageConditioning, MapConditioning
from clipkit.diffusion.generate import Sampling, generate
from clipkit.diffusion.pipeline_folder import load_pipeline
from clipkit.diffusion.prompt_files import read_prompts
from clipkit.diffusion.sample_conditions import MAX_KEPT, Conditions, prompt_sources
from clipkit.diffusion.sample_files import read_sample
from clipkit.model.build import build_model
from clipkit.training.atomic_files import write_bytes_atomically
from tests.conftest import TINY, command_settings
from tests.tiny_pipelines import IMAGE_SIZE, make_pipeline

QUICK = {"steps": 2, "device": "cpu", "prompts": "[a red heart,a cat,two dogs]"}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(folder: Path, out: str | None = "out", **more) -> Path:
    """Sample; returns the folder of the pictures."""
    chosen = {**QUICK, "model": folder, **({"out": out} if out else {}), **more}
    arguments = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    command.sample(command_settings("diffusion/sample", SampleConfig, *arguments))
    return Path(out) if out else next(Path().rglob("00000.png")).parent


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("[0-9]*.png"))}


def greatest_difference(first: str, second: str) -> int:
    """Of the pixels of two folders with the same pictures, in levels of 255."""
    pixels = [[np.asarray(Image.open(Path(out) / name)).astype(int) for name in files(Path(out))] for out in (first, second)]
    return max(np.abs(one - other).max() for one, other in zip(*pixels, strict=True))


def facts(path: Path) -> dict[str, str]:
    found = read_sample(path)
    assert found
    return found[1]


def test_samples_hang_on_their_number_alone(folders, capsys):
    """11 pictures in batches of 5 and of 11 write the same bytes; nothing is dropped."""
    at_once = files(run(folders["v"], "at_once", n_samples=11, batch_size=11))
    assert list(at_once) == [f"{number:05d}.png" for number in range(11)]
    in_parts = files(run(folders["v"], "in_parts", n_samples=11, batch_size=5))
    assert in_parts == at_once
    shown = capsys.readouterr().out
    assert "clipkit diffusion sample: " in shown and "11 of 3 prompts" in shown and "ddim in 2 steps" in shown
    pictures = [read_sample(Path("at_once") / name) for name in at_once]
    assert all(picture.size == (IMAGE_SIZE, IMAGE_SIZE) for picture, _ in pictures)
    assert [told["prompt"] for _, told in pictures[:4]] == ["a red heart", "a cat", "two dogs", "a red heart"]
    assert [told["seed"] for _, told in pictures] == [str(number) for number in range(11)]
    assert len({content for content in at_once.values()}) == 11
    with Image.open("at_once/sheet.png") as sheet:
        assert sheet.width > 8 * 128


def test_a_run_killed_halfway_goes_on_to_the_same_pictures(folders, monkeypatch, capsys):
    whole = files(run(folders["v"], "whole", n_samples=6, batch_size=2))

    def dies(path, content):
        if path.name == "00003.png":
            raise KeyboardInterrupt
        write_bytes_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("clipkit.diffusion.sample_files.write_bytes_atomically", dies)
        with pytest.raises(KeyboardInterrupt):
            run(folders["v"], "parts", n_samples=6, batch_size=2)
    left = files(Path("parts"))
    assert list(left) == ["00000.png", "00001.png", "00002.png"]
    Path("parts/00001.png").write_bytes(left["00001.png"][:100])  # a disk that was full
    capsys.readouterr()
    assert files(run(folders["v"], "parts", n_samples=6, batch_size=5)) == whole
    assert "6 pictures in parts (2 were there; 1 damaged, made again)" in capsys.readouterr().out
    assert list(files(run(folders["v"], "parts", n_samples=8))) == [*whole, "00006.png", "00007.png"]  # more of the same
    assert {name: files(Path("parts"))[name] for name in whole} == whole


def test_a_sample_has_the_same_neighbours_on_the_cpu_and_fills_the_batch_elsewhere():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert sample_run.next_batch([0, 1, 2], 4, cpu) == sample_run.next_batch([3], 4, cpu) == [0, 1, 2, 3]
    assert sample_run.next_batch([6, 9], 4, cpu) == [4, 5, 6, 7]
    assert sample_run.next_batch([6, 9, 10], 2, gpu) == [6, 9] and sample_run.next_batch([6], 4, gpu) == [6]


def test_a_sample_is_that_of_generate_and_says_how_it_was_made(folders):
    out = run(folders["v"], None, prompts="a red heart", n_samples=2, seed=7, steps=3, guidance_scale=2, guidance_rescale=0.5,
              scheduler="dpmpp_2m")
    assert out.parent.name == "samples" and out.name.startswith("a-red-heart-")
    pipeline = load_pipeline(folders["v"])
    condition = pipeline.conditioning.from_texts(["a red heart"] * 2)
    wanted = generate(pipeline, condition, [7, 8], Sampling("dpmpp_2m", 3, 2.0, 0.5))
    picture, told = read_sample(out / "00001.png")
    values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    assert (values - wanted[1]).abs().max() <= 0.5 / 255 + 1e-5
    assert told.pop("Software").startswith("clipkit ") and len(told.pop("model_sha256")) == 64
    assert told == {"prompt": "a red heart", "seed": "8", "scheduler": "dpmpp_2m", "steps": "3", "guidance_scale": "2.0",
                    "guidance_rescale": "0.5"}


def test_low_memory_changes_no_picture_visibly_and_runs_its_parts_one_by_one(folders, monkeypatch):
    def pixels(out):
        return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("[0-9]*.png"))])

    normal, low = (pixels(run(folders["v"], memory, n_samples=3, memory=memory)) for memory in ("normal", "low"))
    assert np.abs(normal - low).max() <= 1  # sliced attention sums in another order
    module, other = torch.nn.Linear(2, 2), torch.device("meta")
    with pytest.raises(NotImplementedError), sample_run.on_device(module, other):  # meta: nothing comes back from there
        assert module.weight.device.type == "meta"
    with sample_run.on_device(torch.nn.Linear(2, 2), torch.device("cpu")), sample_run.on_device(None, other):
        pass


def test_too_little_memory_halves_the_batch_and_says_so(folders, monkeypatch, capsys):
    run(folders["v"], "wanted", n_samples=7, batch_size=7)
    sizes, errors = [], iter([RuntimeError("CUDA error: out of memory"), MemoryError()])
    walk = sample_run.walk

    def tight(pipeline, condition, seeds, how):
        sizes.append(len(seeds))
        if len(seeds) > 1:
            raise next(errors)
        return walk(pipeline, condition, seeds, how)

    monkeypatch.setattr(sample_run, "walk", tight)
    assert len(files(run(folders["v"], "tight", n_samples=7, batch_size=7))) == 7
    assert greatest_difference("wanted", "tight") <= 1  # sums of other shapes round otherwise in their last bit
    assert sizes == [4, 2, *[1] * 7]
    assert "not enough memory for 4 pictures at once; going on with batch_size=2" in capsys.readouterr().out


def test_one_picture_without_memory_and_other_errors_end_the_run(folders, monkeypatch):
    def fails(error):
        def walk(*arguments):
            raise error
        return walk

    assert sample_run.is_out_of_memory(torch.OutOfMemoryError("no room"))
    monkeypatch.setattr(sample_run, "walk", fails(MemoryError()))
    with pytest.raises(ValueError, match="cpu has not enough memory for one picture at a time; give memory=low"):
        run(folders["v"])
    monkeypatch.setattr(sample_run, "walk", fails(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(folders["v"])
    monkeypatch.setattr(sample_run, "walk", lambda *arguments: torch.full((4, 4, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="sample 0 is not finite"):
        run(folders["v"])


def test_texts_are_encoded_once_in_the_same_blocks_whatever_the_batch(folders, monkeypatch):
    pipeline, asked = load_pipeline(folders["v"]), []
    from_texts = pipeline.conditioning.from_texts
    monkeypatch.setattr(pipeline.conditioning, "from_texts", lambda texts: asked.append(texts) or from_texts(texts))
    prompts = [f"text {number}" for number in range(20)]
    conditions = Conditions(pipeline, prompt_sources(prompts))
    found = torch.cat([conditions(range(start, min(start + 7, 50))) for start in range(0, 50, 7)])
    torch.testing.assert_close(found, from_texts([prompts[number % 20] for number in range(50)]), atol=1e-6, rtol=0)
    assert asked == [prompts[:16], prompts[16:]]
    monkeypatch.setattr(pipeline.conditioning, "from_texts", lambda texts: torch.zeros(len(texts), 1, 1))
    many = Conditions(pipeline, prompt_sources(["text"] * 3 * MAX_KEPT))
    for start in range(0, 3 * MAX_KEPT, 16):
        many(range(start, start + 16))
    assert len(many._kept) * 16 <= MAX_KEPT  # memory does not grow with the prompts


@pytest.mark.parametrize("kind", ["image", "low_resolution", "semantic_map"])
def test_models_of_pictures_start_from_pictures_of_any_size(kind, tmp_path, capsys):
    torch.manual_seed(0)
    conditioning = ImageConditioning(build_model(config=TINY).eval()) if kind == "image" else \
        MapConditioning(kind, side=IMAGE_SIZE // 2, small=IMAGE_SIZE // 4)
    folder = make_pipeline(tmp_path / "pipeline", conditioning)
    (tmp_path / "given").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "given" / "a.png")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "given" / "b.png")
    out = run(folder, prompts=None, images="given", n_samples=5, batch_size=3)
    assert len(files(out)) == 5 and "5 of 2 pictures" in capsys.readouterr().out
    assert facts(out / "00003.png")["image"] == "b.png" and len(facts(out / "00003.png")["image_sha256"]) == 64
    pipeline = load_pipeline(folder)
    blue = torch.tensor([-1.0, -1, 1])[None, :, None, None].expand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    wanted = generate(pipeline, pipeline.conditioning(None, blue), [3], Sampling(steps=2))
    values = np.asarray(Image.open(out / "00003.png")) / 255
    assert np.abs(values - wanted[0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-5
    with pytest.raises(ValueError, match=f"makes pictures from pictures \\({kind}\\); give images=<folder>"):
        run(folder)
    (tmp_path / "given" / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"images has c\.png, which cannot be used \(.*; take it away"):
        run(folder, prompts=None, images="given", out="more")


def test_prompts_are_texts_and_lines_of_files(tmp_path):
    Path("a.txt").write_text("a cat\n\n  two dogs \n", encoding="utf-8-sig")
    Path("b.csv").write_text('seed,Prompt\n1,"a, b"\n2,c\n', encoding="utf-8")
    Path("c.tsv").write_text("caption\tn\nred\t1\n", encoding="utf-8")
    assert read_prompts(["an owl.", "a.txt", "b.csv", "c.tsv"]) == ["an owl.", "a cat", "two dogs", "a, b", "c", "red"]
    for name, content, message in (("empty.txt", b"\n", "holds no text"), ("empty.csv", b"", "holds no text"),
                                   ("none.csv", b"a,b\n1,2\n", "has the columns a, b; call that with"),
                                   ("latin.txt", b"caf\xe9", "is not UTF-8")):
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts([name])
    with pytest.raises(FileNotFoundError, match=r"absent\.txt', which does not exist"):
        read_prompts(["absent.txt"])
    with pytest.raises(ValueError, match="holds no text"):
        read_prompts(["a cat", " "])


def test_settings_that_do_not_fit_are_answered_in_one_line(folders, tmp_path):
    for wrong, message in (({"n_samples": 0}, "n_samples is 0; it must be above 0"),
                           ({"batch_size": 0}, "batch_size is 0"), ({"scheduler": "dpm"}, "choose one of ddim, dpmpp_2m"),
                           ({"prompts": None}, "neither is given"), ({"images": "x"}, "both are given")):
        with pytest.raises(SettingsError, match=message):
            run(folders["v"], **wrong)
    Path("given").mkdir()
    Image.new("RGB", (8, 8)).save("given/a.png")
    for wrong, kind, message in (
            ({"scheduler": "flow"}, ValueError, "scheduler is 'flow', .* this model predicts 'v'; choose ddim"),
            ({"steps": 1001}, ValueError, "number of sampling steps is 1001; give 1 to 1000"),
            ({"n_samples": 10**12}, OSError, "n_samples is 1,000,000,000,000: .* GB free; make fewer"),
            ({"prompts": None, "images": "given"}, ValueError, "makes pictures from texts; give prompts="),
            ({"model": "nothing"}, FileNotFoundError, "nothing holds no pipeline of clipkit's"),
            ({"device": "cuda"}, ValueError, "torch finds no CUDA GPU") if not torch.cuda.is_available() else
            ({"device": "mps"}, ValueError, "no Apple GPU")):
        with pytest.raises(kind, match=message) as found:
            run(**{"folder": folders["v"], "out": "out", **wrong})
        assert "\n" not in str(found.value)
    Path("taken").write_text("")
    with pytest.raises(OSError, match=r"cannot write taken: .*; choose a folder"):
        run(folders["v"], "taken")
    assert not list(Path("out").glob("*"))


def test_a_folder_with_other_pictures_is_left_as_it_is(folders):
    before = files(run(folders["v"], n_samples=2))
    with pytest.raises(ValueError, match=r"00000\.png was made with other settings: steps is .2. there and .3. here"):
        run(folders["v"], n_samples=4, steps=3)
    with pytest.raises(ValueError, match="prompt is 'a red heart' there and 'an owl' here"):
        run(folders["v"], n_samples=4, prompts="an owl")
    run(folders["v"], n_samples=2, device="cuda")  # all are there: nothing is loaded
    with pytest.raises(ValueError, match="model_sha256 is "):
        run(folders["flow"], n_samples=4, scheduler="ddim")
    assert files(Path("out")) == before
    Image.new("RGB", (8, 8)).save("out/00001.png")
    with pytest.raises(ValueError, match=r"00001\.png is no picture of clipkit diffusion sample, and would be overwritten"):
        run(folders["v"], n_samples=2)


def test_prompts_that_are_cut_are_counted(folders, capsys):
    run(folders["flow"], prompts=f"[a cat,{'word ' * 40}]")
    shown = capsys.readouterr().out
    assert "1 of 2 prompts are longer than the 16 tokens that the text encoder takes" in shown and "flow in 2 steps" in shown


def test_the_command_line_reaches_it_and_a_run_folder_has_its_own_samples(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["v"], tmp_path / "runs" / "emoji_diffusion" / "pipeline")
    (tmp_path / "runs" / "emoji_diffusion" / "config.yaml").write_text("")
    arguments = ["prompts=one, two: it's a \"test\"", "steps=1", "device=cpu"]
    monkeypatch.setattr("sys.argv", ["clipkit", "diffusion", "sample", *arguments])
    main()
    made = next(Path("runs/emoji_diffusion/samples").iterdir())
    assert facts(made / "00000.png")["prompt"] == "one, two: it's a \"test\""


@pytest.mark.slow
def test_a_compiled_model_makes_the_same_pictures(folders):
    for name in ("plain", "compiled"):
        run(folders["v"], name, n_samples=5, compile=name == "compiled")
    assert greatest_difference("plain", "compiled") <= 1  # fused sums round otherwise
