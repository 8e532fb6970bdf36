"""Hand a run's text encoder to diffusers and transformers, and read it back as their users do.

    python scripts/export_text_encoder.py [runs/emoji] [folder]

Expected, for the default run: 8 files, 59 MB, greatest difference to the tower below 1e-5; then the shapes of
the hidden states, (2, 32, 256), and of the text features, (2, 256), from transformers alone. Under 30 s after imports.
"""

import argparse
from pathlib import Path

import clipkit
from clipkit.config.launch import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="runs/emoji", help="a run, or what clipkit.load_model takes")
    parser.add_argument("folder", nargs="?", type=Path, help="default: export/text_encoder in the source")
    options = parser.parse_args()
    with one_line_errors():
        out = clipkit.export_text_encoder(options.source, options.folder or Path(options.source) / "export" / "text_encoder",
                                          overwrite=True)
    print(f"written        {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")

    # From here on nothing is clipkit's.
    import torch
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(out)
    encoder = CLIPTextModelWithProjection.from_pretrained(out)
    tokens = tokenizer(["a red heart", "a grinning cat"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        given = encoder(tokens)
    print(f"hidden states  {tuple(given.last_hidden_state.shape)}, text features {tuple(given.text_embeds.shape)}")


if __name__ == "__main__":
    main()
