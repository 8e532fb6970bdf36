"""Published results: the table's numbers, which of them a run meets, and what is named where they differ."""

import math

import pytest

from clipkit.evaluation.reference import (
    Setup,
    find_column,
    likely_causes,
    main_values,
    published_setup,
    read_table,
    reference_lines,
    set_name,
    setup_of,
)
from clipkit.evaluation.results import Result
from clipkit.evaluation.tasks import Task
from clipkit.model.folder import load_model
from tests.test_pretrained import tiny_name

__all__ = ["tiny_name"]  # the fixture

OWN_PROMPTS = "80 templates of the set"
PUBLISHED = next(row for row in read_table() if (row.model, row.task) == ("ViT-B-32 openai", "imagenetv2"))


def a_task(name: str = "hf://djghosh/wds_imagenetv2_test", num_classes: int = 1000,
           kind: str = "zeroshot_classification") -> Task:
    return Task(name, "test", kind, images=None,  # pyright: ignore[reportArgumentType]
                classes=tuple(f"class {number}" for number in range(num_classes)))


def a_result(value: float, *, task: str = "hf://djghosh/wds_imagenetv2_test", prompts: str = OWN_PROMPTS, n: int = 10_000,
             metric: str = "acc1", kind: str = "zeroshot_classification") -> Result:
    return Result(task, "test", kind, metric, value, n, None, None, 1000, prompts, 0)


def no_config():
    raise AssertionError("asked for without a gap")


def test_the_table_holds_the_numbers_that_are_known_from_elsewhere():
    table = {(row.model, row.task, row.metric): row for row in read_table()}
    assert len(table) == len(read_table()) == 12 * 45
    known = {("RN50 openai", "imagenet1k", "acc1"): 0.5982, ("ViT-L-14-336 openai", "imagenet1k", "acc1"): 0.7656,
             ("ViT-B-16-SigLIP webli", "cifar100", "acc1"): 0.7223,
             ("ViT-B-32 openai", "mscoco_captions", "image_retrieval_recall@5"): 0.5594,
             ("ViT-L-14 datacomp_xl_s13b_b90k", "flickr30k", "text_retrieval_recall@1"): 0.8900}
    assert {key: table[key].value for key in known} == known
    assert all(0 <= row.value <= 1 and row.n > 0 for row in read_table())
    for model in {row.model for row in read_table()}:
        for task in ("flickr30k", "mscoco_captions"):
            both = [table[model, task, f"{way}_retrieval_recall@1"].value for way in ("image", "text")]
            assert table[model, task, "mean_recall@1"].value == pytest.approx(sum(both) / 2, abs=1.5e-4)  # each is rounded


def test_every_published_set_stands_in_the_suite_with_its_metric_and_size():
    from clipkit.evaluation.suites import measured_tasks, read_suite

    main = {}
    for row in read_table():
        main.setdefault(row.task, row)
    for one in measured_tasks(read_suite("datacomp38")):
        row = main.pop(set_name(str(one.task)))
        assert (row.metric, row.n) == (one.metric, one.n), one.name
    assert not main


def test_models_and_sets_are_found_by_any_of_their_names():
    assert find_column("ViT-B-32", "openai") == find_column("ViT-B-32-quickgelu", "OpenAI") == "ViT-B-32 openai"
    assert find_column("ViT-B-32", "laion2b-s34b-b79k") == "ViT-B-32 laion2b_s34b_b79k"
    assert find_column("ViT-B-32", "laion400m_e32") is None  # published with QuickGELU
    assert find_column("runs/emoji", None) is None and find_column("ViT-B-32", "weights.pt") is None
    names = ["hf://clip-benchmark/wds_vtab-cifar100", "hf://djghosh/wds_vtab-cifar100_test@main", "sets/wds_vtab-cifar100/",
             "sets/wds_vtab-cifar100/test", "https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar100"]
    assert {set_name(name) for name in names} == {"cifar100"}
    assert set_name("sets/cifar100") == set_name("emoji_val") == ""


def test_a_result_within_rounding_and_ties_passes():
    tolerance = 0.00005 + 0.22 / math.sqrt(10_000)
    for gap, passes in ((0.0, True), (tolerance - 1e-6, True), (-tolerance + 1e-6, True), (0.004, False)):
        lines = reference_lines("ViT-B-32", "openai", lambda: config_of(True), [a_task()], [a_result(PUBLISHED.value + gap)])
        assert len(lines) == 1 and lines[0].endswith(": PASS") == passes
    assert reference_lines("ViT-B-32", "openai", no_config, [a_task()], [a_result(0.5593)]) == [
        "ViT-B-32 openai on imagenetv2, acc1: 55.93%, published 55.92%: PASS"]


