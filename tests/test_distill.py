"""Distillation in runs: against a plain loop, on any lever, resumed; and what a teacher's features are found by."""

import io
import json
import random
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from clipkit.commands.pretrain import pretrain
from clipkit.config.schema import SettingsError
from clipkit.data.loader import make_train_loader
from clipkit.data.samples import PictureExamples, choose_caption, hash63, parse_json
from clipkit.data.sources import find_sources
from clipkit.data.tars import read_shard
from clipkit.evaluation.teacher_features import teacher_task
from clipkit.losses import clip_loss
from clipkit.model.build import build_model
from clipkit.model.folder import load_model, save_model_folder
from clipkit.training.finetune import make_tower_optimizer
from clipkit.training.random_state import seed_all
from clipkit.training.teacher import FeatureTable, Teacher
from clipkit.training.trained_model import make_model
from tests.conftest import TINY, settings, write_tar
from tests.test_distill_loss import slow_loss
from tests.test_pretrain import BATCH, SMALL, STEPS, assert_bit_equal, lines, only_last, run_in_two_parts, weights


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_of(shards: str, *more: str):
    return settings(*only_last((*SMALL, f"data.train={shards}", "data.cache_dir=cache", *more)))


def run(shards: str, *more: str) -> int | None:
    return pretrain(config_of(shards, *more))


def test_a_teacher_of_no_weight_leaves_the_run_as_it_is(shards, start, tmp_path):
    for name, more in {"alone": (), "taught": (f"distill.teacher={start}", "distill.weight=0")}.items():
        assert run(shards, f"name={name}", *more) is None
    found = weights(tmp_path / "runs" / "taught")
    assert_bit_equal(found, weights(tmp_path / "runs" / "alone"))
    assert json.loads((tmp_path / "runs" / "taught" / "teacher.json").read_text())["teacher"] == start


def test_steps_of_a_run_are_those_of_a_plain_loop(shards, start, tmp_path):
    """The teacher is asked again for each pair: for the picture as it stands in the shard, and for the caption drawn."""
    config = config_of(shards, f"distill.teacher={start}", "distill.weight=0.3", "optim.name=sgd", "optim.lr=0.5",
                       "optim.max_grad_norm=null", "optim.weight_decay=0", "schedule.name=constant", "schedule.warmup=0",
                       "train.samples=48")
    assert pretrain(config) is None
    teacher, pictures, captions = load_model(start), {}, {}
    for shard in find_sources([shards], weighted=False)[0]:
        for raw in read_shard(shard):
            pictures[hash63(raw.image)], captions[hash63(raw.text)] = Image.open(io.BytesIO(raw.image)), raw.text.decode()
    seed_all(config.seed)
    model = make_model(config).train()
    loader = make_train_loader(
        config.data, shards=find_sources([shards], weighted=False), lanes=4, tokenize=model.tokenize, seed=config.seed,
        examples=PictureExamples(data=config.data, image_size=32, group_by="none", for_teacher=True), global_batch_size=BATCH)
    optimizer = make_tower_optimizer(model.towers, config.optim)
    shown = []
    for batch in islice(loader, 3):
        with torch.no_grad():
            teacher_images = teacher.encode_image(torch.stack([teacher.preprocess(pictures[one.item()])
                                                               for one in batch.teacher_ids[:, 0]]))
            teacher_texts = teacher.encode_text(teacher.tokenize([captions[one.item()] for one in batch.teacher_ids[:, 1]]))
        features = model(batch.images, batch.tokens)
        own = clip_loss(*features)
        distilled = slow_loss(*features[:3], teacher_image_features=teacher_images, teacher_text_features=teacher_texts,
                              teacher_logit_scale=teacher.towers.logit_scale.exp())
        loss = 0.7 * own + 0.3 * distilled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown.append([loss.item(), own.item(), distilled.item()])
    logged = [[line[name] for name in ("loss", "contrastive_loss", "distillation_loss")]
              for line in lines(tmp_path / "runs" / "small") if "loss" in line]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(shown), rtol=1e-5, atol=1e-6)
    for name, wanted in model.towers.state_dict().items():
        found = load_model(tmp_path / "runs" / "small").towers.state_dict()[name]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=name)  # fp32, sums in another order


