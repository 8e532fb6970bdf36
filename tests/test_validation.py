"""Pairs set aside: drawn once, never trained on, measured as a plain loop does, and the judge of when to stop."""

import io
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipkit.commands.pretrain import pretrain
from clipkit.config.schema import SettingsError
from clipkit.data.shards import expand_shards, read_shard
from clipkit.data.tars import DataError
from clipkit.data.validation import Drawn, Split, draw_validation, source_name
from clipkit.evaluation.tasks import load_task
from clipkit.evaluation.validation import Validation, validation_loss
from clipkit.losses import make_loss
from clipkit.model.folder import load_model
from clipkit.training.checkpoint import load_checkpoint
from tests.conftest import TINY, settings

STEPS, BATCH = 12, 16
SMALL = ("model=tiny", "name=small", f"train.global_batch_size={BATCH}", f"train.samples={STEPS * BATCH}", "train.epochs=null",
         "train.precision=fp32", "data.workers=0", "log.every=1", "log.to=[]", "device=cpu", "evaluation.every=2",
         "checkpoint.asynchronous=false", "checkpoint.keep=20", "train.validation_fraction=0.3")
LOSS = make_loss("clip", block_size=None, bf16=False)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(shards: str, *more: str) -> int | None:
    chosen = {one.partition("=")[0]: one for one in (*SMALL, f"data.train={shards}", *more)}
    return pretrain(settings(*chosen.values()))


def draw(shards, folder, fraction=0.3, seed=0, **more) -> Drawn:
    config = settings(f"data.train={shards}", "name=x", *more.pop("given", ()))
    return draw_validation(folder, expand_shards([shards]), Split(fraction=fraction, seed=seed), data=config.data,
                           group_by="caption", **more)


def test_what_is_set_aside_is_written_once_and_known_by_name(shards, tmp_path):
    drawn = draw(shards, tmp_path / "split")
    kept = [raw for tar in sorted((tmp_path / "split").glob("*.tar")) for raw in read_shard(str(tar))]
    split = Split(fraction=0.3, seed=0)
    wanted = [raw for tar in expand_shards([shards]) for raw in read_shard(tar) if split.holds_out(raw)]
    assert drawn.num_pairs == len(kept) == len(wanted) and 25 < len(kept) < 52  # of 128, 0.3 in the mean
    assert [raw.image for raw in kept] == [raw.image for raw in wanted]
    assert [raw.text for raw in kept] == [raw.text for raw in wanted]
    assert [json.loads(raw.json)["source"] for raw in kept] == list(map(source_name, wanted))
    record = json.loads((tmp_path / "split" / "validation.json").read_text())
    assert record == {"num_pairs": len(kept), "of": 128, "fraction": 0.3, "seed": 0}
    assert load_task(str(tmp_path / "split")).kind == "zeroshot_retrieval"  # any command can ask it

    (tmp_path / "split" / "validation.json").write_text('{"num_pairs": 7}')
    assert draw(shards, tmp_path / "split", fraction=0.9).num_pairs == 7  # as drawn before


def test_another_seed_sets_others_aside_and_another_folder_the_same(shards, tmp_path):
    raws = [raw for tar in expand_shards([shards]) for raw in read_shard(tar)]
    first, second = ([Split(fraction=0.5, seed=seed).holds_out(raw) for raw in raws] for seed in (0, 1))
    assert first != second
    assert first == [Split(fraction=0.5, seed=0).holds_out(raw._replace(url=f"/elsewhere/{raw.url.rpartition('/')[2]}"))
                     for raw in raws]


