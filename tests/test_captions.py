"""Labels become captions: by their names, and in templates."""

import random

import pytest

from clipkit.data.captions import with_captions
from clipkit.data.samples import SampleError, choose_caption, read_fields
from clipkit.data.tars import RawSample
from tests.conftest import settings


def data(*given: str):
    return with_captions(settings("data.train=x.tar", "name=x", *given).data)


def sample(**members: bytes) -> RawSample:
    return RawSample("0", "x.tar", b"", "png", members.get("text"), members.get("json"), members.get("label"))


def test_a_set_of_templates_is_filled_as_zero_shot_fills_it():
    from clipkit.evaluation.prompt_rules import prompt_rules

    found = data("data.templates=[openai80]", "data.class_names=[cat,red fox]")
    fields = read_fields(sample(label=b"1"), found.class_names)
    drawn = {choose_caption(None, fields, found.caption_fields, None, random.Random(seed)) for seed in range(2000)}
    assert drawn == set(prompt_rules(["red fox"], "openai80")["openai80"][0])


def test_files_and_texts_are_templates_and_each_field_is_put_into_each(tmp_path):
    (tmp_path / "mine.txt").write_text("a scan of {c}\na {} seen from above\n\n", encoding="utf-8")
    found = data(f"data.templates=[{tmp_path}/mine.txt,just {{}}]", "data.caption_fields=[label,breed]",
                 "data.caption_weights=[2,1]")
    assert found.caption_fields == ("a scan of {label}", "a {label} seen from above", "just {label}", "a scan of {breed}",
                                    "a {breed} seen from above", "just {breed}")
    assert found.caption_weights == (2, 2, 2, 1, 1, 1) and found.templates is None


def test_names_are_read_from_a_file_and_stand_in_the_field_label(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\nred fox\n", encoding="utf-8")
    names = data(f"data.class_names={tmp_path}/classnames.txt").class_names
    assert names == ("cat", "red fox")
    assert read_fields(sample(label=b"1\n", json=b'{"place": "zoo"}'), names) == {"place": "zoo", "label": "red fox"}
    assert read_fields(sample(json=b'{"label": "own"}', label=b"1"), None) == {"label": "own"}  # no names given
    assert read_fields(sample(text=b"a caption", label=b"1"), None) == {}


def test_the_recipe_for_labels_is_fine_tuning_with_templates_and_a_judge():
    found = settings("experiment=finetune_labels", "model.start=runs/a", "data.train=x.tar", "name=x")
    assert found.optim.layer_decay == 0.8 and found.train.patience == 3 and found.train.validation_fraction == 0.1
    captions = with_captions(found.data).caption_fields
    assert captions is not None and len(captions) == 80 and "a photo of a {label}." in captions


@pytest.mark.parametrize("label", [b"2", b"-1", b"cat", b""])
def test_a_number_that_is_no_class_is_a_bad_sample(label):
    with pytest.raises(SampleError) as caught:
        read_fields(sample(label=label), ("cat", "dog"))
    assert caught.value.cause == "unknown class" and "2 names, of the numbers 0 to 1" in caught.value.detail


def test_a_label_without_names_says_what_to_give():
    with pytest.raises(SampleError) as caught:
        read_fields(sample(label=b"3"), None)
    assert caught.value.cause == "label without a name" and "give data.class_names" in caught.value.detail


@pytest.mark.parametrize(("content", "given", "message"), [
    ("a photo", "data.templates=[FILE]", r"data\.templates has 'a photo', which must hold \{\} once"),
    ("", "data.templates=[FILE]", "is empty; give one entry a line"),
    (None, "data.class_names=FILE", r"there is no .*mine\.txt .*; give a \.txt file with one entry a line"),
    ("x", "data.templates=[{} or {}]", r"'\{\} or \{\}', which must hold \{\} once"),
])
def test_what_cannot_be_used_is_answered_in_one_line(tmp_path, content, given, message):
    if content is not None:
        (tmp_path / "mine.txt").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        data(given.replace("FILE", f"{tmp_path}/mine.txt"))
    assert "\n" not in str(caught.value)


def test_labelled_shards_without_names_end_a_run_with_that_line(tmp_path, monkeypatch):
    import io

    from PIL import Image

    from clipkit.commands.pretrain import pretrain
    from tests.conftest import write_tar

    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    shard = write_tar(tmp_path / "0.tar", [(f"{n:04d}.{suffix}", content) for n in range(200)
                                           for suffix, content in (("png", file.getvalue()), ("cls", b"0"))])
    with pytest.raises(ValueError, match=r"200 label without a name|label without a name.*give data\.class_names"):
        pretrain(settings(f"data.train={shard}", "name=x", "model=tiny", "train.global_batch_size=16", "train.samples=160",
                          "train.epochs=null", "data.workers=0", "log.to=[]", "device=cpu", "evaluation.tasks=[]"))
