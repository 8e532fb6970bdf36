"""Tasks from shards, folders and tables: what is read, and what is refused with which words."""

import csv
import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.data.emoji import shards as emoji_shards_module
from clipkit.data.emoji.pack import read_emoji_rows
from clipkit.data.tars import BadSample
from clipkit.evaluation import tasks
from clipkit.evaluation.image_sets import Share, TaskSample, pictures_in
from clipkit.evaluation.prompt_rules import prompt_rules
from clipkit.evaluation.tasks import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, Task, empty_classes, load_task
from tests.conftest import write_tar

TEMPLATES = "a photo of a {c}.\nan image of {c}\n"


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def benchmark_set(root: Path, split: str, labels: list[bytes], *, suffix: str = "cls", names: str = "cat\nred fox\nhen\n",
                  kind: str = "", per_shard: int = 4) -> Path:
    """Write a set in CLIP_benchmark's layout, with one sample a label."""
    (root / split).mkdir(parents=True)
    parts = [labels[start:start + per_shard] for start in range(0, len(labels), per_shard)]
    for shard, part in enumerate(parts):
        keys = [f"s{number + shard * per_shard:07d}" for number in range(len(part))]
        write_tar(root / split / f"{shard}.tar", [
            member for number, (key, label) in enumerate(zip(keys, part, strict=True))
            for member in ((f"{key}.png", picture(number)), (f"{key}.{suffix}", label))])
    (root / split / "nshards.txt").write_text(f"{len(parts)}\n")
    (root / "classnames.txt").write_text(names)
    (root / "zeroshot_classification_templates.txt").write_text(TEMPLATES)
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    return root


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(picture(number))
    return root


def read(task: Task, **ranks: int) -> list[TaskSample]:
    found = list(task.images.read(Share(**ranks)))
    assert all(isinstance(sample, TaskSample) for sample in found), found
    return [sample for sample in found if isinstance(sample, TaskSample)]


def causes(task: Task) -> list[str]:
    return [sample.cause for sample in task.images.read() if isinstance(sample, BadSample)]


def test_a_missing_split_is_answered_with_those_that_are_there(tmp_path, server):
    benchmark_set(tmp_path / "set", "val", [b"0"])
    class_folders(tmp_path / "photos/train", {"cat": 1})
    class_folders(tmp_path / "photos/val", {"cat": 1})
    for name, there in ((f"{tmp_path}/set", "val"), (f"{server}/set", "val"), (f"{tmp_path}/photos", "train, val")):
        with pytest.raises(FileNotFoundError, match=f"split 'test' is not in .*: it has {there}; name one, as in task="):
            load_task(name)
    assert load_task(f"{tmp_path}/set/val").split == load_task(f"{tmp_path}/photos", split="val").split == "val"
    with pytest.raises(FileNotFoundError, match=r"no set at .*/nothing: there is no test/nshards.txt"):
        load_task(f"{server}/nothing")
    with pytest.raises(ValueError, match=r"split is 'val', but .* has no splits"):
        load_task(str(class_folders(tmp_path / "plain", {"cat": 1})), split="val")


def test_class_folders_are_classes_in_sorted_order_in_every_split(tmp_path):
    class_folders(tmp_path / "test", {"red_fox": 1, "cat": 2})
    class_folders(tmp_path / "train", {"cat": 1, "ant": 1, "red_fox": 1})
    task = load_task(str(tmp_path))
    assert task.classes == ("ant", "cat", "red fox") and list(task.prompts) == ["openai80"]
    assert [(sample.key, sample.label) for sample in read(task)] == [("cat/0.png", 1), ("cat/1.png", 1), ("red_fox/0.png", 2)]
    assert task.train is not None and [sample.label for sample in read(task.train)] == [0, 1, 2]
    assert empty_classes(task, [sample.labels for sample in read(task)]).startswith("1 of 3 classes")
    assert read(load_task(f"{tmp_path}/test"))[2].label == 2
    assert [sample.position for rank in range(2) for sample in read(task, rank=rank, world_size=2)] == [(0, 0), (0, 2), (0, 1)]


def test_classnames_txt_gives_class_folders_nicer_names(tmp_path):
    class_folders(tmp_path, {"n01": 1, "n02": 1, "train": 1})
    assert load_task(str(tmp_path)).classes == ("n01", "n02", "train")
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\nlocomotive\n")
    assert load_task(str(tmp_path), templates="plain").prompts == {"plain": [["tench"], ["goldfish"], ["locomotive"]]}
    (tmp_path / "classnames.txt").write_text("tench\n")
    with pytest.raises(ValueError, match=r"has 1 names, but there are 3 class folders \(n01, n02, train"):
        load_task(str(tmp_path))


