"""`clipkit diffusion <command>`: one dict command -> module; imports only the one asked for."""

import importlib
import sys
from collections.abc import Sequence

from clipkit.config.launch import EXIT_BAD_INPUT

COMMANDS = {
    "autoencoder": ("clipkit.commands.diffusion.autoencoder", "train the autoencoder: pictures to latents and back"),
    "train": ("clipkit.commands.diffusion.train", "train the U-Net: latents from texts, pictures or maps"),
    "sample": ("clipkit.commands.diffusion.sample", "make pictures from texts, or from pictures"),
    "evaluate": ("clipkit.commands.diffusion.evaluate", "judge generated pictures by another CLIP"),
}


def main(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names."""
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h"):
        rows = "\n".join(f"  {name:<12} {meaning}" for name, (_, meaning) in COMMANDS.items())
        print(f"clipkit diffusion <command> [key=value ...]\n\n{rows}\n\n"
              "clipkit diffusion <command> --help lists its settings.")
        return
    if name not in COMMANDS:
        print(f"clipkit: diffusion {name}: no such command; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    importlib.import_module(COMMANDS[name][0]).main(arguments[1:])
