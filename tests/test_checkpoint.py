"""Checkpoints: bit-exact round trips, damage, cut-off saves, full disks."""

import copy
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipkit.training import checkpoint as checkpoint_module
from clipkit.training import checkpoint_folders
from clipkit.training.checkpoint import (
    DamagedCheckpointError,
    latest_good_checkpoint,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    unwrap,
    unwrap_names,
)
from clipkit.training.checkpoint_folders import prune_checkpoints
from clipkit.training.optimizer_state import describe_optimizer, parameter_names, restore_optimizer
from clipkit.training.random_state import get_random_state, set_random_state


def make_model(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 4, 5))
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))  # 0-dim, as logit_scale
    return model.to(memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(4, 3, 4, 4, generator=generator)
        (model(images) * model.scale).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_tiny(run_dir: Path, step: int, **more) -> Path:
    return save_checkpoint(run_dir, step=step, model_state={"weight": torch.full((4,), float(step))}, **more)


def fail_with(number: int):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))
    return fail


def timm_optimizer(name: str):
    def make(parameters):
        from timm.optim import create_optimizer_v2
        return create_optimizer_v2(list(parameters), opt=name, lr=1e-2, weight_decay=0.01)
    return make


OPTIMIZERS = {
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "timm lion": timm_optimizer("lion"),
    "timm lamb": timm_optimizer("lamb"),
    "timm adafactor": timm_optimizer("adafactor"),
    "timm madgrad": timm_optimizer("madgrad"),
    "timm adan": timm_optimizer("adan"),
    "timm nadamw": timm_optimizer("nadamw"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3, seed=1)
    names = parameter_names(optimizer, model)
    save_checkpoint(tmp_path, step=3, model_state=model.state_dict(), optimizer=describe_optimizer(optimizer, names))
    train(model, optimizer, 3, seed=2)

    other = make_model(seed=9)
    other_optimizer = OPTIMIZERS[name](other.parameters())
    train(other, other_optimizer, 1, seed=5)  # a state that has to go
    saved = load_checkpoint(tmp_path)
    restore_model(other, saved.model)
    restore_optimizer(other_optimizer, parameter_names(other_optimizer, other), saved.optimizer)
    train(other, other_optimizer, 3, seed=2)
    for (key, expected), found in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, found), key
    assert optimizer.param_groups[0].keys() == other_optimizer.param_groups[0].keys()


def test_optimizer_state_keeps_its_precision_and_layout_beside_bf16_weights(tmp_path):
    model = nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    values = torch.randn(4, 3, 3, 3)
    optimizer.state[model.weight] = {"momentum_buffer": values}
    save_checkpoint(tmp_path, step=1, model_state=model.state_dict(),
                    optimizer=describe_optimizer(optimizer, ["weight", "bias"]))
    fresh = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    restore_optimizer(fresh, ["weight", "bias"], load_checkpoint(tmp_path).optimizer)
    restored = fresh.state[model.weight]["momentum_buffer"]
    assert restored.dtype == torch.float32
    assert torch.equal(restored, values)
    assert restored.stride() == model.weight.stride()
    assert fresh.param_groups[0]["lr"] == 0.1
    assert model.bias not in fresh.state


def test_nested_state_and_group_values_come_back_as_they_were(tmp_path):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    settings = {"betas": (0.9, 0.95), "name": "decay", "initial_lr": 1e-5 / 3, "scale": torch.ones(())}
    optimizer.param_groups[0] |= settings
    optimizer.state[parameter] = {"factors": [torch.ones(2, 2), None, {"rows": torch.arange(2)}], "count": 7}
    save_tiny(tmp_path, 1, optimizer=describe_optimizer(optimizer, ["weight"]))
    fresh = torch.optim.SGD([parameter], lr=0.3)
    restore_optimizer(fresh, ["weight"], load_checkpoint(tmp_path).optimizer)
    group, state = fresh.param_groups[0], fresh.state[parameter]
    assert (group["betas"], group["name"], group["initial_lr"]) == ((0.9, 0.95), "decay", 1e-5 / 3)
    assert torch.equal(group["scale"], torch.ones(()))
    assert torch.equal(state["factors"][0], torch.ones(2, 2))
    assert state["factors"][1] is None
    assert torch.equal(state["factors"][2]["rows"], torch.arange(2))
    assert state["count"] == 7


def test_how_an_optimizer_computes_stays_this_sessions_own(tmp_path):
    model = make_model()
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, fused, 1, seed=1)
    names = parameter_names(fused, model)
    plain = torch.optim.AdamW(model.parameters(), foreach=False)
    restore_optimizer(plain, names, describe_optimizer(fused, names))
    assert not plain.param_groups[0]["fused"]
    train(model, plain, 1, seed=2)


