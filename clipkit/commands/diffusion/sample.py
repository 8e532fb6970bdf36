"""`clipkit diffusion sample`: pictures from texts, or from pictures. The whole story, from settings to files."""

from collections.abc import Sequence
from pathlib import Path

from clipkit.config.diffusion.sample import SampleConfig
from clipkit.config.launch import launch


def main(arguments: Sequence[str]) -> None:
    launch("diffusion/sample", SampleConfig, sample, arguments)


def sample(config: SampleConfig) -> None:
    """Make pictures; go on where the same command was stopped.

    Raises:
      FileNotFoundError: there is no such model, file of prompts or folder of pictures.
      ValueError: a setting does not fit the model, or the folder has pictures of other settings.
      OSError: the pictures cannot be written.
    """
    print(f"clipkit diffusion sample: {config.model} (loading)", flush=True)
    from clipkit.diffusion.pipeline_folder import pipeline_folder
    from clipkit.diffusion.prompt_files import read_prompts
    from clipkit.diffusion.sample_conditions import picture_sources, prompt_sources
    from clipkit.diffusion.sample_files import SHEET
    from clipkit.diffusion.sample_run import fill_folder, folder_name, make_order, run_folder

    sources = picture_sources(config.images) if config.images else prompt_sources(read_prompts(config.prompts or ()))
    folder = pipeline_folder(config.model)
    order = make_order(config, folder, sources)
    out = Path(config.out).expanduser() if config.out else \
        run_folder(config.model) / "samples" / folder_name(sources.title_of(0), sources, order)
    found = fill_folder(config, folder, sources, order, out)
    damaged = f"{found.num_damaged:,} damaged, made again" if found.num_damaged else ""
    kept = "; ".join(filter(None, [f"{len(found.whole):,} were there" if found.whole else "", damaged]))
    print(f"written   {order.num_samples:,} pictures in {out}{f' ({kept})' if kept else ''}, {out / SHEET}")
