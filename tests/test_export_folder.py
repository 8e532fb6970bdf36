"""An export's folder appears whole or not at all, and replaces nothing but an export that may be replaced."""

import errno
import os
from pathlib import Path

import pytest

import clipkit
from tests.test_export import make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_what_is_there_is_kept_unless_it_is_an_export_that_may_be_replaced(model, tmp_path, quick_format):
    out = tmp_path / "te"
    clipkit.export_text_encoder(model, out)
    (out / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"^out is .*te, which exists; give another folder, or overwrite=true"):
        clipkit.export_text_encoder(model, out)
    assert (out / "mine.txt").exists()
    clipkit.export_text_encoder(model, out, layer="penultimate", overwrite=True)
    assert not (out / "mine.txt").exists() and (out / "layer").read_text() == "penultimate"
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").write_text("")
    for taken in ("photos", "file"):
        with pytest.raises(ValueError, match=r"no folder that clipkit wrote .*clipkit_export.json.*give another folder$"):
            clipkit.export_text_encoder(model, tmp_path / taken, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"te", "photos", "file"}


@pytest.mark.parametrize(("number", "cause"), [(errno.EROFS, "the file system is read-only"),
                                               (errno.EACCES, "no permission to write there"),
                                               (errno.ENOSPC, r"the disk is full \(.* GB free\)")])
@pytest.mark.parametrize("where", ["mkdir", "fsync", "rename"])
def test_a_disk_that_fails_is_one_line_and_the_older_export_stays(where, number, cause, model, tmp_path, monkeypatch,
                                                                  quick_format):
    out = clipkit.export_text_encoder(model, tmp_path / "te")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    real, calls = getattr(Path, where, None), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if where == "rename" and len(calls) != 2:  # the older export is out of the way by then, and has to come back
            return real(*arguments, **options)
        raise OSError(number, "failed")

    monkeypatch.setattr(os if where == "fsync" else Path, where, fail)
    with pytest.raises(OSError, match=f"^cannot write .*te: {cause}") as error:
        clipkit.export_text_encoder(model, out, overwrite=True)
    assert "\n" not in str(error.value) and error.value.errno == number
    assert [path.name for path in tmp_path.iterdir()] == ["te"]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_write_that_really_fails_half_way_leaves_nothing_behind(model, tmp_path):
    import resource
    import signal

    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"^cannot write .*te: the file is too large for this disk or process limit"):
            clipkit.export_text_encoder(model, tmp_path / "te")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())