def test_micro_batches_and_another_loss_go_with_a_teacher(shards, start, tmp_path):
    for name, more in {"plain": (), "micro": ("train.micro_batch_size=4",)}.items():
        assert run(shards, f"name={name}", f"distill.teacher={start}", "loss=siglip", *more) is None
    curves = [[line["loss"] for line in lines(tmp_path / "runs" / name) if "loss" in line] for name in ("plain", "micro")]
    assert len(curves[0]) == STEPS and curves[1] == pytest.approx(curves[0], rel=1e-4)  # sums in another order


def test_bfloat16_and_repeated_batches_go_with_a_teacher(shards, start, tmp_path):
    assert run(shards, f"distill.teacher={start}", "distill.weight=1", "train.precision=amp_bf16", "train.overfit_batches=1",
               "train.samples=480", "optim.lr=3e-3") is None
    shown = [line["distillation_loss"] for line in lines(tmp_path / "runs" / "small") if "loss" in line]
    assert shown[-1] < shown[0] - 0.1


def test_a_second_run_encodes_nothing_and_a_changed_teacher_is_refused(shards, start, tmp_path, monkeypatch, capsys):
    taught = f"distill.teacher={start}"
    assert run(shards, "name=first", taught) is None
    assert f"teacher   {start}: 128 pictures, 128 captions: " in capsys.readouterr().out

    def fail(*_arguments: object) -> None:
        raise AssertionError("encoded again")

    with monkeypatch.context() as patched:
        patched.setattr("clipkit.evaluation.encode._Share.encode", fail)
        patched.setattr("clipkit.evaluation.text_features._encode_distinct", fail)
        patched.setattr("clipkit.evaluation.lazy_model.load_model", fail)
        assert run(shards, "name=second", taught) is None
    assert_bit_equal(weights(tmp_path / "runs" / "second"), weights(tmp_path / "runs" / "first"))

    torch.manual_seed(1)
    save_model_folder(build_model(config=TINY), tmp_path / "start")
    with pytest.raises(ValueError, match=r"learned from other weights than .*start holds .* give another name") as caught:
        run(shards, "name=second", taught)
    assert "\n" not in str(caught.value)


def test_a_run_with_a_teacher_resumes_to_the_same_bits(shards, start, tmp_path, monkeypatch):
    more = (f"distill.teacher={start}", "checkpoint.every_steps=4")
    assert run(shards, "name=whole", *more) is None
    run_in_two_parts(lambda: run(shards, "name=parts", *more), monkeypatch)
    assert_bit_equal(weights(tmp_path / "runs" / "parts"), weights(tmp_path / "runs" / "whole"))


def test_a_run_older_than_the_settings_of_distillation_goes_on(shards, start, tmp_path):
    assert run(shards) is None
    file = tmp_path / "runs" / "small" / "config.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "distill"}))
    assert run(shards) is None
    with pytest.raises(ValueError, match=r"started with other settings \(distill.teacher: run has null, given "):
        run(shards, f"distill.teacher={start}")


@pytest.mark.parametrize(("given", "error", "message"), [
    (("distill.teacher=no/such",), FileNotFoundError, "there is no folder no/such; give a run"),
    (("distill.teacher=tiny-clip",), ValueError, "'tiny-clip', and an open_clip name alone has no weights; give a run"),
    (("distill.teacher=START", "distill.pretrained=openai"), ValueError, "has its own weights; leave pretrained out"),
    (("distill.teacher=START", "distill.weight=1.5"), SettingsError, r"distill\.weight is 1\.5; it must be from 0 to 1"),
    (("distill.weight=0.5",), SettingsError, r"weight is 0\.5, but there is no teacher; give distill\.teacher="),
    (("distill.pretrained=openai",), SettingsError, r"pretrained is 'openai', but there is no teacher; give distill\.teacher="),
])
def test_a_teacher_that_does_not_fit_is_answered_in_one_line(shards, start, monkeypatch, given, error, message):
    import open_clip

    known = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY if name == "tiny-clip" else known(name))
    with pytest.raises(error, match=message) as caught:
        run(shards, *(text.replace("START", start) for text in given))
    assert "\n" not in str(caught.value)


