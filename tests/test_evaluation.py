"""Evaluation from shards to numbers: tasks, features, baseline, several processes."""

import functools
import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from clipkit.data.emoji import shards as emoji_shards_module
from clipkit.data.emoji.pack import EmojiRow, read_emoji_rows
from clipkit.data.tars import BadSample
from clipkit.evaluation import image_sets, nearest_neighbour, tasks, zero_shot
from clipkit.evaluation.encode import encode_task, encode_texts, evaluation_mode
from clipkit.evaluation.image_sets import ShardImages, Share
from clipkit.evaluation.nearest_neighbour import emoji_pixel_baselines
from clipkit.evaluation.pictures import pictures_of
from clipkit.evaluation.predictions import predict
from clipkit.evaluation.store import EmbeddingStore
from clipkit.evaluation.tasks import Task, TaskSample, load_task
from clipkit.evaluation.zero_shot import evaluate


@pytest.fixture(scope="module")
def few_rows() -> list[EmojiRow]:
    rows = [row for row in read_emoji_rows() if row.style in ("emojitwo", "fxemoji", "streamline")]
    return [row for split in ("val", "test_style", "test_concept") for row in [row for row in rows if row.split == split][:60]]


@pytest.fixture(scope="module")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_emoji(few_rows: list[EmojiRow], emoji_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, with 60 drawings of each test split in the place of the whole set; the first test unpacks them."""
    for module in (emoji_shards_module, tasks):
        monkeypatch.setattr(module, "read_emoji_rows", lambda: few_rows)
    return emoji_cache


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 36)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return str(path)


@pytest.fixture
def caption_shards(tmp_path: Path) -> Path:
    """Two shards of 5 pictures, with one caption (.txt) or three (json)."""
    for shard in range(2):
        members = {}
        for number in range(5):
            key = f"{shard}-{number}"
            members[f"{key}.png"] = png(10 * shard + number)
            if number % 2:
                members[f"{key}.txt"] = f"picture {key}\n".encode()
            else:
                captions = [f"picture {key}", f"a view of {key}", f"another of {key}"]
                members[f"{key}.json"] = json.dumps({"captions": captions}).encode()
        write_tar(tmp_path / "pairs" / f"{shard:03d}.tar", members)
    return tmp_path / "pairs"


def test_an_emoji_task_has_the_concepts_of_its_split_and_two_prompt_rules(small_emoji: Path) -> None:
    task = load_task("emoji_test_concept", cache_dir=small_emoji)
    rows = [row for row in tasks.read_emoji_rows() if row.split == "test_concept"]
    assert set(task.classes) == {row.label for row in rows}
    number = task.classes.index(rows[0].label)
    assert task.prompts["label"][number] == [rows[0].label]
    assert task.prompts["label_and_tags"][number] == [", ".join((rows[0].label, *rows[0].tags))]
    labels = {sample.label for sample in task.images.read() if isinstance(sample, TaskSample)}
    assert labels == set(range(len(task.classes)))


def test_the_full_tasks_have_the_class_numbers_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "emoji_shards", lambda split, cache_dir: [])
    assert len(load_task("emoji_test_concept").classes) == 143
    assert len(load_task("emoji_test_style").classes) == 1358


@pytest.mark.parametrize("num_streams", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_sample_falls_to_exactly_one_reader_and_a_block_to_one_process(caption_shards: Path, world_size: int,
                                                                             num_streams: int) -> None:
    task = load_task(str(caption_shards))
    owner = {}
    for rank, stream in itertools.product(range(world_size), range(num_streams)):
        for sample in task.images.read(Share(rank, world_size, 2, stream, num_streams)):
            assert isinstance(sample, TaskSample) and sample.position not in owner
            owner[sample.position] = rank
    assert sorted(owner) == [(shard, number) for shard in range(2) for number in range(5)]
    for shard in range(2):
        assert [owner[shard, number] for number in range(5)] == [(block + shard) % world_size for block in (0, 0, 1, 1, 2)]


def test_trouble_with_a_shard_is_told_by_one_reader(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    images = load_task(str(tmp_path / "bad.tar")).images
    told = [sample for rank in range(3) for stream in range(2) for sample in images.read(Share(rank, 3, 4, stream, 2))]
    assert len(told) == 1


def test_captions_come_from_the_json_list_or_the_text(caption_shards: Path) -> None:
    samples = list(load_task(f"{caption_shards}/000.tar").images.read())
    assert [len(sample.captions) for sample in samples if isinstance(sample, TaskSample)] == [3, 1, 3, 1, 3]
    assert isinstance(samples[1], TaskSample)
    assert samples[1].captions == ("picture 0-1",)


def test_a_task_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(FileNotFoundError, match=r"task 'emoji_test' is neither one of emoji_val, .* nor shards"):
        load_task("emoji_test")


def test_samples_that_cannot_be_used_are_counted_by_cause(tiny_model, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "bad.tar", {
        "a.png": png(0), "a.txt": b"good", "b.png": png(1)[:60], "b.txt": b"cut", "c.png": png(2), "d.txt": b"no image",
        "e.png": png(3), "e.json": b"{", "f.png": png(4), "f.txt": b" ", "g.png": png(5), "g.txt": b"good too"})
    encoded = encode_task(tiny_model, load_task(shard), batch_size=4)
    assert len(encoded.labels) == 2
    assert encoded.num_bad == {"truncated image": 1, "no caption": 2, "no image": 1, "corrupt json or text": 1}
    assert {result.n_bad for result in evaluate(tiny_model, [shard])} == {5}


def test_a_concept_outside_the_classes_is_a_bad_sample(small_emoji: Path) -> None:
    task = load_task("emoji_val", cache_dir=small_emoji)
    assert isinstance(task.images, ShardImages) and isinstance(task.images.target_of, functools.partial)
    concept = next(iter(task.images.target_of.keywords["numbers"]))
    fewer = replace(task.images, target_of=functools.partial(task.images.target_of.func, numbers={concept: 0}))
    bad = [sample for sample in fewer.read() if isinstance(sample, BadSample)]
    assert {sample.cause for sample in bad} == {"unknown class"}


def test_a_task_without_a_usable_image_is_refused(tiny_model, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "bad.tar", {"a.txt": b"no picture"})
    with pytest.raises(ValueError, match=r"bad.tar has no image that can be used \(bad samples: \{'no image': 1\}\)"):
        evaluate(tiny_model, [shard])


def test_pictures_are_read_again_by_key_and_no_others_decoded(caption_shards: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(5):
        (tmp_path / "flat" / f"{number}.png").write_bytes(png(number))
    flat = Task("flat", "all", tasks.RETRIEVAL, tasks.pictures_in(tmp_path / "flat"))
    decode, decoded = image_sets.decode_image, []
    monkeypatch.setattr(image_sets, "decode_image", lambda *args, **options: decoded.append(1) or decode(*args, **options))
    for task, keys in ((load_task(str(caption_shards)), ["001.tar/1-3", "000.tar/0-2"]), (flat, ["4.png", "1.png"])):
        wanted = {sample.key: sample.image for sample in task.images.read() if isinstance(sample, TaskSample)}
        decoded.clear()
        found = pictures_of(task, [*keys, keys[0]])
        assert len(decoded) == 2 and found == {key: wanted[key] for key in keys}


def features_one_by_one(model, task: Task) -> tuple[Tensor, Tensor]:
    samples = [sample for sample in task.images.read() if isinstance(sample, TaskSample)]
    with torch.no_grad():
        features = torch.cat([model.encode_image(model.preprocess(sample.image)[None]) for sample in samples])
    return features, torch.tensor([sample.label for sample in samples])


def test_classification_equals_the_slow_reference(tiny_model, small_emoji: Path) -> None:
    results = evaluate(tiny_model, ["emoji_test_style"], cache_dir=small_emoji, batch_size=7)
    tiny_model.eval()
    task = load_task("emoji_test_style", cache_dir=small_emoji)
    features, labels = features_one_by_one(tiny_model, task)
    assert [(result.prompts, result.metric) for result in results] == [
        ("label", "acc1"), ("label", "acc5"), ("label_and_tags", "acc1"), ("label_and_tags", "acc5"),
        ("ensemble", "acc1"), ("ensemble", "acc5")]
    for result in results:
        with torch.no_grad():
            prompts = task.prompts[result.prompts]
            means = [tiny_model.encode_text(tiny_model.tokenize(texts)).mean(dim=0) for texts in prompts]  # C of (D,)
            weight = torch.stack([mean / mean.norm() for mean in means])  # (C, D)
        best = (features @ weight.T).argsort(dim=1, descending=True, stable=True)[:, :int(result.metric[-1])]  # (N, k)
        assert result.value == (best == labels[:, None]).any(dim=1).double().mean().item()
        assert (result.n, result.num_classes, result.kind) == (60, 60, "zeroshot_classification")
        assert result.ci_low <= result.value <= result.ci_high


def test_retrieval_equals_the_slow_reference(tiny_model, caption_shards: Path) -> None:
    results = {result.metric: result for result in evaluate(tiny_model, [str(caption_shards)], batch_size=3)}
    tiny_model.eval()
    task = load_task(str(caption_shards))
    images, _ = features_one_by_one(tiny_model, task)
    captions = [(number, caption) for number, sample in enumerate(task.images.read()) if isinstance(sample, TaskSample)
                for caption in sample.captions]
    owners = torch.tensor([number for number, _ in captions])
    with torch.no_grad():
        texts = torch.cat([tiny_model.encode_text(tiny_model.tokenize([caption])) for _, caption in captions])
    for k in (1, 5, 10):
        best_images = (texts @ images.T).argsort(dim=1, descending=True, stable=True)[:, :k]
        best_texts = (images @ texts.T).argsort(dim=1, descending=True, stable=True)[:, :k]
        image_hits = (best_images == owners[:, None]).any(dim=1).double().mean().item()
        text_hits = (owners[best_texts] == torch.arange(10)[:, None]).any(dim=1).double().mean().item()
        assert results[f"image_retrieval_recall@{k}"].value == image_hits
        assert results[f"text_retrieval_recall@{k}"].value == text_hits
    assert results["image_retrieval_recall@1"].n == 22
    assert results["text_retrieval_recall@1"].n == 10


def test_the_result_is_the_same_each_time_and_for_any_batch_size(tiny_model, small_emoji: Path) -> None:
    first = evaluate(tiny_model, ["emoji_val"], cache_dir=small_emoji, batch_size=64)
    assert evaluate(tiny_model, ["emoji_val"], cache_dir=small_emoji, batch_size=64) == first
    assert evaluate(tiny_model, ["emoji_val"], cache_dir=small_emoji, batch_size=5) == first


def test_each_module_gets_its_mode_back_also_after_an_error(tiny_model) -> None:
    tiny_model.train()
    tiny_model.towers.visual.eval()
    before = [module.training for module in tiny_model.modules()]
    with evaluation_mode(tiny_model):
        assert not any(module.training for module in tiny_model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluation_mode(tiny_model):
        _ = 1 / 0
    assert [module.training for module in tiny_model.modules()] == before
    assert torch.is_grad_enabled()


def test_features_are_fp32_also_under_autocast(tiny_model) -> None:
    expected = encode_texts(tiny_model, ["a cat"], batch_size=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_texts(tiny_model, ["a cat"], batch_size=1), expected)


def test_nothing_is_rounded_to_tf32_inside_and_what_was_set_comes_back(tiny_model, caption_shards: Path, monkeypatch) -> None:
    backends: Any = torch.backends
    rounding = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)
    seen, encode_image, rank_targets = [], tiny_model.towers.encode_image, zero_shot.rank_targets

    def look_into(function):
        def seeing(*args, **options):
            seen.append([backend.fp32_precision for backend in rounding])
            return function(*args, **options)
        return seeing

    monkeypatch.setattr(tiny_model.towers, "encode_image", look_into(encode_image))
    monkeypatch.setattr(zero_shot, "rank_targets", look_into(rank_targets))
    before = [backend.fp32_precision for backend in rounding]
    try:
        for backend in rounding:
            backend.fp32_precision = "tf32"
        evaluate(tiny_model, [str(caption_shards)])
        with pytest.raises(ZeroDivisionError), evaluation_mode(tiny_model):
            _ = 1 / 0
        assert [backend.fp32_precision for backend in rounding] == ["tf32"] * 3
    finally:
        for backend, precision in zip(rounding, before, strict=True):
            backend.fp32_precision = precision
    assert len(seen) == 2 + 2 and all(precisions == ["ieee"] * 3 for precisions in seen)


def test_classes_without_a_positive_are_told_of_a_multi_label_task_too(tiny_model) -> None:
    class Pictures:
        fingerprint = "0" * 64

        def read(self, *_: object):
            for number in range(6):
                labels = (0, 2) if number % 2 else (2,)
                yield TaskSample((0, number), str(number), Image.new("RGB", (32, 32), (40 * number, 0, 0)), -1, labels, ())

        def count(self) -> int:
            return 6

    classes = ("cat", "dog", "fish")
    task = Task("pets", "test", tasks.MULTI_LABEL, Pictures(), classes, {"plain": [[name] for name in classes]})
    outcome = zero_shot.measure(tiny_model, task)
    assert outcome.notes == ("1 of 3 classes of pets have no picture (dog): they are possible answers, and no part of the "
                             "means over classes",)
    value = {result.metric: result.value for result in outcome.results}
    features, _ = features_one_by_one(tiny_model, task)
    with torch.no_grad():
        weight = tiny_model.encode_text(tiny_model.tokenize(list(classes)))  # (C, D)
    probabilities = (100 * features @ weight.T).softmax(dim=1).numpy()
    right = np.array([[number % 2, 0, 1] for number in range(6)])
    wanted = [average_precision_score(right[:, number], probabilities[:, number]) for number in (0, 2)]
    assert value["mean_average_precision"] == pytest.approx(np.mean(wanted), abs=1e-9)


def test_a_model_with_weights_that_are_not_finite_is_refused(tiny_model, small_emoji: Path) -> None:
    tiny_model.towers.text_projection.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="features hold NaN or infinity"):
        evaluate(tiny_model, ["emoji_val"], cache_dir=small_emoji)


@pytest.mark.slow
def test_the_pixel_baseline_is_what_the_data_give_and_is_kept(tmp_path: Path, monkeypatch) -> None:
    store = EmbeddingStore(tmp_path)
    style, concept = emoji_pixel_baselines(["emoji_test_style", "some/shards", "emoji_test_concept"], store)
    assert style.value == pytest.approx(400 / 1358)  # 0.295
    assert (style.n, concept.n, concept.value) == (1358, 785, 0.0)
    assert emoji_pixel_baselines(["some/shards"]) == []
    monkeypatch.setattr(nearest_neighbour, "emoji_pictures", None)
    assert emoji_pixel_baselines(["emoji_test_style", "emoji_test_concept"], store) == [style, concept]


def test_predictions_name_the_first_pictures(tiny_model, small_emoji: Path, caption_shards: Path) -> None:
    of_emoji = predict(tiny_model, "emoji_val", num_images=6, cache_dir=small_emoji)
    of_pairs = predict(tiny_model, str(caption_shards), num_images=6)
    for predictions in (of_emoji, of_pairs):
        assert len(predictions) == 6
        for prediction in predictions:
            assert len(prediction.guesses) == 3
            assert all(right == (name == prediction.label) for name, right in prediction.guesses)
    assert of_pairs[1].label == "picture 0-1"


def evaluate_on_a_rank(rank: int, world_size: int, port: int, names: list[str], out: str) -> None:
    import torch.distributed as dist

    from clipkit.model.build import build_model
    from tests.conftest import TINY

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = build_model(config=TINY)
    outcomes = [zero_shot.measure(model, load_task(task), batch_size=3) for task in names]
    found = [result for outcome in outcomes for result in outcome.results]  # nll and ece among them: every bit counts
    Path(out, f"{world_size}-{rank}.txt").write_text("\n".join(map(str, found)))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.multiprocess
def test_several_processes_find_what_one_finds_to_the_last_bit(caption_shards: Path, tmp_path: Path, free_port: int) -> None:
    import torch.multiprocessing as mp

    for number in range(10):
        (tmp_path / "pets" / ("cat", "dog", "fish")[number % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / ("cat", "dog", "fish")[number % 3] / f"{number}.png").write_bytes(png(number))
    names = [str(caption_shards), f"{caption_shards}/000.tar", str(tmp_path / "pets")]
    evaluate_on_a_rank(0, 1, free_port, names, str(tmp_path))
    mp.spawn(evaluate_on_a_rank, (3, free_port, names, str(tmp_path)), nprocs=3)  # of 000.tar, one gets no batch
    alone = (tmp_path / "1-0.txt").read_text()
    assert "'nll'" in alone
    assert [(tmp_path / f"3-{rank}.txt").read_text() for rank in range(3)] == [alone] * 3
