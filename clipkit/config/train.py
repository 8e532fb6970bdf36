"""Settings of the training loop."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, fraction, positive, setting, within


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    samples: int | None = setting("image-text pairs seen in the whole run", positive)
    epochs: float | None = setting("passes over the data, in the place of samples", positive)
    global_batch_size: int = setting("pairs that are contrasted in one step, over all processes", at_least(2))
    precision: str = setting("fp32, amp_bf16 (bfloat16 autocast, fp32 weights), or auto: amp_bf16 where the device has units "
                             "for it", choices=("auto", "fp32", "amp_bf16"))
    channels_last: bool = setting("memory layout of images: true is faster for convolutional towers")
    ema_decay: float | None = setting("decay of the average of the weights that is then used and saved; null = none",
                                      within(0, 1))
    overfit_batches: int = setting("self-check: train on this many fixed batches only; 0 = off", at_least(0))
    max_skipped_steps: int = setting("steps in a row with a non-finite loss or gradient that stop the run", positive)
    compile: bool = setting("torch.compile the model", runtime=True)
    activation_checkpointing: bool = setting("recompute activations in the backward pass to save memory", runtime=True)
    threads: int | None = setting("CPU threads a process; null = torch's own choice", positive, runtime=True)

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.epochs is None):
            raise ValueError(f"give one of train.samples (now {self.samples}) and train.epochs (now {self.epochs}); "
                             "set the other to null")


@dataclass(frozen=True, kw_only=True)
class ContrastiveTrainConfig(TrainConfig):
    micro_batch_size: int | None = setting("rows of a process whose activations are held at once, for one more forward "
                                           "pass; the gradient stays that of the whole batch; null = all", positive,
                                           runtime=True)
    threads: int | None = setting("CPU threads a process; 0 = the fastest number, tried at the start and kept by the run; "
                                  "null = torch's own choice", at_least(0), runtime=True)
    fused_attention: bool = setting("attention of open_clip's Transformers in one call; same results", runtime=True)
    validation_fraction: float | None = setting("share of the pairs that is set aside and not trained on; its loss is told at "
                                                "each evaluation; null = none", fraction)
    patience: int | None = setting("evaluations without a lower validation loss that end the run; model/ is then that of the "
                                   "lowest; null = train to the end", positive, runtime=True)
    micro_batch_norm: bool = setting("allow micro-batches with a BatchNorm, whose statistics are then those of a micro-batch",
                                     runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_fraction in (0, 1):
            raise ValueError(f"train.validation_fraction is {self.validation_fraction:g}; give a share between 0 and 1, "
                             "or null")
        if self.patience and self.validation_fraction is None:
            raise ValueError(f"train.patience is {self.patience}, but no pairs are set aside to judge by; give "
                             "train.validation_fraction=0.1, or train.patience=null")
