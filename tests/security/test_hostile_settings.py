"""Settings of others: files that name code, grow without bound or set Hydra itself, and what a command line may not do."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from clipkit.config import PretrainConfig
from clipkit.config.launch import launch
from clipkit.config.settings_files import MAX_FILE_BYTES, check_settings_file
from clipkit.config.visible import visible

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True))


@pytest.fixture
def answer(monkeypatch, capsys):
    """The one line with which `clipkit pretrain` refuses some arguments."""
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["clipkit"])
        monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda self, config_name, overrides: None)
        with pytest.raises(SystemExit) as caught:
            launch("pretrain", PretrainConfig, lambda config: 9, arguments)
        GlobalHydra.instance().clear()
        line = capsys.readouterr().err
        assert caught.value.code == 2 and line.count("\n") == 1, line
        return line

    return call


def write(place, text: str) -> tuple[str, str]:
    """A folder of settings with one experiment; the arguments that choose it."""
    (place / "conf" / "experiment").mkdir(parents=True)
    (place / "conf" / "experiment" / "evil.yaml").write_text(text)
    return "--config-dir", str(place / "conf")


@pytest.mark.parametrize(("text", "message"), [
    ("name: !!python/object/apply:os.mkdir ['../evil']", "has the YAML tag !!python/object/apply:os.mkdir"),
    ("name: !!python/name:os.mkdir", "has the YAML tag !!python/name:os.mkdir"),
    ("# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: os.mkdir, path: ../evil}", "names code to run"),
    ("model: {_target_: os.mkdir, path: ../evil}", "names code to run"),
    ("# @package _global_\nhydra:\n  job: {env_set: {LD_PRELOAD: ../evil}}", "sets Hydra itself"),
    ("# @package hydra.job\nenv_set: {LD_PRELOAD: ../evil}", "sets Hydra itself"),
    ("defaults:\n  - model@hydra.job: tiny", "sets Hydra itself"),
    (LAUGHS, "with its aliases written out"), ("a: &a [*a, *a]", "with its aliases written out"),
    ("[" * 1500, "not readable as YAML"), ("a: " + "x" * MAX_FILE_BYTES, "no file of settings"),
    ("a: b: c", "not readable as YAML"), ("\x1b", "not readable as YAML"), ("a: !evil 1", "has the YAML tag !evil"),
], ids=range(14))
def test_a_file_of_settings_that_is_more_than_values_is_refused(place, answer, text, message):
    line = answer(*write(place, text), "experiment=evil")
    assert message in line


def test_a_suite_from_a_file_is_checked_alike(place):
    from clipkit.evaluation.suites import read_suite

    (place / "evil.yaml").write_text(LAUGHS)
    with pytest.raises(ValueError, match="aliases written out"):
        read_suite(place / "evil.yaml")


@pytest.mark.parametrize("argument", [
    "hydra.run.dir=../evil", "hydra.output_subdir=../evil", "hydra.callbacks.x._target_=os.mkdir", "hydra.job.env_set.A=1",
    "+hydra.callbacks={x: {_target_: os.mkdir}}", "hydra.launcher._target_=os.mkdir", "hydra/callbacks=evil",
    "hydra.searchpath=[.]",
    "hydra.sweeper={_target_: os.mkdir}", "hydra/job_logging=../evil", "_target_=os.mkdir", "model._target_=os.mkdir",
])
def test_hydra_s_own_parts_that_write_or_run_are_closed(answer, place, argument):
    answer(argument)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("argument", "key"), [
    ("name=${oc.env:HOME}", "name"), ("runs_dir=${oc.decode:'1'}", "runs_dir"), ("name=${hydra:runtime.cwd}", "name"),
    ("name=$(touch ../evil)", "name"), ("name=`touch ../evil`", "name"), ("name=!!python/name:os.mkdir", "name"),
])
def test_texts_on_the_command_line_stay_texts(monkeypatch, argument, key):
    monkeypatch.setattr(sys, "argv", ["clipkit"])
    found = []
    launch("pretrain", PretrainConfig, lambda config: found.append(getattr(config, key)), [argument])
    GlobalHydra.instance().clear()
    assert found == [argument.partition("=")[2]]


def test_a_file_of_plain_values_passes(place):
    for text in ("", "# nothing\n", "optim:\n  lr: 1e-3\nname: ${oc.env:USER}\n", "a: &a [1, 2]\nb: *a\n",
                 "prompt: a hydra in a pond\n"):
        (place / "good.yaml").write_text(text)
        check_settings_file(place / "good.yaml")


@pytest.mark.parametrize(("text", "shown"), [
    ("plain é 猫", "plain é 猫"), ("a\nb", "a\nb"), ("\x1b[2J\r\a", "\\x1b[2J\\r\\x07"),
    ("\u202e\u2028\udcff", "\\u202e\\u2028\\udcff"),
])
def test_control_characters_are_written_as_escapes(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10**5, b"{'a'", b"[]", b'{"cat": {"a": 1}}'])
def test_a_file_of_prompts_that_is_none_is_one_line(place, content):
    from clipkit.evaluation.prompt_rules import _from_file

    (place / "prompts.json").write_bytes(content)
    with pytest.raises(ValueError, match="templates file") as caught:
        _from_file(["cat"], place / "prompts.json")
    assert "\n" not in str(caught.value)
