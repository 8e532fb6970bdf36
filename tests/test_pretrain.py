"""`clipkit pretrain` as a person uses it: runs, stops, resumes, learns; and each bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from clipkit.commands import pretrain as command
from clipkit.commands.pretrain import pretrain
from clipkit.model.folder import load_model
from clipkit.training.stop import EXIT_STOPPED
from tests.conftest import settings

STEPS, BATCH = 12, 16
SMALL = ("model=tiny", "name=small", f"train.global_batch_size={BATCH}", f"train.samples={STEPS * BATCH}",
         "train.epochs=null", "train.precision=fp32", "data.workers=0", "log.every=1", "log.to=[]", "device=cpu")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(shards: str, *more: str) -> int | None:
    return pretrain(settings(*only_last((*SMALL, f"data.train={shards}", *more))))


def only_last(given: tuple[str, ...], without: str = "") -> list[str]:
    """Of settings given more than once the last; `without` is left out."""
    chosen = {setting.partition("=")[0]: setting for setting in given}
    return [setting for key, setting in chosen.items() if key != without]


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir):
    newest = (run_dir / "checkpoints" / "latest").read_text().strip()
    # Copies: what safetensors loads is the file itself, mapped, and would change with it.
    return {file.name: {name: tensor.clone() for name, tensor in load_file(file).items()} for file
            in (run_dir / "checkpoints" / newest).glob("*.safetensors")}


def assert_bit_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for file in wanted:
        assert found[file].keys() == wanted[file].keys()
        for name, tensor in wanted[file].items():
            assert torch.equal(found[file][name], tensor), (file, name)


def run_in_two_parts(run, monkeypatch):
    """Call `run` twice: the first time it ends, as by Ctrl-C, when its first checkpoint is written."""
    keep = command.save

    def save_and_stop(t, step):
        keep(t, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(command, "save", keep)
    assert run() is None


def test_a_run_leaves_everything_and_ends_well_again(shards, tmp_path, capsys):
    assert run(shards, "evaluation.tasks=[" + shards + "]", "evaluation.final_tasks=[" + shards + "]",
               "log.to=[tensorboard]", "checkpoint.every_steps=4") is None
    run_dir = tmp_path / "runs" / "small"
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "predictions.png", "checkpoints", "model",
            "zero_shot"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest", "step-00000008", "step-00000012"]  # keep: 2
    assert {path.name for path in (run_dir / "model").iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors"}
    steps = [line for line in lines(run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for name in ("samples_seen", "epoch", "loss_minus_log_batch", "in_batch_accuracy_image_to_text",
                 "in_batch_accuracy_text_to_image", "lr", "logit_scale", "grad_norm", "samples_per_second",
                 "data_wait_fraction", "peak_memory_gb", "bad", "skipped_steps"):
        assert name in steps[-1], name
    measured = [line for line in lines(run_dir) if "task" in line]
    assert measured[0]["step"] == 0 and measured[-1]["step"] == STEPS
    assert {"metric", "value", "n", "ci_low", "ci_high"} <= measured[0].keys()
    shown = capsys.readouterr().out
    assert shown.startswith("clipkit pretrain: runs/small")
    for word in ("model ", "data ", "schedule ", "hardware ", "image_retrieval_recall@1", "next "):
        assert word in shown
    of_checkpoint = load_model(run_dir / "checkpoints" / f"step-{STEPS:08d}").towers.state_dict()
    assert_bit_equal({"": dict(of_checkpoint)}, {"": dict(load_model(run_dir / "model").towers.state_dict())})
    before = (run_dir / "model" / "open_clip_model.safetensors").read_bytes()
    assert run(shards, "evaluation.final_tasks=[" + shards + "]") is None  # finished: shows its table again
    assert "finished" in capsys.readouterr().out
    assert (run_dir / "model" / "open_clip_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("number", "extra"), [
    (signal.SIGTERM, ("checkpoint.asynchronous=false",)),
    (signal.SIGUSR1, ("train.ema_decay=0.9", "optim.name=lion", "model.patch_dropout=0.5", "loss=siglip")),
], ids=["plain", "average-lion-dropout-siglip"])
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(shards, tmp_path, number, extra):
    assert run(shards, "name=whole", *extra) is None

    class SignalAtStep(threading.Thread):
        def run(self):
            file = tmp_path / "runs" / "parts" / "metrics.jsonl"
            while not file.exists() or len(file.read_text().splitlines()) < 3:
                time.sleep(0.002)
            os.kill(os.getpid(), number)

    thread = SignalAtStep()
    thread.start()
    assert run(shards, "name=parts", *extra) == EXIT_STOPPED
    thread.join()
    stopped_at = lines(tmp_path / "runs" / "parts")[-1]["step"]
    assert 3 <= stopped_at < STEPS
    assert run(shards, "name=parts", "data.workers=2", *extra) is None  # on other workers, too
    assert_bit_equal(weights(tmp_path / "runs" / "parts"), weights(tmp_path / "runs" / "whole"))
    losses = [[line["loss"] for line in lines(tmp_path / "runs" / name) if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_ten_runs_killed_at_random_moments_end_with_the_same_bits(shards, tmp_path):
    """SIGKILL at ten random moments of one run (2 loader workers); then its weights are those of one never killed."""
    import random

    options = [f"data.train={shards}", "data.workers=2", f"train.samples={40 * BATCH}", "checkpoint.every_steps=3",
               "train.threads=1", "evaluation.tasks=[]"]
    command = [sys.executable, "-m", "clipkit", "pretrain", *only_last((*SMALL, *options), without="name")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "name=whole"], check=True, env=environment, capture_output=True)
    rng, killed = random.Random(0), 0
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    while killed < 10:
        with subprocess.Popen([*command, "name=killed"], env=environment, stdout=subprocess.DEVNULL,
                              start_new_session=True) as process:
            begun = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            wanted = begun + rng.randrange(1, 4)
            while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < wanted):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.15))  # any moment of a step, of a save, of an evaluation
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
    subprocess.run([*command, "name=killed"], check=True, env=environment, capture_output=True)
    assert killed >= 8, killed
    assert_bit_equal(weights(tmp_path / "runs" / "killed"), weights(tmp_path / "runs" / "whole"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(shards, tmp_path, capsys):
    assert run(shards, "checkpoint.every_steps=4") is None
    wanted = weights(tmp_path / "runs" / "small")
    newest = tmp_path / "runs" / "small" / "checkpoints" / "step-00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    assert run(shards, "checkpoint.every_steps=4") is None
    shown = capsys.readouterr().out
    assert "step-00000012 is damaged" in shown and "at step 8" in shown
    assert_bit_equal(weights(tmp_path / "runs" / "small"), wanted)


def test_a_run_of_other_settings_or_another_model_is_refused(shards, tmp_path):
    assert run(shards) is None
    with pytest.raises(ValueError, match=r"optim\.lr: run has 0\.001, given 0\.002"):
        run(shards, "optim.lr=0.002")
    run(shards, "log.every=5", "data.workers=1")  # runtime settings may differ
    config = tmp_path / "runs" / "small" / "config.yaml"
    config.write_text(config.read_text().replace("embed_dim: 32", "embed_dim: 16"))
    with pytest.raises(ValueError, match=r"embed_dim"):
        run(shards)
    with pytest.raises(ValueError, match="checkpoint"):
        run(shards, "model.config.embed_dim=16")


def test_overfitting_one_batch_brings_the_loss_down(shards, tmp_path):
    assert run(shards, "train.overfit_batches=1", f"train.samples={60 * BATCH}", "optim.lr=3e-3") is None
    losses = [line["loss"] for line in lines(tmp_path / "runs" / "small") if "loss" in line]
    assert losses[0] > 2.5 and losses[-1] < 0.4 * losses[0]


def test_a_loss_that_is_never_finite_stops_the_run_and_spares_the_checkpoint(shards, tmp_path):
    with pytest.raises(ValueError, match=r"not finite in \d+ steps in a row.*lower optim.lr"):
        run(shards, "optim.lr=1e30", "optim.max_grad_norm=null", "train.max_skipped_steps=4", "schedule.warmup=0",
            "optim.eps=1e-30", f"train.samples={40 * BATCH}", "loss=siglip")


BAD_SETTINGS = {
    "too few samples": (("train.global_batch_size=512",), "128 samples, fewer than one batch"),
    "lanes that do not divide": (("data.lanes=3",), "lanes"),
    "epochs and samples": (("train.epochs=1",), "give one of train.samples"),
    "a missing caption field": (("data.caption_fields=[title]",), "no caption"),
    "cuda without a GPU": (("device=cuda",), "no CUDA GPU"),
    "an unknown optimizer": (("optim.name=adamx",), "choose one of"),
    "an unknown timm tower": (("model.config.vision_cfg.timm_model_name=resnet10x",), "does not know"),
    "a wrong warm-up": (("schedule.warmup=soon",), "schedule.warmup"),
    "a name that is a path": (("name=a/b",), "name"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_one_line(case, shards, tmp_path):
    overrides, message = BAD_SETTINGS[case]
    if "cuda" in case and torch.cuda.is_available():
        overrides, message = ("device=mps",), "no Apple GPU"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(shards, *overrides)
    assert "\n" not in str(error.value)


def broken(folder, kind: str) -> str:
    """Shards with something wrong in them; returns what data.train is given."""
    import io

    path = folder / "0.tar"
    if kind == "empty":
        with tarfile.open(path, "w"):
            pass
    elif kind == "no tar":
        path.write_bytes(b"not a tar file" * 100)
    elif kind == "evil":
        with tarfile.open(path, "w") as tar:
            for name in ("evil.pkl", "../x"):
                info = tarfile.TarInfo(name)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"boom"))
    elif kind in ("no caption", "no image"):
        with tarfile.open(path, "w") as tar:
            for index in range(200):
                info = tarfile.TarInfo(f"{index:04d}." + ("png" if kind == "no caption" else "txt"))
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
    return str(path)


BAD_SHARDS = {"empty": "no samples.*0.tar", "no tar": "no samples.*0.tar", "evil": "no samples.*0.tar",
              "no caption": "no caption", "no image": "no image"}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shards_are_one_line(kind, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=BAD_SHARDS[kind]) as error:
        run(broken(tmp_path, kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "message"), [
    ("nothing-{000..003}.tar", "nothing-000.tar"), ("pipe:cat x.tar", "pipe:"), (".", "clipkit shards write"),
    ("table.csv", "clipkit shards write")])
def test_what_is_no_shard_is_answered_with_what_to_do(given, message, tmp_path):
    (tmp_path / "table.csv").write_text("filepath,title\na.png,a\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(given)


@pytest.mark.parametrize("quoting", ["quoted", "expanded"])
def test_the_command_takes_a_pattern_in_quotes_and_expanded_by_the_shell(quoting, shards, tmp_path):
    """From another folder, as a process: braces given as they are, and as bash hands them on."""
    prefix = shards.removesuffix("{000..003}.tar")
    given = [f"data.train={shards}"] if quoting == "quoted" else [f"data.train={prefix}{n:03d}.tar" for n in range(4)]
    done = subprocess.run([sys.executable, "-m", "clipkit", "pretrain", *SMALL, *given, "--cfg", "job"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.count(prefix) == (1 if quoting == "quoted" else 4)


def test_a_read_only_folder_and_a_full_disk_are_one_line(shards, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises((ValueError, OSError), match="runs") as error:
        run(shards)
    assert "\n" not in str(error.value)
    (tmp_path / "runs").unlink()
    assert run(shards, "checkpoint.every_steps=4", f"train.samples={8 * BATCH}") is None
    kept = weights(tmp_path / "runs" / "small")

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk is full") as error:
        run(shards, "name=other")
    assert "\n" not in str(error.value)
    assert_bit_equal(weights(tmp_path / "runs" / "small"), kept)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_an_error(shards, tmp_path, free_port):
    """Two ranks without a launcher that would kill the other: the one that is left must end by itself."""
    options = (f"data.train={shards}", "train.threads=1", f"train.samples={4000 * BATCH}", "evaluation.tasks=[]",
               "parallel.timeout_seconds=20")
    command = [sys.executable, "-m", "clipkit", "pretrain", *only_last((*SMALL, *options))]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                              env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)})
             for rank in range(2)]
    metrics = tmp_path / "runs" / "small" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert ranks[0].poll() is None, ranks[0].communicate()[1]
        time.sleep(0.05)
    ranks[1].kill()
    assert ranks[0].wait(timeout=60) != 0
    for process in ranks:
        process.communicate()


def pictures_with_captions(folder) -> None:
    """Forty-eight JPEGs, each with a caption beside it and a row in table.csv."""
    from PIL import Image

    (folder / "pictures").mkdir()
    rows = ["file;text;kind"]
    for index in range(48):
        colour = (index * 5 % 256, index * 11 % 256, 200)
        Image.new("RGB", (60, 40), colour).save(folder / "pictures" / f"{index:03d}.jpg")
        (folder / "pictures" / f"{index:03d}.txt").write_text(f"a square of colour {index}")
        rows.append(f'pictures/{index:03d}.jpg;"a square; of colour {index}";square')
    (folder / "table.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("source", ["pictures", "table.csv"])
def test_shards_written_from_a_folder_and_from_a_table_train(source, tmp_path, capsys):
    from clipkit.commands.shards import main as shards_main

    pictures_with_captions(tmp_path)
    shards_main(["write", f"source={source}", "out=own", "samples_per_shard=12"])
    assert sorted(path.name for path in (tmp_path / "own").glob("*.tar")) == [f"shard-{n:06d}.tar" for n in range(4)]
    assert run("own/*.tar", f"train.samples={4 * BATCH}") is None
    assert lines(tmp_path / "runs" / "small")[-1]["epoch"] == pytest.approx(4 * BATCH / 48)


def test_tars_in_the_shape_of_img2dataset_train(tmp_path):
    """Members key.jpg, key.txt and key.json (url, caption, status, sizes, exif), and 00000_stats.json beside the tar."""
    import io

    from PIL import Image

    (tmp_path / "laion").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "laion" / f"{number:05d}.tar", "w") as tar:
            for index in range(20):
                key, file = f"{number:05d}{index:04d}", io.BytesIO()
                Image.new("RGB", (64, 48), (index * 12, 40, 90)).save(file, "JPEG")
                record = {"url": f"http://x/{key}.jpg", "caption": f"picture {key}", "key": key, "status": "success",
                          "error_message": None, "width": 64, "height": 48, "exif": "{}", "sha256": "0"}
                for suffix, data in (("jpg", file.getvalue()), ("json", json.dumps(record).encode()),
                                     ("txt", f"picture {key}".encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (tmp_path / "laion" / f"{number:05d}_stats.json").write_text(json.dumps({"count": 22, "successes": 20}))
    assert run("laion/{00000..00001}.tar", f"train.samples={5 * BATCH}", "data.caption_fields=[caption]") is None
    assert lines(tmp_path / "runs" / "small")[-1]["epoch"] == pytest.approx(5 * BATCH / 40)
