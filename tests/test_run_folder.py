"""The run folder: what it records, what it refuses, and its lock."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipkit.training import run_folder
from clipkit.training.environment import describe_environment
from clipkit.training.run_folder import check_run_name, open_run_folder

CONFIG = {"name": "emoji", "optim": {"lr": 0.001, "beta2": 1e-5}, "data": {"train": ("a.tar", "b.tar"), "workers": 2},
          "model": {"config": {"embed_dim": 128, "text_cfg": {"width": 64}}, "pretrained": None},
          "cache": Path("/tmp/x")}
IDENTITY = {"optim.lr": 0.001, "optim.beta2": 1e-5, "data.train": ("a.tar", "b.tar"),
            "model.config": {"embed_dim": 128, "text_cfg": {"width": 64}}, "model.pretrained": None}


def test_a_new_run_records_its_settings_and_what_it_ran_on(tmp_path):
    run = open_run_folder(tmp_path / "runs", "emoji", config=CONFIG, identity=IDENTITY)
    assert run.path == tmp_path / "runs" / "emoji"
    assert not run.resumed
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["optim"] == CONFIG["optim"]
    assert config["data"] == {"train": ["a.tar", "b.tar"], "workers": 2}
    environment = json.loads((run.path / "environment.json").read_text())
    assert {"git", "versions", "cpu", "cores", "gpus", "memory_gb"} <= environment.keys()
    assert {"python", "torch", "open_clip", "timm"} <= environment["versions"].keys()
    run.close()


def test_the_same_settings_open_the_run_again_and_runtime_settings_are_rewritten(tmp_path):
    open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY).close()
    changed = {**CONFIG, "data": {"train": ("a.tar", "b.tar"), "workers": 7}}
    run = open_run_folder(tmp_path, "emoji", config=changed, identity=IDENTITY)
    assert run.resumed
    assert yaml.safe_load((run.path / "config.yaml").read_text())["data"]["workers"] == 7
    run.close()


def test_a_setting_younger_than_the_run_may_be_one_that_changes_nothing(tmp_path):
    open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY).close()
    unused = {**IDENTITY, "model.lora_rank": None, "optim.frozen_norms": False, "optim.towards_start": 0}
    run = open_run_folder(tmp_path, "emoji", config=CONFIG, identity=unused)
    assert run.resumed
    run.close()
    with pytest.raises(ValueError, match=r"model\.lora_rank: run has no value, given 8"):
        open_run_folder(tmp_path, "emoji", config=CONFIG, identity={**unused, "model.lora_rank": 8})


def test_every_differing_identity_setting_is_listed_and_nothing_is_changed(tmp_path):
    run = open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)
    run.close()
    before = (run.path / "config.yaml").read_text()
    other = {**IDENTITY, "optim.lr": 0.002, "data.train": ("a.tar",), "loss.name": "clip",
             "model.config": {"embed_dim": 256, "vision_cfg": 1, "text_cfg": {"width": 64}}}
    with pytest.raises(ValueError, match="was started with other settings") as caught:
        open_run_folder(tmp_path, "emoji", config=CONFIG, identity=other)
    text = str(caught.value)
    for part in ("optim.lr: run has 0.001, given 0.002", 'data.train: run has ["a.tar", "b.tar"], given ["a.tar"]',
                 'loss.name: run has no value, given "clip"', "model.config.embed_dim: run has 128, given 256",
                 "model.config.vision_cfg: run has no value, given 1", "another name=... to start a new run"):
        assert part in text
    assert "beta2" not in text
    assert "text_cfg" not in text
    assert "\n" not in text
    assert (run.path / "config.yaml").read_text() == before
    open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY).close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "/abs", "../x", "a\nb", "a\0b", " a", "x" * 300])
def test_a_name_that_is_no_folder_name_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"name is .*; give a folder name without / or ") as caught:
        open_run_folder(tmp_path, name, config=CONFIG, identity=IDENTITY)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_unusual_but_good_names_pass():
    for name in ("emoji", "1e3", "lr=0.1,b={2}", "naïve run", "日本"):
        assert check_run_name(name) == name


def test_files_in_the_place_of_folders_are_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*runs/a: .*a file, not a folder; choose"):
        open_run_folder(tmp_path / "runs", "a", config=CONFIG, identity=IDENTITY)
    with pytest.raises(NotADirectoryError, match="runs is a file, and the run needs a folder there; choose another"):
        open_run_folder(tmp_path, "runs", config=CONFIG, identity=IDENTITY)


@pytest.mark.parametrize(("number", "cause"), [(errno.EROFS, "the file system is read-only"),
                                               (errno.EACCES, "no permission to write there"),
                                               (errno.ENOSPC, r"the disk is full \(.* GB free\)")])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written_is_one_line(call, number, cause, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(OSError, match=f"^cannot write .*emoji: {cause}; ") as caught:
            open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="no permission to write there"):
        open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(("text", "message"), [("a: [1", "is not readable as YAML"), ("", "holds no settings"),
                                               ("- 1", "holds no settings")])
def test_a_spoilt_config_is_named(text, message, tmp_path):
    run = open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)
    run.close()
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"config.yaml {message}.*put it right, or choose another name"):
        open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1] + "/.lock", "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write("process 4711 on laptop")
file.flush()
parent = os.getpid()
if os.fork() == 0:  # as a loader worker that outlives its parent
    os.close(1)
    while os.getppid() == parent:
        time.sleep(0.01)
    os.read(0, 1)  # until the test closes the pipe
    os._exit(0)
print("held", flush=True)
os.read(0, 1)
os.kill(os.getpid(), 9)
"""


def test_a_run_that_another_process_writes_is_refused_until_that_process_is_gone(tmp_path):
    open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY).close()
    process = subprocess.Popen([sys.executable, "-I", "-c", HOLDER, str(tmp_path / "emoji")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == "held\n"
        expected = f"process 4711 on laptop is writing the run {tmp_path / 'emoji'}; wait until it ends, stop it"
        with pytest.raises(ValueError, match=re.escape(expected)):
            open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)
        process.stdin.write("x")
        process.stdin.flush()
        process.wait(timeout=60)
        run = open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY)
    assert run.resumed
    assert run.lock is not None
    run.close()


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch):
    import fcntl

    def fail(*_args):
        raise OSError(errno.ENOLCK, "no locks")
    monkeypatch.setattr(fcntl, "lockf", fail)
    assert open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY).lock is None


def test_earlier_environments_are_kept_where_they_differ(tmp_path, monkeypatch):
    for host in ("a", "a", "b", "c"):
        monkeypatch.setattr(run_folder, "describe_environment", lambda host=host: {"host": host})
        open_run_folder(tmp_path, "emoji", config=CONFIG, identity=IDENTITY).close()
    record = json.loads((tmp_path / "emoji" / "environment.json").read_text())
    assert record == {"host": "c", "earlier": [{"host": "a"}, {"host": "b"}]}


def test_the_environment_is_described_without_importing_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # any import of it fails
    environment = describe_environment()
    assert environment["cpu"]
    assert environment["cores"] >= environment["cores_usable"] >= 1
    assert json.loads(json.dumps(environment)) == environment
