"""Settings of several processes."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, positive, setting


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    sync_batch_norm: bool = setting("share batch statistics between GPUs", runtime=True)
    timeout_seconds: float = setting("how long a process waits for the others before it ends with an error", positive,
                                     runtime=True)


@dataclass(frozen=True, kw_only=True)
class ShardedParallelConfig(ParallelConfig):
    strategy: str = setting("ddp (every process has all weights), fsdp (weights, gradients and optimizer state are shared out "
                            "over the processes) or hsdp (over groups of them, each with a copy)",
                            choices=("ddp", "fsdp", "hsdp"), runtime=True)
    processes_per_copy: int | None = setting("of hsdp: neighbours that share one copy out; null = those of a machine",
                                             at_least(1), runtime=True)
    reshard_after_forward: bool = setting("of fsdp and hsdp: gather a block's weights again in the backward pass; false = "
                                          "keep them, for more memory and less traffic", runtime=True)
    gather_bf16: bool = setting("of fsdp and hsdp: weights travel as bfloat16, norms and embeddings too; inexact", runtime=True)
