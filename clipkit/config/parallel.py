"""Settings of several processes."""

from dataclasses import dataclass

from clipkit.config.schema import positive, setting


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    sync_batch_norm: bool = setting("share batch statistics between GPUs", runtime=True)
    timeout_seconds: float = setting("how long a process waits for the others before it ends with an error", positive,
                                     runtime=True)