def test_training_meets_all_pairs_but_those(shards):
    from clipkit.data.loader import make_train_loader
    from clipkit.data.samples import PictureExamples

    config = settings(f"data.train={shards}", "name=x", "data.workers=0", "data.lanes=4")
    split, seen = Split(fraction=0.3, seed=0), []

    class Telling(PictureExamples):
        def __call__(self, raw, rng):
            seen.append(source_name(raw))
            return super().__call__(raw, rng)

    def tokenize(texts):
        return torch.zeros(len(texts), 4, dtype=torch.int32)

    loader = make_train_loader(config.data, shards=[expand_shards([shards])], lanes=4, tokenize=tokenize, seed=0,
                               examples=Telling(data=config.data, image_size=32, group_by="none"), global_batch_size=16,
                               leave_out=split.holds_out)
    for _ in range(8):  # 128 drawn: more than an epoch of what is left
        next(loader)
    every = {source_name(raw): split.holds_out(raw) for tar in expand_shards([shards]) for raw in read_shard(tar)}
    assert set(seen) == {name for name, is_out in every.items() if not is_out}
    with pytest.raises(DataError, match="lane 0 finds only samples that are set aside"):
        next(make_train_loader(config.data, shards=[expand_shards([shards])], lanes=4, tokenize=tokenize, seed=0,
                               examples=PictureExamples(data=config.data, image_size=32, group_by="none"),
                               global_batch_size=16, leave_out=lambda raw: True))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_loss_is_that_of_a_plain_loop_in_float64(shards, tmp_path, tiny_model, masked):
    drawn = draw(shards, tmp_path / "split")
    found = validation_loss(tiny_model, drawn, LOSS, batch_size=BATCH, masked=masked)
    raws = [raw for tar in sorted((tmp_path / "split").glob("*.tar")) for raw in read_shard(str(tar))]
    size = len(raws) // (len(raws) // BATCH)
    losses = []
    with torch.no_grad():
        for start in range(0, len(raws) // size * size, size):
            chosen = raws[start:start + size]
            images = torch.stack([tiny_model.preprocess(Image.open(io.BytesIO(raw.image)).convert("RGB")) for raw in chosen])
            texts = [raw.text.decode() for raw in chosen]
            features = tiny_model.towers.encode_image(images), tiny_model.towers.encode_text(tiny_model.tokenize(texts))
            image, text = (F.normalize(one.double(), dim=-1) for one in features)
            logits = tiny_model.towers.logit_scale.exp().double() * image @ text.T
            if masked:
                same = torch.tensor([[a == b and i != j for j, b in enumerate(texts)] for i, a in enumerate(texts)])
                logits = logits.masked_fill(same, -torch.inf)
            target = torch.arange(size)
            losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    assert found == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert tiny_model.training


def measure_on_a_rank(rank: int, world_size: int, port: int, folder: str, out: str) -> None:
    from pathlib import Path

    import torch.distributed as dist

    from clipkit.model.build import build_model

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    loss = validation_loss(build_model(config=TINY), Drawn(Path(folder), 32, 10**6), LOSS, batch_size=BATCH, masked=True)
    Path(out, f"{world_size}-{rank}.txt").write_text(repr(loss))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_find_the_loss_of_one(shards, tmp_path, free_port):
    import torch.multiprocessing as mp

    assert draw(shards, tmp_path / "split").num_pairs >= 32
    measure_on_a_rank(0, 1, free_port, str(tmp_path / "split"), str(tmp_path))
    mp.spawn(measure_on_a_rank, (2, free_port, str(tmp_path / "split"), str(tmp_path)), nprocs=2)
    alone, first, second = (float((tmp_path / f"{name}.txt").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second == pytest.approx(alone, abs=1e-5)


def test_a_run_ends_when_the_loss_has_not_fallen_for_long_enough_and_keeps_its_best(shards, tmp_path, capsys):
    """At a rate that grows past all use, the loss falls first and then rises."""
    rising = ("train.patience=2", "optim.lr=0.3", "schedule.name=constant", "schedule.warmup=100%", "train.samples=640")
    assert run(shards, *rising) is None
    run_dir = tmp_path / "runs" / "small"
    losses = json.loads((run_dir / "validation" / "losses.json").read_text())
    best = min(losses, key=lambda one: one[1])[0]
    assert [step for step, _ in losses] == list(range(2, best + 5, 2)) and best + 4 < 40
    assert f"no lower validation loss since step {best}" in capsys.readouterr().out
    wanted = load_checkpoint(run_dir / "checkpoints" / f"step-{best:08d}", verify=True).model
    kept = load_model(run_dir / "model").towers.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in wanted.items())

    assert run(shards, *rising) is None  # an ended run is at its end
    assert json.loads((run_dir / "validation" / "losses.json").read_text()) == losses
    assert run(shards, *rising, "train.patience=3") is None  # with more patience it goes on
    assert len(json.loads((run_dir / "validation" / "losses.json").read_text())) > len(losses)


def test_without_patience_the_loss_is_told_and_the_last_model_kept(shards, tmp_path):
    assert run(shards) is None
    run_dir = tmp_path / "runs" / "small"
    told = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [[one["step"], one["value"]] for one in told if one.get("task") == "validation"]
    assert losses == json.loads((run_dir / "validation" / "losses.json").read_text())
    assert [step for step, _ in losses] == [2, 4, 6, 8, 10, 12]
    places = (run_dir / "model", run_dir / "checkpoints" / "step-00000012")
    kept, last = (load_model(place).towers.state_dict() for place in places)
    assert all(torch.equal(kept[name], tensor) for name, tensor in last.items())


def test_measurements_after_the_step_that_a_run_resumes_at_are_forgotten(tmp_path):
    (tmp_path / "losses.json").write_text("[[2, 3.0], [4, 2.0], [6, 2.5], [8, 2.6]]")
    made = partial(Validation, Drawn(tmp_path, 8, 1), Split(fraction=0.5, seed=0), is_main=True)
    assert made(patience=2, step=8).is_over and not made(patience=3, step=8).is_over
    assert not made(patience=2, step=6).is_over and made(patience=2, step=6).best_step == 4
    early = made(patience=1, step=0)
    assert early.losses == [] and early.keeps(2) and not early.is_over
    assert made(patience=2, step=8).keeps(4) and not made(patience=2, step=8).keeps(8)


@pytest.mark.parametrize(("given", "message"), [
    ("train.patience=3", "train.patience is 3, but no pairs are set aside to judge by; give train.validation_fraction=0.1"),
    ("train.validation_fraction=1", "train.validation_fraction is 1; give a share between 0 and 1, or null"),
    ("train.validation_fraction=1.5", "train.validation_fraction is 1.5; it must be from 0 to 1"),
])
def test_settings_that_do_not_fit_are_answered_in_one_line(given, message):
    with pytest.raises(SettingsError) as caught:
        settings("data.train=x.tar", "name=x", given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_a_split_without_pairs_on_one_side_is_answered_in_one_line(shards, tmp_path, fraction):
    with pytest.raises(ValueError, match=r"sets \d+ of 128 pairs aside; validation needs at least two, and training the rest"):
        draw(shards, tmp_path / "split", fraction=fraction)
    assert not list((tmp_path / "split").glob("*"))