def test_a_pair_that_the_teacher_has_not_seen_is_one_line():
    table = FeatureTable(torch.tensor([30, 10, 20]), torch.eye(3))
    assert torch.equal(table.find(torch.tensor([10, 30, 20]))[0], torch.eye(3)[[1, 0, 2]])
    teacher = Teacher(table, table, 10.0, weight=0.5, cure="run it again")
    for missing in (5, 15, 99):
        with pytest.raises(ValueError, match="no features of 1 of the 2 pairs of a batch; run it again"):
            teacher.beside(clip_loss, torch.tensor([[10, 30], [20, missing]]))


def png(side: int, shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_only_the_student_can_use_stops_the_run_with_what_to_do(start, tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.evaluation.image_sets.MAX_PIXELS", 100)
    pictures = [png(20 if number == 7 else 8, number) for number in range(BATCH)]
    shard = write_tar(tmp_path / "0.tar", [member for number, picture in enumerate(pictures) for member in (
        (f"{number}.png", picture), (f"{number}.txt", f"number {number}".encode()))])
    message = (r"no features of 1 of the 16 pairs of a batch; it could not use 1 samples \(.*\): see that all shards can be "
               r"read .*, remove cache/embeddings/images-\w+, and run")
    with pytest.raises(ValueError, match=message) as caught:
        run(shard, f"distill.teacher={start}")
    assert "\n" not in str(caught.value)


FIELDS = {"label": "cat", "tags": ["wet", " ", "grey"], "captions": ["one", "two"], "half": "\ud800"}


@pytest.mark.parametrize("caption_fields", [None, ["txt"], ["label", "tags"], ["a {tags}.", "{txt}!", "none", "half"]])
def test_every_caption_that_can_be_drawn_is_encoded(tmp_path, caption_fields):
    members = [("a.png", png(4)), ("a.txt", b" words "), ("a.json", json.dumps(FIELDS).encode())]
    shard = write_tar(tmp_path / "0.tar", members)
    drawn = set()
    for seed in range(200):
        fields = parse_json(json.dumps({key: value for key, value in FIELDS.items() if key != "half"}).encode())
        drawn.add(choose_caption(b" words ", fields, caption_fields, None, random.Random(seed)))
    [sample] = teacher_task("x", [shard, shard], caption_fields=caption_fields).images.read()
    assert set(sample.captions) == drawn and len(sample.captions) == len(drawn)
    assert sample.labels == (hash63(png(4)),)


def test_the_names_of_class_numbers_are_encoded_too(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a.png", png(4)), ("a.cls", b"1")])
    [sample] = teacher_task("x", [shard], caption_fields=["a {label}."], class_names=["cat", "dog"]).images.read()
    assert sample.captions == ("a dog.",)


def test_a_sample_without_a_caption_is_no_pair_of_the_teacher(tmp_path):
    shard = write_tar(tmp_path / "0.tar", [("a.png", b"x"), ("a.txt", b" ")])
    [bad] = teacher_task("x", [shard], caption_fields=None).images.read()
    assert bad.cause == "no caption"


def test_pairs_are_named_only_where_a_teacher_asks(shards):
    config = config_of(shards)

    def first(workers: int, for_teacher: bool):
        data = config_of(shards, f"data.workers={workers}").data
        loader = make_train_loader(
            data, shards=find_sources([shards], weighted=False), lanes=4, tokenize=build_model(config=TINY).tokenize,
            examples=PictureExamples(data=data, image_size=32, group_by="none", for_teacher=for_teacher), seed=0,
            global_batch_size=BATCH)
        batch = next(loader)
        loader.close()
        return batch.teacher_ids

    assert config.distill.teacher is None
    assert first(0, False).shape == first(2, False).shape == (BATCH, 0)
    ids = first(0, True)
    assert torch.equal(ids, first(2, True)) and ids.shape == (BATCH, 2)
    with tarfile.open(Path(find_sources([shards], weighted=False)[0][0])) as tar:
        pictures = {hash63(tar.extractfile(one).read()) for one in tar if one.name.endswith(".png")}
    assert len(pictures & set(ids[:, 0].tolist())) == BATCH // 4  # of four lanes, each with a shard
