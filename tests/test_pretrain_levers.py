"""`clipkit pretrain` with its exact levers on and off: one curve; and between log lines the host waits for nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_pretrain import BATCH, STEPS, lines, run


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def losses_of(run_dir) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


@pytest.mark.parametrize("lever", [("train.micro_batch_size=5",), ("loss.block_size=0",),
                                   ("train.micro_batch_size=4", "loss.block_size=3", "loss=siglip"), ("loss.block_size=5",),
                                   ("train.fused_attention=false",),
                                   ("train.activation_checkpointing=true",)], ids=" ".join)
def test_a_lever_leaves_the_curve_as_it_is(shards, tmp_path, lever):
    loss = [setting for setting in lever if setting.startswith("loss=")]
    run(shards, "name=plain", *loss)
    run(shards, "name=lever", *lever)
    plain, found = losses_of(tmp_path / "runs" / "plain"), losses_of(tmp_path / "runs" / "lever")
    assert len(found) == STEPS
    assert found == pytest.approx(plain, rel=1e-5)  # fp32, sums in another order


def test_micro_batches_of_a_model_with_batch_norm_are_refused_unless_allowed(shards):
    batch_norm = ("model=emoji", f"train.micro_batch_size={BATCH // 2}", "train.samples=32")
    message = r"train\.micro_batch_size is 8, and the model has BatchNorm.*micro_batch_norm=true"
    with pytest.raises(ValueError, match=message) as error:
        run(shards, *batch_norm)
    assert "\n" not in str(error.value)
    assert run(shards, *batch_norm, "train.micro_batch_norm=true") is None


class HostReads(TorchDispatchMode):
    """Counts what would make a host wait for a GPU: single numbers read from tensors that are computed there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [(), ("train.micro_batch_size=4",)], ids=["whole batch", "micro-batches"])
def test_the_host_reads_nothing_between_log_lines(shards, more):
    """Token lengths are integers and lie on the host; all else that a step decides, it decides on the device."""
    counts = []
    for samples in (4 * BATCH, 12 * BATCH):  # one log line in both, so that only steps differ
        with HostReads() as reads:
            run(shards, f"name=steps{samples}", f"train.samples={samples}", "log.every=1000", *more)
        counts.append(reads.count)
    assert counts[0] > 0  # the log line
    assert counts[0] == counts[1]
