"""Checkpoints in an object store: a run whose disk is lost goes on from there, and a store that fails stops nothing."""

import json
import shutil

import fsspec
import pytest

from clipkit.training.checkpoint_folders import step_folders
from clipkit.training.mirror import copy_in, copy_out
from tests.test_checkpoint import flip_byte, save_tiny
from tests.test_pretrain import SMALL, assert_bit_equal, only_last, weights


@pytest.fixture
def store():
    """The URL of a place in a store of this process's memory."""
    filesystem = fsspec.filesystem("memory")
    yield "memory://bucket/runs"
    filesystem.rm("/bucket", recursive=True)


def names(url: str) -> list[str]:
    filesystem, place = fsspec.url_to_fs(url)
    return sorted(path.rpartition("/")[2] for path in filesystem.ls(f"{place}/one/checkpoints", detail=False))


def test_a_checkpoint_comes_back_whole_and_old_ones_go(store, tmp_path):
    here, there = tmp_path / "here" / "one", tmp_path / "there" / "one"
    for step in (10, 20, 30):
        folder = save_tiny(here, step)
        (here / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        copy_out(here, store)
        if step == 20:
            shutil.rmtree(here / "checkpoints" / "step-00000010")
    assert names(store) == ["step-00000020", "step-00000030"]
    copy_in(there, store, pytest.fail)
    assert [step for step, _ in step_folders(there)] == [30]
    assert {path.name: path.read_bytes() for path in (there / "checkpoints" / folder.name).iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()}
    assert (there / "metrics.jsonl").read_text() == '{"step": 30}\n'
    save_tiny(there, 40)
    copy_in(there, store, pytest.fail)  # what is on disk is newer
    assert [step for step, _ in step_folders(there)] == [40, 30]


def test_damage_in_the_store_is_told_and_an_older_checkpoint_is_taken(store, tmp_path):
    here, there = tmp_path / "here" / "one", tmp_path / "there" / "one"
    for step in (10, 20, 30):
        flip = save_tiny(here, step) / "model.safetensors"
        if step > 10:
            flip_byte(flip)
        copy_out(here, store)
    fsspec.filesystem("memory").rm_file("/bucket/runs/one/checkpoints/step-00000030/manifest.json")  # a copy that broke off
    told = []
    copy_in(there, store, told.append)
    assert [step for step, _ in step_folders(there)] == [10]
    assert len(told) == 1 and "step-00000020 in memory://bucket/runs is damaged (model.safetensors has another" in told[0]
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["step-00000010"]


def test_names_that_lead_out_of_the_folder_are_passed_over(tmp_path, monkeypatch):
    save_tiny(tmp_path / "one", 10)
    url = f"file://{tmp_path}/store"
    copy_out(tmp_path / "one", url)
    evil = tmp_path / "store" / "one" / "checkpoints" / "step-00000010" / ".bashrc"
    evil.write_text("x")
    copy_in(tmp_path / "there" / "one", url, pytest.fail)
    assert not (tmp_path / "there" / "one" / "checkpoints" / "step-00000010" / ".bashrc").exists()


def test_a_run_whose_disk_is_lost_goes_on_from_the_store_to_the_same_bits(shards, store, tmp_path, monkeypatch, capsys):
    from clipkit.commands.pretrain import pretrain
    from tests.conftest import settings

    monkeypatch.chdir(tmp_path)

    def run(name: str, *more: str) -> None:
        given = only_last((*SMALL, f"data.train={shards}", f"name={name}", "checkpoint.every_steps=4", *more))
        assert pretrain(settings(*given)) is None

    run("whole")
    run("one", f"checkpoint.mirror={store}")
    shutil.rmtree("runs/one")
    fsspec.filesystem("memory").rm("/bucket/runs/one/checkpoints/step-00000012", recursive=True)  # lost before its last steps
    run("one", f"checkpoint.mirror={store}")
    assert "goes on   at step 8" in capsys.readouterr().out
    assert_bit_equal(weights(tmp_path / "runs" / "one"), weights(tmp_path / "runs" / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "runs" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


def test_a_store_that_fails_is_told_and_training_goes_on(shards, tmp_path, monkeypatch, capsys):
    from clipkit.commands.pretrain import pretrain
    from tests.conftest import settings

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    given = only_last((*SMALL, f"data.train={shards}", "train.samples=32", f"checkpoint.mirror=file://{tmp_path}/file"))
    assert pretrain(settings(*given)) is None
    shown = capsys.readouterr().out
    assert "warning: the newest checkpoint is not copied to file://" in shown and "the next one is tried again" in shown
    with pytest.raises(OSError, match=r"checkpoint.mirror is nosuch://x, and cannot be read \(ValueError: .*mirror=null"):
        copy_in(tmp_path / "one", "nosuch://x", pytest.fail)
