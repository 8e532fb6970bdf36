"""Five faults of the campaign, one of each of five kinds; and a disk that is full when the model folder is renewed."""

import errno
import json
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from clipkit.model.folder import save_model_folder
from scripts.faults.kinds import KINDS
from scripts.faults.page import table

QUICK = ("SIGKILL of a rank", "SIGTERM", "SIGKILL of a loader worker", "checkpoint damaged", "NaN in one batch")


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign adopts orphans as Linux lets it")
def test_faults_of_five_kinds_end_with_the_same_bits():
    command = [sys.executable, "-W", "ignore", "-m", "scripts.faults", "--num", "1", "--seed", "7"]
    for kind in QUICK:
        command += ["--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| **all** | 5 | 5 | 0 | 0 |" in done.stdout


def test_the_table_counts_outcomes_by_kind():
    rows = [{"kind": "b", "outcome": "equal", "seconds": 2.0}, {"kind": "b", "outcome": "clear error", "seconds": 4.0},
            {"kind": "a", "outcome": "failed", "seconds": 9.0}]
    assert table(json.loads(json.dumps(rows))).splitlines()[2:] == [
        "| a | 1 | 0 | 0 | 1 | 9.0 | 9.0 |", "| b | 2 | 1 | 1 | 0 | 3.0 | 4.0 |", "| **all** | 3 | 1 | 1 | 1 | 4.0 | 9.0 |"]


def test_a_whole_campaign_has_two_hundred_faults():
    assert sum(kind.number for kind in KINDS.values()) >= 200


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync"])
def test_a_full_disk_spares_the_model_folder_and_is_one_line(where, tiny_model, tmp_path, monkeypatch):
    save_model_folder(tiny_model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*_arguments, **_named):
        if where == "os.fsync":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match=r"^cannot write .*open_clip_model.safetensors: the disk is full") as caught:
        save_model_folder(tiny_model, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