def test_pictures_with_a_text_beside_each_are_a_retrieval_task(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    (tmp_path / "2.txt").unlink()
    task = load_task(str(tmp_path))
    assert task.kind == RETRIEVAL and causes(task) == ["no caption"]
    assert [s.captions for s in task.images.read() if isinstance(s, TaskSample)] == [("picture 0",), ("picture 1",)]
    with pytest.raises(ValueError, match=r"kind is 'zeroshot_classification', but .* holds pictures with captions"):
        load_task(str(tmp_path), kind=CLASSIFICATION)


def test_the_pictures_of_a_folder_need_no_labels(tmp_path):
    class_folders(tmp_path, {"b": 1, "a": 2, ".hidden": 1})
    (tmp_path / "a/2.png").write_bytes(picture(0)[:50])
    (tmp_path / "notes.txt").write_text("mine")
    images = pictures_in(tmp_path)
    found = list(images.read())
    assert [sample.key for sample in found] == ["a/0.png", "a/1.png", "a/2.png", "b/0.png"]
    assert [sample.label for sample in found if isinstance(sample, TaskSample)] == [-1, -1, -1]
    assert isinstance(found[2], BadSample) and found[2].cause == "truncated image"
    assert images.summary == "4 pictures; 1 other files passed over (1 .txt)" and images.count() == 4
    assert [sample.key for sample in pictures_in(tmp_path / "b/0.png").read()] == ["0.png"]
    with pytest.raises(FileNotFoundError, match="images is 'nowhere', which does not exist"):
        pictures_in("nowhere")
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"which holds no picture \(found: 1 .txt\)"):
        pictures_in(tmp_path)


# Tables


def table(folder: Path, rows: list[list[str]], name: str = "t.csv") -> str:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(folder / name)


def test_a_table_of_labels_is_a_classification_task(tmp_path):
    path = table(tmp_path, [["filepath", "label"], ["1.png", "red fox"], ["0.png", "cat"], ["1.png", "red fox"], ["2.png", " "],
                            ["", "cat"], ["gone.png", "cat"]])
    task = load_task(path, templates=["{}!"])
    assert (task.kind, task.classes, task.prompts) == (CLASSIFICATION, ("cat", "red fox"), {"{}!": [["cat!"], ["red fox!"]]})
    good = [sample for sample in task.images.read() if isinstance(sample, TaskSample)]
    assert [(sample.key, sample.label) for sample in good] == [("1.png", 1), ("0.png", 0)]
    assert causes(task) == ["no label", "no image", "missing file"]
    (tmp_path / "classnames.txt").write_text("hen\nred fox\n")
    with pytest.raises(ValueError, match=r"label 'cat' \(t.csv, row 7.*\) is outside the 2 classes of .*classnames.txt"):
        load_task(path)


def test_rows_of_one_picture_are_its_captions_or_with_that_kind_its_labels(tmp_path):
    path = table(tmp_path, [["image", "caption"], ["0.png", "a"], ["1.png", "b"], ["0.png", "c"]])
    assert [(sample.key, sample.captions) for sample in read(load_task(path))] == [("0.png", ("a", "c")), ("1.png", ("b",))]
    path = table(tmp_path, [["image", "class"], ["0.png", "x"], ["1.png", "y"], ["0.png", "y"]])
    with pytest.raises(ValueError, match=r"0.png has 2 labels \(x, y\); leave it one, or give kind=zeroshot_multilabel"):
        load_task(path)
    assert [sample.labels for sample in read(load_task(path, kind=MULTI_LABEL))] == [(0, 1), (1,)]


def test_a_table_that_could_be_two_tasks_or_none_asks(tmp_path):
    path = table(tmp_path, [["image", "caption", "label"], ["0.png", "a cat", "cat"]])
    with pytest.raises(ValueError, match="'label' makes it zeroshot_classification, 'caption' zeroshot_retrieval; give kind="):
        load_task(path)
    assert load_task(path, kind=RETRIEVAL).classes == () and load_task(path, kind=CLASSIFICATION).classes == ("cat",)
    with pytest.raises(ValueError, match=r"zeroshot_classification needs one named label, .*; rename the column"):
        load_task(table(tmp_path, [["image", "size"], ["0.png", "3"]]))
    numbers = table(tmp_path, [["image", "label"], ["0.png", "1"]])
    with pytest.raises(ValueError, match=r"are numbers, .* put a classnames.txt beside the table"):
        load_task(numbers)
    (tmp_path / "classnames.txt").write_text("cat\nhen\n")
    assert [sample.label for sample in read(load_task(numbers))] == [1]


