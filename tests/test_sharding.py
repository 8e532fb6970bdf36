"""Weights shared out over processes give the training of one, and their checkpoints are read by any number of processes."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

from clipkit.model.image_text import ImageTextModel
from clipkit.training.average import WeightAverage
from clipkit.training.checkpoint import load_checkpoint
from clipkit.training.distributed import start_process, stop_process
from clipkit.training.optim import clip_gradient, make_optimizer, optimizer_step
from clipkit.training.sharded_checkpoint import describe_parts, read_whole
from clipkit.training.sharding import average_scalars, blocks, blueprint, is_sharded, shard_model, whole_tensors

WORLD_SIZE, BATCH, STEPS = 4, 8, 4


class Small(nn.Module):
    """Two blocks, weights that divide by no number of processes, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2)))
        self.projection = nn.Parameter(torch.randn(5, 3))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):  # (B, 5)
        return self.blocks(x) @ self.projection * self.logit_scale


def small_model() -> Small:
    torch.manual_seed(0)
    return Small()


def optimizer_of(model):
    return make_optimizer(list(model.named_parameters()), lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.98, eps=1e-8)


def rows(step: int):
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))


def step_of_one(model, optimizer, x, *, max_norm: float):
    model(x).square().mean().backward()
    average_scalars(list(model.parameters()))
    norm = clip_gradient(list(model.parameters()), max_norm)
    optimizer_step(optimizer, norm)
    return norm


def train_on_a_rank(rank: int, port: int, strategy: str, run_dir: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "LOCAL_WORLD_SIZE": str(WORLD_SIZE), "MASTER_PORT": str(port)})
    from clipkit.training.optimizer_state import describe_optimizer, parameter_names
    from clipkit.training.resume import save_in_parts

    process = start_process("cpu", timeout_seconds=60)
    model = small_model()
    shard_model(model, process, strategy=strategy, processes_per_copy=2)
    assert not is_sharded(model.logit_scale) and is_sharded(model.projection)
    optimizer, average = optimizer_of(model), WeightAverage(model, decay=0.5)
    norms = []
    for step in range(STEPS):
        norms.append(float(step_of_one(model, optimizer, rows(step).chunk(WORLD_SIZE)[rank], max_norm=0.1)))
        average.update(step)
    saved = describe_optimizer(optimizer, parameter_names(optimizer, model))
    save_in_parts(run_dir, step=STEPS, model_state=model.state_dict(), optimizer=saved, ema_state=average.weights, state={},
                  random_states=[])
    whole = whole_tensors(model.state_dict())
    if process.is_main:
        save_file({name: tensor.detach().contiguous() for name, tensor in whole.items()}, run_dir / "model.safetensors")
        (run_dir / "norms.json").write_text(json.dumps(norms))
    stop_process()


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_shared_out_weights_learn_as_those_of_one_process(strategy, free_port, tmp_path):
    mp.spawn(train_on_a_rank, (free_port, strategy, tmp_path), nprocs=WORLD_SIZE)
    model = small_model()
    optimizer, average = optimizer_of(model), WeightAverage(model, decay=0.5)
    norms = []
    for step in range(STEPS):
        norms.append(float(step_of_one(model, optimizer, rows(step), max_norm=0.1)))
        average.update(step)
    assert json.loads((tmp_path / "norms.json").read_text()) == pytest.approx(norms, rel=1e-5)  # fp32 sums in another order
    whole, checkpoint = load_file(tmp_path / "model.safetensors"), load_checkpoint(tmp_path)
    assert checkpoint.in_parts and checkpoint.optimizer is not None and checkpoint.ema is not None
    first_moments = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(checkpoint.model[name], whole[name])
        torch.testing.assert_close(checkpoint.ema[name], average.weights[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(checkpoint.optimizer.tensors[f"{name}.exp_avg"], first_moments[name], rtol=1e-4, atol=1e-7)
    folder = checkpoint.path
    assert sorted(path.suffix for path in folder.iterdir()) == [".json"] * 2 + [".safetensors"] * 4  # no pickle
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))  # what torch's other storage would unpickle
    assert read_whole(folder).keys() == describe_parts(folder).keys()
    assert not (tmp_path / "evil").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def write_part(folder, *, info: str | None) -> None:
    metadata = {"format": "pt"} if info is None else {"format": "pt", "DCP_SHARDING_INFO": info}
    save_file({"model.weight": torch.ones(2, 3)}, folder / "shard-00001-model-00001-of-00001.safetensors", metadata=metadata)


def test_a_hostile_header_is_one_line_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_part(tmp_path, info='{"model.weight": {"saved_offsets": [0, 0]}}')
    assert torch.equal(read_whole(tmp_path)["model.weight"], torch.ones(2, 3))
    for info in ("not json", "{}", '{"model.weight": {"saved_offsets": "__import__(\'os\').mkdir(\'evil\')"}}',
                 '{"model.weight": {"saved_offsets": [-9, 0]}}', '{"model.weight": {"saved_offsets": [4000000000, 0]}}'):
        write_part(tmp_path, info=info)
        with pytest.raises(ValueError, match=r"the parts in .* are not readable \(.*\); use an older checkpoint") as caught:
            read_whole(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="are not readable"):
        read_whole(tmp_path)
    assert not (tmp_path / "evil").exists()


def test_blocks_are_those_of_the_towers_and_not_of_their_parts(tiny_model):
    found = list(blocks(tiny_model))
    towers = tiny_model.towers
    assert found == [*towers.visual.transformer.resblocks, *towers.transformer.resblocks]
    assert list(blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == []


def test_a_blueprint_has_no_weights_and_becomes_the_model_again(tiny_model):
    plain = blueprint(tiny_model)
    assert isinstance(plain, ImageTextModel) and all(parameter.is_meta for parameter in plain.parameters())
    rebuilt = blueprint(plain)
    rebuilt.towers.load_state_dict(tiny_model.towers.state_dict(), assign=True)
    images, tokens = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tiny_model.tokenize(["a cat", "a dog"])
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images, tokens).text_features, tiny_model.eval()(images, tokens).text_features)
    assert all(parameter.is_meta for parameter in plain.parameters())


def test_what_cannot_be_shared_out_is_refused():
    from clipkit.training.distributed import Process

    with pytest.raises(ValueError, match=r"processes_per_copy is 3, and there are 4 processes; give a number that divides"):
        shard_model(small_model(), Process(0, 4, 0, 4, torch.device("cpu")), strategy="hsdp", processes_per_copy=3)


def test_bfloat16_weights_on_a_cpu_are_refused(free_port, monkeypatch):
    from clipkit.training.distributed import Process

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"parallel.gather_bf16 is true, and the device is the CPU, .* set it to false"):
            shard_model(small_model(), Process(0, 1, 0, 1, torch.device("cpu")), strategy="fsdp", gather_bf16=True)
    finally:
        torch.distributed.destroy_process_group()
