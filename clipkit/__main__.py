"""`clipkit <command> [key=value ...]`: finds the command and imports only that one."""

import importlib
import sys
from importlib import metadata

COMMANDS = {
    "pretrain": ("clipkit.commands.pretrain", "train a CLIP on image-text shards"),
    "lit": ("clipkit.commands.lit", "train projections on the cached features of two frozen encoders"),
    "zero-shot": ("clipkit.commands.zero_shot", "measure any CLIP by text alone, or name and find your own pictures"),
    "compare": ("clipkit.commands.compare", "tell whether two models differ by more than chance"),
    "interpolate": ("clipkit.commands.interpolate", "find the best model between one and its fine-tuned successor, or a soup"),
    "embed": ("clipkit.commands.embed", "write the embeddings of pictures and captions as arrays"),
    "shards": ("clipkit.commands.shards", "write shards from folders and tables, or check them"),
    "diffusion": ("clipkit.commands.diffusion", "train an autoencoder for latent diffusion"),
    "export": ("clipkit.commands.export", "hand the text encoder, or the whole model, to other libraries"),
}


def main() -> None:
    """Run the command that the first argument names."""
    refuse_name_collision()
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(usage())
        return
    if name in ("--version", "-V"):
        from clipkit import __version__

        print(f"clipkit {__version__}")
        return
    if name not in COMMANDS:
        sys.exit(f"clipkit: {name!r} is not a command; choose one of {', '.join(COMMANDS)}")
    importlib.import_module(COMMANDS[name][0]).main(arguments)


def usage() -> str:
    rows = "\n".join(f"  {name:<12} {meaning}" for name, (_, meaning) in COMMANDS.items())
    return (f"clipkit <command> [key=value ...]\n\n{rows}\n\n"
            "clipkit <command> --help lists its settings; --cfg job prints their values.")


def refuse_name_collision() -> None:
    """End with one line where the unrelated PyPI project `clipkit` is installed over this one (clipkit-vl)."""
    try:
        foreign = metadata.distribution("clipkit")
    except metadata.PackageNotFoundError:
        return
    sys.exit(f"clipkit: the unrelated package clipkit {foreign.version} is installed and shares the import name; run: "
             "pip uninstall clipkit && pip install --force-reinstall --no-deps clipkit-vl")


if __name__ == "__main__":
    main()