def test_a_parquet_of_the_hub_brings_its_pictures_and_class_names(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    names = json.dumps({"info": {"features": {"label": {"names": ["cat", "hen", "fox"], "_type": "ClassLabel"}}}})
    pictures = [{"bytes": picture(number), "path": None} for number in range(3)]
    found = arrow.table({"image": pictures, "label": [2, 0, 2]}).replace_schema_metadata({"huggingface": names})
    parquet.write_table(found, tmp_path / "t.parquet")
    task = load_task(str(tmp_path / "t.parquet"))
    assert task.classes == ("cat", "hen", "fox") and [sample.label for sample in read(task)] == [2, 0, 2]
    assert len({sample.key for sample in read(task)}) == 3 == task.images.count()
    images = pickle.loads(pickle.dumps(task.images))  # loader processes get it so
    assert [sample.label for sample in images.read()] == [2, 0, 2] and images.fingerprint == task.images.fingerprint


# Prompts, fingerprints, names


def test_prompts_come_from_known_rules_files_and_texts_side_by_side(tmp_path):
    (tmp_path / "mine.txt").write_text("a {c}\n\nthe {}\n")
    (tmp_path / "cupl.json").write_text(json.dumps({"cat": ["a furry pet", "a {}"], "hen": ["a bird"], "fox": ["red"]}))
    files = [f"{tmp_path}/mine.txt", f"{tmp_path}/cupl.json"]
    rules = prompt_rules(["cat", "hen"], ["plain", "openai7", "set", *files, "{} one", "{c} two"], own=["own {c}"])
    assert rules["2 templates given"] == [["cat one", "cat two"], ["hen one", "hen two"]]
    assert rules["1 templates of the set"] == [["own cat"], ["own hen"]] and rules["plain"] == [["cat"], ["hen"]]
    assert rules[files[0]] == [["a cat", "the cat"], ["a hen", "the hen"]]
    assert rules[files[1]] == [["a furry pet", "a cat"], ["a bird"]]
    assert [len(texts) for texts in rules["openai7"]] == [7, 7]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "list.json").write_text("[]")
    for templates, message in (("a photo", r"template 'a photo' holds neither \{\} nor \{c\}"), ([], "templates is empty"),
                               (["{} and {c}"], "must hold {} once"), ("set", "the set has no templates of its own"),
                               (f"{tmp_path}/none.txt", "none.txt', which does not exist"),
                               (f"{tmp_path}/empty.txt", "is empty; give a template on each line"),
                               (f"{tmp_path}/list.json", "holds a list; it must be"),
                               (files[1], r"has no texts for 1 of 2 classes \(dog\)")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prompt_rules(["cat", "dog"], templates)


def test_a_fingerprint_changes_with_pictures_and_labels_only(tmp_path, server):
    benchmark_set(tmp_path / "a", "test", [b"0", b"1"])
    class_folders(tmp_path / "b", {"cat": 2})
    names = [f"{tmp_path}/a", f"{server}/a", f"{tmp_path}/b", table(tmp_path, [["image", "label"], ["0.png", "x"]])]
    before = [load_task(name).images.fingerprint for name in names]
    assert len(set(before)) == 4 and all(len(each) == 64 for each in before)
    assert [load_task(name, templates="plain").images.fingerprint for name in names] == before
    for path, source in (("a/test/0.tar", [("x.png", picture(0)), ("x.cls", b"0"), ("y.png", picture(1)), ("y.cls", b"0"),
                                           ("z.txt", b"longer" * 4000)]),):
        write_tar(tmp_path / path, source)
    shutil.copy(tmp_path / "b/cat/0.png", tmp_path / "b/cat/2.png")
    table(tmp_path, [["image", "label"], ["0.png", "y"]])
    assert not set(before) & {load_task(name).images.fingerprint for name in names}


def test_an_unknown_name_or_kind_is_answered_with_what_is_possible(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task 'emoji_tset' is neither one of emoji_val, .* nor shards, a set in the "
                       r"layout of CLIP_benchmark .*class folders.*table"):
        load_task("emoji_tset")
    with pytest.raises(ValueError, match="kind is 'best'; choose one of"):
        load_task("emoji_val", kind="best")
    with pytest.raises(ValueError, match="task 'emoji_val' is the split 'val', a zeroshot_classification"):
        load_task("emoji_val", split="test")
    write_tar(tmp_path / "0.tar", [("a.png", picture(0)), ("a.txt", b"a")])
    assert load_task(str(tmp_path)).kind == load_task(f"{tmp_path}/0.tar").kind == RETRIEVAL
    with pytest.raises(ValueError, match="shards without class names"):
        load_task(str(tmp_path), kind=CLASSIFICATION)
    for name in ("", "pipe:touch x"):
        with pytest.raises(ValueError, match=f"task is '{name}'; give one of emoji_val"):
            load_task(name)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"for pictures without labels give images=.*/photos classes="):
        load_task(f"{tmp_path}/photos")


def test_an_emoji_task_brings_the_train_drawings_of_its_classes(tmp_path, monkeypatch):
    rows = [row for row in read_emoji_rows() if row.style == "noto" and row.split != "test_style"]
    few = [row for split in ("train", "val", "test_concept") for row in [row for row in rows if row.split == split][:40]]
    few += [replace(row, split="train") for row in few if row.split == "val"][:30]
    for module in (tasks, emoji_shards_module):
        monkeypatch.setattr(module, "read_emoji_rows", lambda: few)
    for name, has_train in (("emoji_val", True), ("emoji_test_concept", False)):
        task = load_task(name, cache_dir=tmp_path, templates="plain")
        assert task.prompts == {"plain": [[label] for label in task.classes]}
        assert (task.train is not None) == has_train
        if task.train is not None:
            labels = {sample.label for sample in read(task.train)}
            assert labels == {task.classes.index(row.label) for row in few[-30:]}
