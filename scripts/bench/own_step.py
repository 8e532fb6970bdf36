"""clipkit's arm of step.py: the model, the loader and the loop of `clipkit pretrain`, unchanged."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from clipkit.commands import pretrain
from clipkit.config import PretrainConfig
from clipkit.config.launch import launch
from clipkit.data.batch import Batch
from clipkit.training.device_batches import device_batches
from scripts.bench.step_arm import Clock, serve

FIRST_STEP = 1  # no evaluation before it
OPTIONS = ("name=bench", "train.samples=10_000_000", "train.epochs=null", "optim.recipe=open_clip", "optim.lr=1e-3",
           "optim.weight_decay=0.2", "optim.max_grad_norm=1", "schedule.warmup=100", "data.workers=0", "evaluation.tasks=[]",
           "log.every=100000", "log.to=[]", "checkpoint.every_minutes=100000")


class Timed:
    """A loader that gives some batches under a clock."""

    workers, bad = 0, {}  # as of a TrainLoader

    def __init__(self, batches: Any, number: int, clock: Clock) -> None:
        self.batches, self.number, self.clock = batches, number, clock

    def __iter__(self) -> Iterator[Any]:
        return self.clock.of(batch for batch, _ in zip(self.batches, range(self.number), strict=False))

    def close(self) -> None:
        pass


class ClipkitTrainer:
    """What `clipkit pretrain` prepares, with weights and a batch from files."""

    def __init__(self, model_cfg: str, weights: str, batch: str, shards: list[str], micro_batches: int = 1, device: str = "cpu",
                 precision: str = "fp32", compile_model: bool = False) -> None:
        from clipkit import __version__

        saved = load_file(batch)
        size = len(saved["images"])
        self.version, self.clock, self.folder = f"clipkit {__version__}", Clock(device), tempfile.TemporaryDirectory()
        micro = [f"train.micro_batch_size={size // micro_batches}"] if micro_batches > 1 else []
        launch("pretrain", PretrainConfig, self.prepare, [
            "model=emoji", "model.config=" + model_cfg.replace('"', ""), *(f"data.train={shard}" for shard in shards), *OPTIONS,
            *micro, f"train.global_batch_size={size}", f"device={device}", f"train.precision={precision}", "train.threads=1",
            f"train.compile={str(compile_model).lower()}", f"runs_dir={self.folder.name}/runs"], pretrain.IMPLIED)
        self.towers.load_state_dict(load_file(weights))
        t = self.training
        images, tokens = (saved[name][t.process.rank::t.process.world_size] for name in ("images", "tokens"))
        batch_of_rank = Batch(images, tokens, tokens.new_zeros(len(tokens)).long())
        self.batch = next(device_batches([batch_of_rank], t.process.device, only=0, host_tokens=t.model.trims_text,
                                         channels_last=t.config.train.channels_last))

    def prepare(self, config: PretrainConfig) -> None:
        from clipkit.training.process import training_process

        self.cleanup = contextlib.ExitStack()
        process = self.cleanup.enter_context(training_process(config.device, timeout_seconds=60, threads=config.train.threads))
        self.training, _ = pretrain.prepare(config, process, self.cleanup)
        self.towers = self.training.model.towers

    def loss(self) -> Tensor:
        from clipkit.losses import make_loss

        return make_loss("clip", block_size=None, bf16=False)(*self.training.parallel(self.batch.images, self.batch.tokens))

    def text_features(self) -> Tensor:
        return self.training.model.encode_text(self.batch.tokens)

    def steps(self, number: int, shards: list[str] | None = None) -> None:
        batches = self.training.loader if shards else iter(lambda: self.batch, None)
        pretrain.train(self.training._replace(loader=Timed(batches, number, self.clock)), FIRST_STEP)


if __name__ == "__main__":
    serve(ClipkitTrainer)
