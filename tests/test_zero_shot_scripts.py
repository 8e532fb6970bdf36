"""scripts/zero_shot_suite.py and scripts/reproduce_openai.py, with tiny stand-ins for models and sets."""

import importlib
from pathlib import Path

import pandas as pd
import pytest

from clipkit.config.suite import SuiteTaskConfig
from clipkit.model.build import build_model
from clipkit.model.folder import save_model_folder
from tests.conftest import TINY
from tests.hub_server import HubServer
from tests.test_hub import hub
from tests.test_pretrained import tiny_name
from tests.test_tasks import benchmark_set, class_folders

__all__ = ["hub", "tiny_name"]  # the fixtures
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call a script's main() with arguments."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> int:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        return importlib.import_module(name).main()

    return call


def test_many_models_on_a_suite_make_one_table_and_what_is_done_is_skipped(run, hub: HubServer, tiny_name, tmp_path,
                                                                          monkeypatch, capsys):
    save_model_folder(build_model(config=TINY), tmp_path / "run")
    hub.add("datasets", "someone/wds_birds", benchmark_set(tmp_path / "birds", "test", [b"2", b"0", b"1", b"1", b"0"]))
    class_folders(tmp_path / "pets", {"cat": 3, "hen": 2})
    (tmp_path / "two.yaml").write_text("name: two\ntasks:\n  - {name: Pets, task: pets, metric: acc1, n: 5}\n"
                                       "  - {name: Birds, task: 'hf://someone/wds_birds', metric: mean_per_class_recall}\n")
    command = ("zero_shot_suite", "--models", "Tiny/openai", "run", "--suite", "two.yaml", "--out", "out", "--cache-dir", "c")
    assert run(*command) == 0
    table = pd.read_csv("out/leaderboard.csv")
    assert table["name"].tolist() == ["Tiny", "run"] and table["pretrained"].tolist()[0] == "openai"
    assert table["average"].tolist() == pytest.approx(((table["Pets"] + table["Birds"]) / 2).tolist())
    assert "two: average" in capsys.readouterr().out

    monkeypatch.setattr("clipkit.model.folder.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert run(*command) == 0
    assert "Tiny-openai: 2 of 2 tasks are done" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv("out/leaderboard.csv"), table)


def test_models_that_are_not_there_end_with_one_line(run, tmp_path, capsys):
    class_folders(tmp_path / "pets", {"cat": 1, "hen": 1})
    assert run("zero_shot_suite", "--models", "nowhere", "--tasks", "pets") == 2
    assert "zero_shot_suite: model 'nowhere' is no folder; give one, an open_clip name with" in capsys.readouterr().err
    assert run("reproduce_openai", "--models", "ViT-Z-1", "--sets", "mnist2") == 2
    assert "reproduce_openai: ViT-Z-1, mnist2: not in the published table; its models are RN50" in capsys.readouterr().err


def test_published_numbers_are_reproduced_or_the_gap_is_told(run, tiny_name, tmp_path, monkeypatch, capsys):
    from clipkit.evaluation import reference

    run_script = ("reproduce_openai", "--models", "Tiny", "--sets", "pets", "--out", "out")
    benchmark_set(tmp_path / "wds_pets", "test", [b"2", b"0", b"1", b"1", b"0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("reproduce_openai")
    monkeypatch.setattr(script, "MODELS", ("Tiny",))
    monkeypatch.setattr(script, "known_sets", lambda: {"pets": SuiteTaskConfig(name="Pets", task="wds_pets", metric="acc1")})
    for value in (0.99, None):  # None: what was measured
        found = pd.read_csv("out/Tiny-openai/results.csv").set_index("metric").loc["acc1", "value"] if value is None else value
        row = reference.Published("Tiny openai", "pets", "acc1", found, 50_000, 3)
        monkeypatch.setattr(reference, "read_table", lambda row=row: (row,))
        assert run(*run_script) == (1 if value else 0)
        said = capsys.readouterr().out
        assert ("0 of 1 numbers pass" in said and "n is 5 in the place of 50,000" in said) if value else ": PASS" in said


def test_known_sets_are_those_of_the_suite_with_published_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    known = importlib.import_module("reproduce_openai").known_sets()
    assert len(known) == 33 and known["mscoco_captions"].task == "hf://clip-benchmark/wds_mscoco_captions"


@pytest.mark.parametrize("name", ["zero_shot_suite", "reproduce_openai"])
def test_help_shows_the_expected_numbers(run, name, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    assert "Expected" in capsys.readouterr().out
