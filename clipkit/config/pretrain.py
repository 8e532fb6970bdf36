"""Settings of `clipkit pretrain`: the root of all groups."""

from dataclasses import dataclass

from clipkit.config.checkpoint import PretrainCheckpointConfig
from clipkit.config.data import DataConfig
from clipkit.config.distill import DistillConfig
from clipkit.config.evaluation import EvaluationConfig
from clipkit.config.log import LogConfig
from clipkit.config.loss import LossConfig
from clipkit.config.model import ModelConfig
from clipkit.config.optim import ContrastiveOptimConfig
from clipkit.config.parallel import ShardedParallelConfig
from clipkit.config.schedule import ScheduleConfig
from clipkit.config.schema import setting
from clipkit.config.train import ContrastiveTrainConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    name: str | None = setting("name of the run: its folder is runs/<name>; the same name again resumes it")
    seed: int = setting("source of all randomness")
    runs_dir: str = setting("folder that holds the run folders", runtime=True)
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"), runtime=True)
    plan: str | None = setting("say what the run would cost, and end: true (on this machine), or <processes>x<device>, such as "
                               "64xa100-80gb; null = train", runtime=True)
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    distill: DistillConfig
    optim: ContrastiveOptimConfig
    schedule: ScheduleConfig
    train: ContrastiveTrainConfig
    parallel: ShardedParallelConfig
    evaluation: EvaluationConfig
    checkpoint: PretrainCheckpointConfig
    log: LogConfig

    def __post_init__(self) -> None:
        if self.name == "":
            raise ValueError("name is empty; give name=... (the run's folder is runs/<name>), or name=null for emoji")
        if self.name is None and self.data.train != ("emoji",) and not self.plan:
            raise ValueError("name is required for data other than emoji; give name=... (the run's folder is runs/<name>)")
        if self.name is None and self.model.start is not None:
            raise ValueError("name is required with model.start; give name=... (the run's folder is runs/<name>)")
        if self.optim.towards_start and self.model.start is None and self.model.pretrained is None:
            raise ValueError(f"optim.towards_start is {self.optim.towards_start:g}, but the run starts from random weights; "
                             "give model.start=..., or optim.towards_start=0")
        if self.model.lora_rank is not None:
            self._check_lora(self.model.lora_rank)

    def _check_lora(self, rank: int) -> None:
        strategy, pull = self.parallel.strategy, self.optim.towards_start
        if strategy != "ddp":
            raise ValueError(f"parallel.strategy is {strategy!r} and model.lora_rank is {rank}: adapted matrices are not "
                             "shared out; give parallel.strategy=ddp, or model.lora_rank=null")
        if pull:
            raise ValueError(f"optim.towards_start is {pull:g} and model.lora_rank is {rank}: the start stays as it is, and "
                             "weight decay already pulls the update to zero; give optim.towards_start=0")
