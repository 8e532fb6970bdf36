"""Settings of `clipkit diffusion sample`, and those that all commands that sample share."""

from dataclasses import dataclass

from clipkit.config.schema import at_least, fraction, positive, setting

SCHEDULERS = ("ddim", "dpmpp_2m", "euler", "ddpm", "flow")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    model: str = setting("a run of clipkit diffusion train, or a pipeline folder")
    n_samples: int | None = setting("pictures in all, dealt to the prompts in turn; null = one a prompt", positive)
    batch_size: int = setting("pictures at once, on the CPU at most 4: the most memory that is taken", positive)
    seed: int = setting("of the first picture; each following one has the next", at_least(0))
    scheduler: str | None = setting("steps from noise to a picture; null = ddim, or flow for a model of that kind",
                                    choices=SCHEDULERS)
    steps: int = setting("evaluations of the U-Net for a picture", positive)
    guidance_scale: float = setting("how far beyond the plain prediction; 1 = not at all, and half the work", at_least(0))
    guidance_rescale: float = setting("how much of the plain prediction's contrast a guided one gets back", fraction)
    out: str | None = setting("folder for the pictures; null = one in the run, named after the settings")
    memory: str = setting("low = parts come to the device one after the other, and work in slices", choices=("normal", "low"))
    compile: bool = setting("torch.compile the U-Net: a minute at the start, less for each picture")
    device: str = setting("auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    prompts: tuple[str, ...] | None = setting("texts; .txt files with one a line; .csv files with a column prompt or caption")
    images: str | None = setting("folder of pictures, or one, in the place of prompts: what a model of pictures starts from")

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.images):
            given = "both are given" if self.prompts else "neither is given"
            raise ValueError("pictures are made from prompts='a red heart' or, by models of pictures, from images=<folder>; "
                             f"{given}: give one of them")