def test_where_nothing_is_published_nothing_is_said():
    result = a_result(0.1)
    assert reference_lines("runs/emoji", None, no_config, [a_task()], [result]) == []
    assert reference_lines("ViT-B-32", "openai", no_config, [a_task("emoji_val")], [a_result(0.1, task="emoji_val")]) == []
    probe = a_result(0.1, metric="lp_acc1", kind="linear_probe")
    assert reference_lines("ViT-B-32", "openai", no_config, [a_task()], [probe]) == []


def config_of(quick_gelu: bool) -> dict:
    import open_clip
    from open_clip.transform import PreprocessCfg

    return {"model_cfg": {**(open_clip.get_model_config("ViT-B-32") or {}), "quick_gelu": quick_gelu},
            "preprocess_cfg": {**vars(PreprocessCfg()), "size": (224, 224)}}


def test_of_several_prompt_rules_the_published_one_is_compared():
    results = [a_result(0.3, prompts="plain"), a_result(PUBLISHED.value)]
    assert reference_lines("ViT-B-32", "openai", no_config, [a_task()], results)[0].endswith("PASS")
    openai = [a_result(0.3, prompts="plain"), a_result(PUBLISHED.value, prompts="openai80")]  # ImageNet's own are these
    assert reference_lines("ViT-B-32", "openai", no_config, [a_task()], openai)[0].endswith("PASS")
    line = reference_lines("ViT-B-32", "openai", lambda: config_of(True), [a_task()], results[:1])[0]
    assert "a GAP of -25.92 points (up to 0.23 is rounding and ties): prompts are 'plain', the published ones" in line


def test_the_causes_are_those_that_differ_in_the_order_of_their_frequency():
    same = Setup(True, {"size": [224, 224], "interpolation": "bicubic"}, {"context_length": 77, "tokenizer_kwargs": None})
    task, row = a_task(num_classes=200), PUBLISHED._replace(num_classes=200)
    assert likely_causes(row, task, a_result(0.5), same, same) == []
    other = Setup(False, {"size": [336, 336], "interpolation": "bicubic"}, {"context_length": 64, "tokenizer_kwargs": None})
    causes = likely_causes(row._replace(num_classes=1000), task, a_result(0.5, prompts="plain", n=9_990), other, same)
    assert causes == ["prompts are 'plain', the published ones the set's own templates (templates=set)",
                      "200 classes in the place of 1000",
                      "the activation is GELU, the weights were trained with QuickGELU",
                      "n is 9,990 in the place of 10,000",
                      "preprocessing size is [336, 336], with the published weights [224, 224]",
                      "text context_length is 64, with the published weights 77"]
    lines = reference_lines("ViT-B-32", "openai", lambda: config_of(False), [a_task()], [a_result(0.5)])
    assert "1,000 of 1,000 class names are not OpenAI's; the activation is GELU, the weights were trained" in lines[0]


def test_a_gap_that_nothing_recorded_explains_says_so():
    import open_clip

    task = Task("sets/wds_imagenetv2", "test", "zeroshot_classification", images=None,  # pyright: ignore[reportArgumentType]
                classes=tuple(open_clip.IMAGENET_CLASSNAMES))
    result = a_result(0.5, task="sets/wds_imagenetv2")
    line = reference_lines("ViT-B-32", "openai", lambda: config_of(True), [task], [result])[0]
    assert line.endswith("nothing that is recorded here differs; compare pictures, class names and versions of the libraries")


def test_a_model_that_open_clip_names_has_the_published_setup(tiny_name):
    published = published_setup("Tiny", "openai")
    assert published.quick_gelu and published.preprocess["mean"] == [0.5, 0.5, 0.5] and published.preprocess["size"] == [32, 32]
    assert setup_of(load_model("Tiny", pretrained="openai").config) == published
    assert published_setup("ViT-B-16-SigLIP", "webli").preprocess["resize_mode"] == "squash"
    assert published_setup("ViT-B-16-SigLIP", "webli").text["tokenizer_kwargs"] == {"clean": "canonicalize"}


def test_the_published_main_values_of_a_suite_are_given():
    tasks = [a_task(), a_task("hf://clip-benchmark/wds_flickr30k", kind="zeroshot_retrieval"), a_task("emoji_val")]
    assert main_values("RN50", "openai", tasks) == {tasks[0].name: 0.5284, tasks[1].name: 0.6868}
    assert main_values("runs/emoji", None, tasks) == {}
