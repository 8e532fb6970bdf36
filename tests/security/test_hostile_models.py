"""Model folders, checkpoints, run names and hub names made to run code, to read or remove what is elsewhere, or to crash."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipkit.data.hub import fetch_model
from clipkit.model.folder import load_model, save_model_folder
from clipkit.model.weights_file import read_weights
from clipkit.training.checkpoint import DamagedCheckpointError, latest_good_checkpoint, load_checkpoint, save_checkpoint
from clipkit.training.checkpoint_folders import prune_checkpoints, remove_leftovers
from clipkit.training.manifest import find_damage, write_manifest
from clipkit.training.run_folder import check_run_name
from tests.conftest import TINY
from tests.security.conftest import Evil

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


@pytest.fixture
def folder(place, tiny_model) -> Path:
    save_model_folder(tiny_model, place / "model")
    return place / "model"


def refused(folder: Path | str, error: type[Exception] = ValueError) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(error) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_config(folder: Path, **parts) -> None:
    changed = {key: {**TINY.get(key, {}), **part} if isinstance(part, dict) else part for key, part in parts.items()}
    model_cfg = {**TINY, **changed}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))


def test_weights_that_are_code_are_refused_and_do_not_run(folder):
    (folder / WEIGHTS).unlink()
    for payload in (Evil(), {"state_dict": Evil()}, {"logit_scale": Evil()}):
        torch.save(payload, folder / "open_clip_pytorch_model.bin")
        assert "could run its code; convert it to safetensors" in refused(folder)
    torch.save([1, 2], folder / "open_clip_pytorch_model.bin")
    assert "is damaged" in refused(folder)
    assert not (folder.parents[1] / "evil").exists()


def test_weights_given_by_a_path_are_refused_alike(place):
    from clipkit.model.build import build_model

    torch.save({"logit_scale": Evil()}, place / "evil.pt")
    with pytest.raises(ValueError, match="could run its code"):
        build_model(config=TINY, image_weights=str(place / "evil.pt"))
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        build_model("ViT-S-32-alt", pretrained=str(place / "evil.pt"))
    assert "\n" not in str(caught.value)


def test_compressed_weights_are_refused_before_they_expand(place):
    torch.save({"a": torch.zeros(2**20)}, place / "plain.pt")
    with zipfile.ZipFile(place / "plain.pt") as plain, zipfile.ZipFile(place / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in plain.namelist():
            bomb.writestr(part, plain.read(part))
    assert (place / "bomb.pt").stat().st_size < 2**14
    with pytest.raises(ValueError, match="may expand to any size"):
        read_weights(place / "bomb.pt")


HEADERS = {
    "longer than the file": (2**40, {}), "of 100 MB": (101 * 2**20, {}), "negative": (2**64 - 1, {}), "empty": (0, {}),
    "offsets outside": (None, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}}),
    "offsets backwards": (None, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}),
    "a size of 2^60": (None, {"a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 16]}}),
    "overlap": (None, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                       "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "no json": (None, None),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_safetensors_header_that_lies_is_one_line(folder, kind, peak_megabytes):
    length, header = HEADERS[kind]
    text = b"[" * 10**5 if header is None else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(16))
    line, peak = peak_megabytes(lambda: refused(folder))
    assert "is damaged" in line and peak < 100


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "[" * 10**5, '{"model_cfg": []}', '{"model_cfg": {}}', "\udcff", "{}",
                                  '{"model_cfg": {"embed_dim": 1, "vision_cfg": 1, "text_cfg": {}}}', " " * (2**24 + 1)])
def test_a_configuration_that_is_none_is_one_line(folder, text):
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("parts", [
    {"vision_cfg": {"width": "32"}}, {"vision_cfg": {"width": 0}}, {"vision_cfg": {"width": -1}},
    {"vision_cfg": {"patch_size": 0}},
    {"text_cfg": {"vocab_size": 10**15}}, {"text_cfg": {"heads": 7}}, {"embed_dim": None}, {"embed_dim": "x"}, {"evil": 1},
    {"vision_cfg": {"timm_model_name": "hf-hub:evil/model"}}, {"vision_cfg": {"timm_model_name": "local-dir:../../evil"}},
    {"vision_cfg": {"timm_model_name": "../../evil"}}, {"text_cfg": {"hf_model_name": "../evil"}},
    {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}},
    {"text_cfg": {"tokenizer_kwargs": {"bpe_path": "/dev/zero"}}},
    {"text_cfg": {"tokenizer_kwargs": [1]}}, {"text_cfg": {"kind": "__import__('os')"}}, {"multimodal_cfg": {}},
], ids=str)
def test_a_configuration_of_values_that_build_no_model_is_one_line(folder, parts):
    write_config(folder, **parts)
    refused(folder)


def test_a_tokenizer_s_own_code_is_not_run(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}))
    (folder / "evil.py").write_text("import os\nos.mkdir('../evil')\n")
    for options in ({}, {"tokenizer_kwargs": {"trust_remote_code": True}}):
        for name in ("x", str(folder)):
            write_config(folder, text_cfg={"hf_tokenizer_name": name, **options})
            refused(folder)
    assert not (folder.parents[1] / "evil").exists()


def test_a_text_tower_s_own_code_is_not_run(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (folder / "evil.py").write_text("import os\nos.mkdir('../evil')\n")
    write_config(folder, text_cfg={"hf_model_name": "x"})
    assert "(auto_map), which is never run" in refused(folder)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, '{"model_type": "clip", "vision_config": 3}',
                                  '{"model_type": ["clip"]}',
                                  '{"model_type": "clip", "text_config": {"hidden_size": "x"}}',
                                  '{"model_type": "clip", "vision_config": {"num_attention_heads": 0}}'])
def test_a_transformers_configuration_of_wrong_values_is_one_line(place, text):
    (place / "config.json").write_text(text)
    for name in ("vocab.json", "tokenizer.json"):
        (place / name).write_text("{}")
    (place / "merges.txt").write_text("")
    assert str(place) in refused(place)


@pytest.mark.parametrize("name", ["hf-hub:../../etc", "hf-hub:../etc", "hf-hub:a/b@../../x", "hf-hub:a/..",
                                  "hf-hub:/etc/passwd", "hf-hub:a/b@", "hf-hub:a/b@x\0", "hf-hub:a/b@" + "x" * 5000,
                                  "hf-hub:", "hf-hub:a/b/../../c"])
def test_a_hub_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        fetch_model(name, (WEIGHTS,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "..", ".", "", " x", "x\0", "x\n", "\x1b[2J",
                                  "x" * 300, "\u202ex", "\udcff"])
def test_a_run_name_is_one_folder(name):
    with pytest.raises(ValueError, match=r"name is|surrogates not allowed"):
        check_run_name(name)


@pytest.fixture
def checkpoint(place) -> Path:
    return save_checkpoint(place / "run", step=1, model_state={"a": torch.zeros(2)})


def write_manifest_again(checkpoint: Path) -> None:
    """Give a changed checkpoint a manifest that agrees."""
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def test_a_manifest_names_no_file_outside(checkpoint, place):
    outside = place / "outside"
    outside.write_text("x")
    for name in ("../../../outside", str(outside), "a/../../x", "..", ".", ""):
        record = json.loads((checkpoint / "manifest.json").read_text())
        record["files"][name] = {"size": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
        (checkpoint / "manifest.json").write_text(json.dumps(record))
        expected = f"manifest.json lists {name!r}, which is no file of the folder"
        assert find_damage(checkpoint) in (expected, f"{name} is missing")
        write_manifest_again(checkpoint)
    assert outside.read_text() == "x"


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "{}", "null", '{"format": 1}', "\x00", '{"files": {"a": {"size": "x"}}}',
                                  '{"files": [1]}', '{"files": {"state.json": {"size": 1e400, "sha256": 1}}}'])
def test_a_manifest_or_state_that_is_none_is_one_line(checkpoint, text):
    (checkpoint / "state.json").write_text(text)
    write_manifest_again(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"state\.json is not readable") as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"):
        load_checkpoint(checkpoint)


def test_names_of_tensors_that_count_to_a_billion_cost_nothing(checkpoint):
    save_file({"rank999999999.cpu": torch.zeros(1)}, checkpoint / "random.safetensors")
    write_manifest_again(checkpoint)
    assert [list(one) for one in load_checkpoint(checkpoint).random_states] == [["cpu"]]


def test_damaged_tensors_under_a_manifest_that_agrees_are_one_line(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)
    write_manifest_again(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors is not readable"):
        load_checkpoint(checkpoint)


def test_links_in_a_run_folder_are_removed_and_not_what_they_lead_to(place, checkpoint):
    precious = place / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("x")
    checkpoints = checkpoint.parent
    for name in (".tmp-step-00000009", "damaged-step-00000002", "step-00000000"):
        (checkpoints / name).symlink_to(precious)
    remove_leftovers(checkpoints)
    prune_checkpoints(place / "run", keep=1)
    (checkpoints / "step-00000002").symlink_to(precious)
    assert latest_good_checkpoint(place / "run", lambda line: None) == checkpoint
    assert (precious / "thesis").read_text() == "x"
    save_checkpoint(place / "run", step=2, model_state={"a": torch.zeros(2)})
    assert [path.name for path in precious.iterdir()] == ["thesis"]


def test_a_link_in_the_place_of_an_unfinished_file_does_not_lead_the_writing_out(folder, tiny_model, place):
    from clipkit.training.atomic_files import write_text_atomically

    (place / "outside").write_text("x")
    for name in (WEIGHTS, "config.yaml"):
        (folder / f".tmp-{name}").symlink_to(place / "outside")
    write_text_atomically(folder / "config.yaml", "a: 1")
    save_model_folder(tiny_model, folder)
    assert (place / "outside").read_text() == "x"
    assert not (folder / WEIGHTS).is_symlink()
