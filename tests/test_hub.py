"""Sets and models on the hub: fetched once, resumed where broken off, pinned, and told in one line where they are not."""

import shutil
from pathlib import Path

import pytest
import torch

from clipkit.data.hub import fetch_set, find_hub_set, go_offline
from clipkit.evaluation.tasks import CLASSIFICATION, load_task
from clipkit.model.folder import load_model, save_model_folder
from tests.hub_server import HubServer, hub_server
from tests.test_tasks import benchmark_set, read

BIRDS = "hf://someone/wds_birds_test"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub, with an empty cache."""
    from huggingface_hub import constants

    with hub_server() as server:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # put back afterwards, as the next ones
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def birds(hub: HubServer, tmp_path: Path) -> Path:
    """A published set with two test tars and a train split."""
    root = benchmark_set(tmp_path / "birds", "test", [b"2", b"0", b"1", b"1", b"0"])
    benchmark_set(root, "train", [b"1"] * 5)
    hub.add("datasets", "someone/wds_birds_test", root)
    return root


def labels(task) -> list[int]:
    return [sample.label for sample in read(task)]


def test_a_set_is_fetched_once_and_then_read_from_the_cache(hub, birds):
    task = load_task(BIRDS)
    assert (task.kind, task.classes, task.commit) == (CLASSIFICATION, ("cat", "red fox", "hen"),
                                                      hub.commits["datasets", "someone/wds_birds_test"])
    assert labels(task) == [2, 0, 1, 1, 0] and task.train is None
    assert set(hub.downloads) == {"0.tar", "1.tar", "classnames.txt", "nshards.txt", "zeroshot_classification_templates.txt"}
    assert len([name for name in hub.downloads if name.endswith(".tar")]) == 2
    hub.requests.clear()
    again = load_task("hf://datasets/someone/wds_birds_test@main")
    assert labels(again) == labels(task) and again.images.fingerprint == task.images.fingerprint
    assert hub.downloads == [] and len(hub.requests) <= 2  # which commit main is


def test_the_train_split_is_fetched_where_asked_for(hub, birds):
    task = load_task(BIRDS, fetch_train=True)
    assert task.train is not None and labels(task.train) == [1] * 5
    assert len([name for name in hub.downloads if name.endswith(".tar")]) == 4


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, birds, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut_once["test/0.tar"] = 3000
    assert labels(load_task(BIRDS)) == [2, 0, 1, 1, 0]
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith("test/0.tar")]
    assert ranges == [None, "bytes=3000-"]


def test_offline_takes_the_cache_and_names_what_it_lacks(hub, birds):
    task = load_task(BIRDS)
    hub.requests.clear()
    go_offline()
    assert labels(load_task(BIRDS)) == labels(task) and load_task(BIRDS).commit == task.commit
    (Path(task.images.shards[1])).unlink()
    with pytest.raises(FileNotFoundError, match=r"^offline, and the cache .* lacks test/1.tar of hf://someone/wds_birds_test; "
                                                "fetch it once without offline=true"):
        load_task(BIRDS)
    with pytest.raises(FileNotFoundError, match=r"lacks train/0.tar, train/1.tar"):
        load_task(BIRDS, split="train")
    with pytest.raises(FileNotFoundError, match=r"lacks test/nshards.txt of hf://someone/other"):
        load_task("hf://someone/other")
    assert hub.requests == []


def test_a_revision_is_a_fixed_state_of_a_set(hub, birds, tmp_path):
    first = hub.commits["datasets", "someone/wds_birds_test"]
    shutil.rmtree(birds / "test")
    benchmark_set(birds, "test", [b"0", b"0"])
    second = hub.add("datasets", "someone/wds_birds_test", birds)
    assert labels(load_task(f"{BIRDS}@{first}")) == [2, 0, 1, 1, 0]
    newest = load_task(BIRDS)
    assert labels(newest) == [0, 0] and newest.commit == second != first
    with pytest.raises(FileNotFoundError, match="dataset someone/wds_birds_test has no revision 'v9' on http"):
        load_task(f"{BIRDS}@v9")


def test_what_is_not_on_the_hub_is_told_in_one_line(hub, birds):
    with pytest.raises(FileNotFoundError, match=r"there is no dataset someone/wds_fish on http.*, or it is private; check the"):
        load_task("hf://someone/wds_fish")
    with pytest.raises(FileNotFoundError, match=r"no val/nshards.txt; its splits .* are: test, train; name one with split="):
        load_task(BIRDS, split="val")
    with pytest.raises(ValueError, match="a set on the hub is hf://<user>/<dataset>"):
        load_task("hf://someone")
    assert find_hub_set("hf://datasets/someone/shards/a.tar") is None  # fsspec's


def test_a_set_behind_terms_and_any_other_trouble_are_told_in_one_line(hub, birds, monkeypatch):
    hub.gated.add("someone/wds_birds_test")
    with pytest.raises(FileNotFoundError, match=f"^{BIRDS} is gated: accept its terms on http://.* in a browser, then log in"):
        load_task(BIRDS)

    def trouble(*_, **__):
        raise RuntimeError("it broke\nhere and there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", trouble)
    with pytest.raises(FileNotFoundError, match=f"^{BIRDS} cannot be fetched from http:.*: RuntimeError: it broke; try again"):
        load_task(BIRDS)


def test_without_a_connection_the_cache_does_or_the_reason_is_told(hub, birds, monkeypatch, free_port):
    from huggingface_hub import constants

    task = load_task(BIRDS)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port}")
    assert labels(load_task(BIRDS)) == labels(task)
    with pytest.raises(FileNotFoundError, match=f"hf://someone/wds_fish cannot be fetched: http://127.0.0.1:{free_port} cannot "
                                                "be reached, and the cache .* does not hold it whole; check the connection"):
        load_task("hf://someone/wds_fish")


def test_a_set_without_the_layout_is_told(hub, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "data.parquet").write_bytes(b"x")
    hub.add("datasets", "someone/plain", tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"has no test/nshards.txt; its splits .* are: none"):
        load_task("hf://someone/plain")


def test_a_model_is_fetched_with_one_set_of_weights(hub, tiny_model, tmp_path):
    save_model_folder(tiny_model, tmp_path / "tiny")
    weights = tmp_path / "tiny" / "open_clip_model.safetensors"
    torch.save(tiny_model.towers.state_dict(), tmp_path / "tiny" / "open_clip_pytorch_model.bin")
    (tmp_path / "tiny" / "onnx").mkdir()
    (tmp_path / "tiny" / "onnx" / "config.json").write_text("{}")
    first = hub.add("models", "org/tiny", tmp_path / "tiny")
    model = load_model("hf-hub:org/tiny")
    assert sorted(hub.downloads) == ["open_clip_config.json", "open_clip_model.safetensors"]
    for name, tensor in tiny_model.towers.state_dict().items():
        assert torch.equal(model.towers.state_dict()[name], tensor)
    weights.unlink()
    hub.add("models", "org/tiny", tmp_path / "tiny")
    hub.requests.clear()
    older = load_model("hf-hub:org/tiny")
    assert hub.downloads == ["open_clip_pytorch_model.bin"]  # the other file is that of the first commit
    assert all(map(torch.equal, older.towers.state_dict().values(), model.towers.state_dict().values()))
    go_offline()
    assert load_model(f"hf-hub:org/tiny@{first}").source_sha256 == model.source_sha256
    with pytest.raises(FileNotFoundError, match=r"lacks open_clip_model.safetensors of hf-hub:org/other"):
        load_model("hf-hub:org/other")


def test_models_that_cannot_be_fetched_are_told(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    hub.add("models", "org/empty", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"hf-hub:org/empty has no weights that are read here \(open_clip_model"):
        load_model("hf-hub:org/empty")
    with pytest.raises(FileNotFoundError, match="there is no model org/none"):
        load_model("hf-hub:org/none")
    with pytest.raises(ValueError, match="a model on the hub is hf-hub:<org>/<name>"):
        load_model("hf-hub:ViT-B-32")
    with pytest.raises(ValueError, match="the model hf-hub:org/empty has its own weights; leave pretrained out"):
        load_model("hf-hub:org/empty", pretrained="openai")


def test_weights_in_parts_are_fetched_by_their_index(hub, tmp_path):
    from clipkit.data.hub import fetch_model

    folder = tmp_path / "parts"
    folder.mkdir()
    index = "model.safetensors.index.json"
    (folder / index).write_text('{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}')
    for number in (1, 2, 3):
        (folder / f"m-{number}.safetensors").write_bytes(bytes([number]))
    hub.add("models", "org/parts", folder)
    fetched = fetch_model("hf-hub:org/parts", ("model.safetensors", index)).folder
    assert sorted(path.name for path in fetched.iterdir()) == ["m-1.safetensors", "m-2.safetensors", index]
    go_offline()
    assert fetch_model("hf-hub:org/parts", ("model.safetensors", index)).folder == fetched
    (fetched / "m-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks m-2.safetensors"):
        fetch_model("hf-hub:org/parts", ("model.safetensors", index))


def fetch_as_one_of_two(rank: int, port: int, url: str, cache: str) -> None:
    import os

    from huggingface_hub import constants

    from clipkit.training.distributed import start_process, stop_process

    constants.HF_HUB_OFFLINE, constants.ENDPOINT, constants.HF_HUB_CACHE = False, url, cache
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    start_process("cpu", 60)
    birds, fish = find_hub_set(BIRDS), find_hub_set("hf://someone/fish")
    assert birds is not None and fish is not None
    assert (fetch_set(birds).folder / "test" / "1.tar").is_file()
    with pytest.raises(FileNotFoundError, match="there is no dataset someone/fish"):
        fetch_set(fish)  # on both
    stop_process()


@pytest.mark.multiprocess
def test_one_process_fetches_for_all_of_its_machine(hub, birds, tmp_path, free_port):
    torch.multiprocessing.spawn(fetch_as_one_of_two, (free_port, hub.url, str(tmp_path / "cache")), nprocs=2)
    assert sorted(name for name in hub.downloads if name.endswith(".tar")) == ["0.tar", "1.tar"]
    assert sum("fish" in path for _, path, _ in hub.requests) == 1