def test_odd_tensors_come_back_bit_for_bit(tmp_path):
    weight = torch.randn(6, 4)
    tensors = {"tied.a": weight, "tied.b": weight, "view": weight[1:3], "transposed": weight.t(),
               "strided": weight[:, ::2],
               "expanded": torch.ones(1, 3).expand(5, 3), "scalar": torch.tensor(0.1, dtype=torch.float64),
               "half": torch.randn(3).to(torch.float16), "bf16": torch.randn(7).to(torch.bfloat16),
               "count": torch.tensor(2**40), "mask": torch.tensor([True, False]), "empty": torch.zeros(0, 3),
               "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
               "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    path = save_checkpoint(tmp_path, step=12, model_state=tensors, ema_state={"tied.a": weight * 2})
    saved = load_checkpoint(path)
    assert saved.model.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved.model[name].dtype == tensor.dtype
        assert saved.model[name].shape == tensor.shape
        assert torch.equal(bits(saved.model[name]), bits(tensor)), name
    assert torch.equal(saved.ema["tied.a"], weight * 2)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_the_folder_holds_what_design_says(tmp_path):
    state = {"lanes": {"3": {"epoch": 1, "offset": 17}}, "pair": (1, 2), "loss": 1e-5 / 3}
    path = save_tiny(tmp_path, 1234, state=state, random_states=[get_random_state()] * 2)
    assert path == tmp_path / "checkpoints" / "step-00001234"
    assert {file.name for file in path.iterdir()} == {"model.safetensors", "random.safetensors", "state.json",
                                                      "manifest.json"}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00001234\n"
    assert {file.name for file in path.parent.iterdir()} == {"step-00001234", "latest"}
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # safetensors alone would make its files private
    saved = load_checkpoint(tmp_path)
    assert saved.step == 1234
    assert saved.state == {"lanes": {"3": {"epoch": 1, "offset": 17}}, "pair": [1, 2], "loss": 1e-5 / 3}
    assert saved.world_size == 2
    assert saved.versions["torch"] == torch.__version__
    assert saved.optimizer is None
    assert saved.ema is None


def test_random_states_are_put_back_exactly(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)  # each keeps a second variate back
    np.random.randn()
    save_tiny(tmp_path, 1, random_states=[get_random_state()])
    expected = [random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist()]
    set_random_state(load_checkpoint(tmp_path).random_states[0])
    assert [random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.randn(3).tolist()] == expected
    with pytest.raises(ValueError, match=r"random state lacks \['python'"):
        set_random_state({"torch_cpu": torch.get_rng_state()})


def test_wrappers_leave_no_trace_in_names():
    model = make_model()
    compiled = nn.Module()  # as torch.compile's OptimizedModule names its content, which takes seconds to import
    compiled._orig_mod = model
    wrapped = nn.DataParallel(compiled)
    assert unwrap(wrapped) is model
    assert list(unwrap_names(wrapped.state_dict())) == list(model.state_dict())
    assert list(unwrap_names({"module.visual._orig_mod.proj": torch.ones(1)})) == ["visual.proj"]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    assert parameter_names(optimizer, wrapped) == [name for name, _ in model.named_parameters()]
    restore_model(wrapped, make_model(seed=4).state_dict())
    assert torch.equal(model[3].weight, make_model(seed=4)[3].weight)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 0 of the optimizer, of shape \[3\], is not"):
        parameter_names(stranger, model)


def test_a_checkpoint_of_another_model_is_refused_by_its_first_tensor():
    model, wide = make_model(), make_model(width=8)
    with pytest.raises(ValueError, match=r"another model: in its model tensors, 0.weight has shape \[8, 3, 3, 3\].*"
                                         r"has shape \[6, 3, 3, 3\]; resume"):
        restore_model(model, wide.state_dict())
    before = copy.deepcopy(model.state_dict())
    extra = {**model.state_dict(), "text.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"text.bias has shape \[2\], and the model of this run has no such tensor"):
        restore_model(model, extra)
    del extra["text.bias"], extra["3.bias"]
    with pytest.raises(ValueError, match=r"3.bias is missing, and the model of this run has shape \[5\]"):
        restore_model(model, extra, "EMA")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_optimizer_is_refused():
    model, wide = make_model(), make_model(width=8)
    adamw = torch.optim.AdamW(model.parameters())
    names = parameter_names(adamw, model)
    saved = describe_optimizer(adamw, names)
    with pytest.raises(ValueError, match="optimizer is AdamW, this run's is SGD; resume with the settings"):
        restore_optimizer(torch.optim.SGD(model.parameters(), lr=1), names, saved)
    with pytest.raises(ValueError, match=r"in its optimizer tensors, 0.weight has shape \[6, 3, 3, 3\]"):
        restore_optimizer(torch.optim.AdamW(wide.parameters()), names, saved)
    parameters = list(model.parameters())
    split = torch.optim.AdamW([{"params": parameters[:1], "weight_decay": 0.5}, {"params": parameters[1:]}])
    with pytest.raises(ValueError, match=r"in groups of \[1, 6\], this run's in groups of \[7\]"):
        restore_optimizer(adamw, names, describe_optimizer(split, names))
    restore_optimizer(split, names, saved)  # groups may be split: those of weights that are shared out are
    assert [group["weight_decay"] for group in split.param_groups] == [adamw.defaults["weight_decay"]] * 2
    with pytest.raises(ValueError, match=r"got 1 names \(1 distinct\) for the"):
        describe_optimizer(adamw, names[:1])
    adamw.state[parameters[0]]["hook"] = print
    with pytest.raises(ValueError, match=r"the optimizer's state scale.hook is of .* no place in a checkpoint"):
        describe_optimizer(adamw, names)


def test_state_that_is_not_json_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match="state holds tensor"):
        save_tiny(tmp_path, 1, state={"a": torch.ones(())})
    assert not (tmp_path / "checkpoints").exists()


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {"flip": (flip_byte, "another sha256"),
          "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), "bytes in the place of"),
          "empty": (lambda file: os.truncate(file, 0), "bytes in the place of"),
          "delete": (lambda file: file.unlink(), "missing")}


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(kind, name, tmp_path):
    for step in (100, 200):
        save_tiny(tmp_path, step)
    damage, reason = DAMAGE[kind]
    newest = tmp_path / "checkpoints" / "step-00000200"
    damage(newest / name)
    with pytest.raises(DamagedCheckpointError, match=f"step-00000200 is damaged: {name} .*{reason}.*; use an older"):
        load_checkpoint(newest)
    assert load_checkpoint(tmp_path).step == 100
    warnings: list[str] = []
    assert latest_good_checkpoint(tmp_path, warnings.append) == tmp_path / "checkpoints" / "step-00000100"
    assert len(warnings) == 1
    assert "step-00000200 is damaged" in warnings[0]
    assert reason in warnings[0]
    assert "goes on from step-00000100" in warnings[0]
    assert "\n" not in warnings[0]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    assert latest_good_checkpoint(tmp_path, pytest.fail) is not None
    save_tiny(tmp_path, 150)
    prune_checkpoints(tmp_path, keep=1)  # the damaged one does not take the place of a good one
    assert load_checkpoint(tmp_path).step == 150


def test_any_flipped_byte_of_a_manifest_is_either_found_or_harmless(tmp_path):
    path = save_tiny(tmp_path, 1)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    expected = load_checkpoint(path)
    for index in range(len(content)):
        manifest.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1:])
        try:
            found = load_checkpoint(path)
        except DamagedCheckpointError:
            continue
        assert torch.equal(found.model["weight"], expected.model["weight"])
    manifest.write_bytes(b"[]")
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json is not readable"):
        load_checkpoint(path)
    manifest.write_text('{"files": {}}')
    with pytest.raises(DamagedCheckpointError, match=r"manifest.json does not list state.json"):
        load_checkpoint(path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(tmp_path):
    assert latest_good_checkpoint(tmp_path, pytest.fail) is None
    for step in (1, 2):
        flip_byte(save_tiny(tmp_path, step) / "model.safetensors")
    with pytest.raises(ValueError, match=r"all 2 checkpoints in .* are damaged \(step-00000002: .*; step-00000001: .*"
                                         "remove that folder to start the run from its first step"):
        latest_good_checkpoint(tmp_path, pytest.fail)
    with pytest.raises(FileNotFoundError, match="has no whole checkpoint; give a run folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "checkpoints" / "step-00000009")


class Killed(BaseException):
    """Stands for SIGKILL: nothing may tidy up after it."""


KILL_POINTS = [(checkpoint_module, "write_tensors"), (checkpoint_module, "write_rest"), (checkpoint_folders, "write_manifest"),
               (checkpoint_folders, "fsync_folder"), (os, "rename"), (checkpoint_folders, "write_text_atomically")]


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize(("module", "point"), KILL_POINTS, ids=[point for _, point in KILL_POINTS])
def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(module, point, same_step, tmp_path, monkeypatch):
    save_tiny(tmp_path, 100)

    def kill(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, point, kill)
        with pytest.raises(Killed):
            save_tiny(tmp_path, 100 if same_step else 200, state={"second": True})
    found = latest_good_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    saved = load_checkpoint(found)
    assert torch.equal(saved.model["weight"], torch.full((4,), float(saved.step)))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert not [name for name in names if name.startswith((".tmp-step", ".replaced"))]
    save_tiny(tmp_path, 300)
    assert load_checkpoint(tmp_path).step == 300


def test_a_kill_between_the_two_renames_of_a_replacement_keeps_the_old_one(tmp_path, monkeypatch):
    save_tiny(tmp_path, 100, state={"first": True})
    rename, calls = os.rename, []

    def kill_at_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill_at_second)
        with pytest.raises(Killed):
            save_tiny(tmp_path, 100)
    assert not (tmp_path / "checkpoints" / "step-00000100").exists()
    assert latest_good_checkpoint(tmp_path, pytest.fail) is not None
    assert load_checkpoint(tmp_path).state == {"first": True}


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_tiny(tmp_path, 100)
    path = save_tiny(tmp_path, 100, state={"finished": True})
    assert load_checkpoint(path).state == {"finished": True}
    assert {file.name for file in path.parent.iterdir()} == {"step-00000100", "latest"}


@pytest.mark.parametrize(("number", "cause"), [(errno.ENOSPC, r"the disk is full \(.* GB free\); free some space"),
                                               (errno.EDQUOT, "the disk quota is used up"),
                                               (errno.EROFS, "the file system is read-only"),
                                               (errno.EACCES, "no permission to write there")])
@pytest.mark.parametrize("where", ["mkdir", "fsync"])
def test_a_disk_that_fails_is_one_line_and_the_older_checkpoint_stays(where, number, cause, tmp_path, monkeypatch):
    save_tiny(tmp_path, 100)
    with monkeypatch.context() as patch:
        patch.setattr(*(Path, "mkdir") if where == "mkdir" else (os, "fsync"), fail_with(number))
        with pytest.raises(OSError, match=f"^cannot write .*step-00000200: {cause}.*"
                                          "the last good checkpoint is step-00000100$") as caught:
            save_tiny(tmp_path, 200)
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000100", "latest"}
    assert load_checkpoint(tmp_path).step == 100


def test_safetensors_own_disk_errors_are_explained_too(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def fail(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match=r"the disk is full.*there is no earlier checkpoint$"):
        save_tiny(tmp_path, 1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*a part of that path is a file, not a folder"):
        save_tiny(tmp_path, 1)


def test_a_write_that_really_fails_half_way_leaves_nothing_behind(tmp_path):
    import resource

    save_tiny(tmp_path, 100)
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"too large for this disk or process limit.*is step-00000100$"):
            save_checkpoint(tmp_path, step=200, model_state={"a": torch.zeros(200_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000100", "latest"}


SAVER = """
import itertools, os, sys, torch
from clipkit.training.checkpoint import save_checkpoint
from clipkit.training.checkpoint_folders import prune_checkpoints
for line in sys.stdin:
    if os.fork() == 0:
        for step in itertools.count(int(line) + 1):
            save_checkpoint(sys.argv[1], step=step, model_state={"a": torch.full((300_000,), float(step))})
            prune_checkpoints(sys.argv[1], keep=2)
            if step == int(line) + 1:
                print(os.getpid(), flush=True)
    os.wait()
    print("dead", flush=True)
"""


@pytest.mark.multiprocess
def test_a_process_killed_while_it_saves_over_and_over_leaves_a_whole_checkpoint(tmp_path):
    rng, step = random.Random(0), 0
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        for _ in range(8):
            process.stdin.write(f"{step}\n")
            process.stdin.flush()
            saver = int(process.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.1))
            os.kill(saver, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            found = latest_good_checkpoint(tmp_path, pytest.fail)
            assert found is not None
            saved = load_checkpoint(found)
            assert saved.step > step
            step = saved.step
            assert torch.equal(saved.model["a"], torch.full((300_000,), float(step)))


def test_the_newest_and_every_nth_are_kept(tmp_path):
    for step in range(100, 1000, 100):
        save_tiny(tmp_path, step)
    removed = prune_checkpoints(tmp_path, keep=2, keep_every_steps=400)
    assert [path.name for path in removed] == [f"step-{step:08d}" for step in (700, 600, 500, 300, 200, 100)]
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"latest", *(f"step-{step:08d}" for step in (400, 800, 900))}
    assert prune_checkpoints(tmp_path, keep=1) != []
    assert load_checkpoint(tmp_path).step == 900
    with pytest.raises(ValueError, match="keep is 0; keep at least 1"):
        prune_checkpoints(tmp_path, keep=0)


def test_another_format_says_which_clipkit_wrote_it(tmp_path):
    path = save_tiny(tmp_path, 1)
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**record, "format": 9, "versions": {"clipkit": "7.0"}}))
    with pytest.raises(ValueError, match=r"has format 9, this clipkit reads 1; use the clipkit that wrote it \(7.0\)"):
        load_checkpoint(path, verify=False)


def test_no_pickle_is_written_or_read():
    folder = Path(checkpoint_module.__file__).parent
    for file in folder.glob("*.py"):
        text = file.read_text()
        assert "torch.save" not in text
        assert "torch.load" not in text
        assert "import pickle" not in text
