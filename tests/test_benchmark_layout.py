"""Sets in CLIP_benchmark's layout: read by any number of ranks, and refused where they contradict themselves."""

import io

import numpy as np
import pytest
from PIL import Image

from clipkit.evaluation.benchmark_layout import find_benchmark_set
from clipkit.evaluation.benchmark_writer import write_benchmark_set
from clipkit.evaluation.image_sets import TaskSample
from clipkit.evaluation.tasks import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, empty_classes, load_task
from tests.conftest import write_tar
from tests.test_tasks import benchmark_set, causes, class_folders, picture, read


def npy(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_classification_set_is_read_by_any_number_of_ranks(tmp_path, server, world_size):
    root = benchmark_set(tmp_path / "set", "test", [b"2", b"0", b"1", b"1", b"0", b"2", b"2", b"1", b"0"])
    for name in (str(root), f"{root}/test", f"{server}/set", f"{server}/set/test"):
        task = load_task(name)
        assert (task.kind, task.split, task.classes) == (CLASSIFICATION, "test", ("cat", "red fox", "hen"))
        shares = [read(task, rank=rank, world_size=world_size) for rank in range(world_size)]
        samples = sorted((sample for share in shares for sample in share), key=lambda sample: sample.position)
        assert [sample.label for sample in samples] == [2, 0, 1, 1, 0, 2, 2, 1, 0]
        assert [sample.labels for sample in samples] == [(sample.label,) for sample in samples]
        assert [sample.key for sample in samples] == [f"{n // 4}.tar/s{n:07d}" for n in range(9)]
        assert task.prompts == {"2 templates of the set": [
            [f"a photo of a {name}.", f"an image of {name}"] for name in ("cat", "red fox", "hen")]}
    assert load_task(str(root)).images.count() == 9


def test_the_train_split_comes_with_the_task_and_its_classes(tmp_path):
    root = benchmark_set(tmp_path, "test", [b"2", b"0"])
    assert load_task(str(root)).train is None
    benchmark_set(root, "train", [b"1"] * 5)
    task = load_task(str(root))
    assert task.train is not None and task.train.classes == task.classes and task.train.split == "train"
    assert [sample.label for sample in read(task.train)] == [1] * 5
    assert load_task(f"{root}/train").train is None


def test_multi_hot_labels_give_all_right_classes(tmp_path):
    rows = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    kinds = (np.int64, np.float32, np.bool_)
    labels = [npy(np.array(row, kind)) for row, kind in zip(rows, kinds, strict=True)]
    task = load_task(str(benchmark_set(tmp_path, "test", labels, suffix="npy", kind="multilabel")))
    assert task.kind == MULTI_LABEL
    assert [sample.labels for sample in read(task)] == [(0, 2), (), (1,)]
    assert [sample.label for sample in read(task)] == [-1, -1, 1]


def test_labels_that_are_pickled_cut_or_lie_about_their_size_are_bad_samples(tmp_path):
    whole = npy(np.zeros(3))
    claims = whole.replace(b"(3,), }         ", b"(3000000000,), }")
    assert len(claims) == len(whole) and claims != whole
    labels = [npy(np.array([{}, None, 1], dtype=object), allow_pickle=True), npy(np.zeros(3))[:-1], b"", b"\x93NUMPY\x09\x00",
              claims, npy(np.array(["a", "b", "c"])), npy(np.zeros(3)) + b"\0" * 2**20]
    task = load_task(str(benchmark_set(tmp_path, "test", labels, suffix="npy", kind="multilabel", per_shard=9)))
    assert causes(task) == ["bad label"] * 7


def test_a_retrieval_set_has_the_lines_of_its_texts_as_captions(tmp_path):
    texts = [b"a cat\na grey cat\\nasleep\n", "un café".encode(), b"\n", b"\xff"]
    task = load_task(str(benchmark_set(tmp_path, "test", texts, suffix="txt", kind="retrieval")))
    samples = [sample for sample in task.images.read() if isinstance(sample, TaskSample)]
    assert (task.kind, task.classes, task.prompts) == (RETRIEVAL, (), {})
    assert [sample.captions for sample in samples] == [("a cat", "a grey cat\nasleep"), ("un café",)]
    assert causes(task) == ["no caption", "corrupt json or text"]


def test_what_shards_write_makes_is_read_here_as_webdataset_reads_it(tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    from tests.test_shards_command import write

    write(class_folders(tmp_path / "animals", {"cat": 3, "red_fox": 2}), tmp_path / "set", samples_per_shard=2)
    task = load_task(str(tmp_path / "set"))
    samples = read(task)
    assert task.classes == ("cat", "red fox") and "3 templates of the set" in task.prompts
    theirs = []
    for shard in range(int((tmp_path / "set/test/nshards.txt").read_text())):
        with (tmp_path / f"set/test/{shard}.tar").open("rb") as stream:
            theirs += group_by_keys(tar_file_expander([{"url": "", "stream": stream}], eof_value=None))
    assert [sample.label for sample in samples] == [int(each["cls"]) for each in theirs] == [0, 0, 0, 1, 1]
    for sample, each in zip(samples, theirs, strict=True):
        assert sample.image.tobytes() == Image.open(io.BytesIO(each["png"])).tobytes()


def test_a_written_task_is_read_back_whatever_its_kind(tmp_path):
    rows = [npy(np.array(row)) for row in ([1, 0, 1], [0, 0, 0], [0, 1, 0])]
    texts = [b"a cat\na grey cat\\nasleep", b"\n", "un café".encode()]
    class_folders(tmp_path / "c/test", {"cat": 2, "hen": 1})
    class_folders(tmp_path / "c/train", {"cat": 1, "hen": 3})
    benchmark_set(tmp_path / "m", "val", rows, suffix="npy", kind="multilabel")
    benchmark_set(tmp_path / "r", "test", texts, suffix="txt", kind="retrieval")
    for name, bad in (("c", {}), ("m/val", {}), ("r", {"no caption": 1})):
        task = load_task(f"{tmp_path}/{name}", templates="plain")
        assert write_benchmark_set(task, tmp_path / "out" / name, templates=["a {}"], samples_per_shard=2) == bad
        back = load_task(f"{tmp_path}/out/{name}", split=task.split)
        assert (back.kind, back.classes, back.split) == (task.kind, task.classes, task.split)
        for old, new in ((task, back), (task.train, back.train)):
            assert (old is None) == (new is None)
            if old is not None and new is not None:
                before = [sample for sample in old.images.read() if isinstance(sample, TaskSample)]
                assert [(s.image.tobytes(), *s[3:]) for s in before] == [(s.image.tobytes(), *s[3:]) for s in read(new)]
        with pytest.raises(ValueError, match=r"holds shards already; give another folder"):
            write_benchmark_set(task, tmp_path / "out" / name)
    with pytest.raises(ValueError, match="template 'a photo' holds neither"):
        write_benchmark_set(task, tmp_path / "x", templates=["a photo"])


def test_the_address_of_a_hub_page_becomes_that_of_its_files():
    page = "https://huggingface.co/datasets/someone/wds_birds/tree/main"
    assert find_benchmark_set(page) == ("https://huggingface.co/datasets/someone/wds_birds/resolve/main", None)


def test_samples_that_cannot_be_used_are_counted_by_cause(tmp_path):
    root = benchmark_set(tmp_path, "test", [b"0", b"one", b"1"])
    write_tar(root / "test/0.tar", [("a.png", picture(0)), ("a.cls", b"0"), ("b.png", picture(1)[:60]), ("b.cls", b"1"),
                                    ("c.png", picture(0)), ("c.cls", b"one"), ("d.png", picture(0)), ("e.cls", b"1"),
                                    ("f.png", b"<html>"), ("f.cls", b"1")])
    task = load_task(str(root))
    assert causes(task) == ["truncated image", "bad label", "no label", "no image", "not an image"]
    good = [sample.labels for sample in task.images.read() if isinstance(sample, TaskSample)]
    assert empty_classes(task, good) == (f"2 of 3 classes of {root} have no picture (red fox, hen): they are possible "
                                         "answers, and no part of the means over classes")
    assert empty_classes(task, [(0, 1), (2,)]) == ""


def test_a_set_that_contradicts_itself_is_refused_in_one_line(tmp_path, server):
    root = benchmark_set(tmp_path / "set", "test", [b"0", b"3"])
    with pytest.raises(ValueError, match=r"label 3 of sample s0000001 .* outside the 3 classes of classnames.txt \(0 to 2\)"):
        list(load_task(str(root)).images.read())
    multi = benchmark_set(tmp_path / "multi", "test", [npy(np.ones(4))], suffix="npy", kind="multilabel")
    with pytest.raises(ValueError, match=r"labels for 4 classes, but classnames.txt names 3; the two must agree"):
        list(load_task(str(multi)).images.read())
    for text, message in (("2", r"says 2 tars \(0.tar to 1.tar\), but there is 0.tar"), ("two", "must be the number of tars"),
                          ("0", "says 0 tars")):
        (root / "test/nshards.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_task(str(root))
    (root / "test/nshards.txt").write_text("2")
    with pytest.raises(ValueError, match=r"nshards.txt says 2 tars .* none of them"):
        load_task(f"{server}/set")
    (root / "test/nshards.txt").write_text("1")
    for name, message in (("cat\n\nhen\n", "class 1 of .*classnames.txt .* has an empty name"),
                          ("cat\ncat\nhen\nhen", r"2 class names .* more than once \('cat' 2 times, 'hen' 2 times\), .*merge"),
                          ("\n", "classnames.txt is missing or empty")):
        (root / "classnames.txt").write_text(name)
        with pytest.raises(ValueError, match=message):
            load_task(str(root))
    (root / "classnames.txt").write_text("cat\nhen\n")
    (root / "dataset_type.txt").write_text("captioning")
    with pytest.raises(ValueError, match="says 'captioning'; it can say classification, multilabel, retrieval"):
        load_task(str(root))
