"""The same settings give the same losses on any number of processes and workers, also when killed and resumed."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "one_curve.py"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_one_curve_on_any_hardware(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("one_curve", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    curves = {label: script.run(tmp_path, label, hardware) for label, hardware in script.RUNS.items()}
    wanted = curves["1 process, 0 workers"]
    assert wanted[-1] < wanted[0] - 0.3  # the run learns
    for label, found in curves.items():
        assert script.largest_difference(found, wanted) <= script.TOLERANCE, label
