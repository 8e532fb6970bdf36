"""`clipkit export`: the text encoder for diffusion, or the whole model, in the format of another library."""

from collections.abc import Sequence

from clipkit.config.export import ExportConfig
from clipkit.config.launch import launch


def main(arguments: Sequence[str]) -> None:
    launch("export", ExportConfig, export, arguments)


def export(config: ExportConfig) -> None:
    """Load a model, write it for another library, and tell how closely that library agrees.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: the folder is taken, the model cannot be represented in the format, or the check found another function.
      OSError: the folder cannot be written.
    """
    print(f"clipkit export: {config.model} for {config.format} (loading)", flush=True)
    from clipkit.interop.provenance import untried_versions
    from clipkit.interop.whole_folder import refuse_taken

    for line in untried_versions():
        print(f"note      {line}", flush=True)
    from clipkit.interop.export import export_model, output_folder
    from clipkit.model.folder import load_model

    refuse_taken(output_folder(config), overwrite=config.overwrite)
    model = load_model(config.model, pretrained=config.pretrained)
    if model.source_sha256 is None:
        print(f"note      {config.model} without pretrained=... has random weights", flush=True)
    folder, facts = export_model(model, config)
    for place, difference in facts["greatest_differences"].items():
        print(f"checked   {place:<20} greatest difference {difference:.1e}")
    for note in facts.get("notes", []):
        print(f"note      {note}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"written   {folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
