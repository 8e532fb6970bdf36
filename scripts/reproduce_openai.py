"""Reproduce OpenAI's models' published zero-shot numbers with their real weights; needs a connection, or a filled cache.

    python scripts/reproduce_openai.py                                    # the five models, ImageNet and five more sets
    python scripts/reproduce_openai.py --models ViT-B-32 --sets imagenetv2 mscoco_captions --device cuda

Weights (open_clip's tag openai) and sets (CLIP_benchmark's layout, on the Hugging Face hub) are fetched once. For each
number it prints PASS, or the gap with what can make it; the exit code is 1 if there is a gap. What is done is skipped:
results stand in <out>/.

Expected (open_clip's published tables, percent; acc1, of COCO and Flickr30k recall@1 of texts by image / of images by text):

                   imagenet1k  imagenetv2  imagenet-a  imagenet-r  cifar100  food101   mscoco_captions   flickr30k
    RN50                59.82       52.84       23.27       60.73     40.30    80.80     48.84 / 28.54   80.00 / 57.36
    ViT-B-32            63.32       55.92       31.55       69.33     64.23    84.00     50.12 / 30.44   78.90 / 58.78
    ViT-B-16            68.34       61.88       49.95       77.70     66.95    88.72     52.42 / 33.09   82.20 / 62.16
    ViT-L-14            75.54       69.83       70.75       87.84     75.82    93.05     56.34 / 36.51   85.20 / 64.96
    ViT-L-14-336        76.56       70.89       77.48       89.05     74.36    93.86     57.94 / 37.09   87.70 / 66.90
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from zero_shot_suite import Model, Settings, measure_model

from clipkit.config.suite import SuiteTaskConfig
from clipkit.evaluation.reference import read_table, reference_lines, set_name
from clipkit.evaluation.suites import measured_tasks, read_suite
from clipkit.evaluation.tasks import load_task
from clipkit.model.folder import load_model

MODELS = ("RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
SETS = ("imagenet1k", "imagenetv2", "imagenet-a", "imagenet-r", "cifar100", "food101")


def main() -> int:
    options = arguments()
    settings = Settings(Path(options.out), options.device, options.batch_size, options.workers)
    try:
        return reproduce(options.models, options.sets, settings)
    except (OSError, ValueError) as error:
        print(f"reproduce_openai: {error}", file=sys.stderr)
        return 2


def reproduce(models: Sequence[str], sets: Sequence[str], settings: Settings) -> int:
    """Measure the models on the sets, compare with the published numbers; return 1 if there is a gap, else 0.

    Raises:
      FileNotFoundError: the hub cannot be reached.
      ValueError: a model or a set is not in the published table.
    """
    places = known_sets()
    unknown = [*(name for name in models if name not in MODELS), *(name for name in sets if name not in places)]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not in the published table; its models are {', '.join(MODELS)}, its sets "
                         f"{', '.join(sorted(places))}")
    tasks = [load_task(str(places[name].task), split=places[name].split, duplicates="keep") for name in sets]
    lines = []
    for name in models:
        results = measure_model(Model(name, "openai"), tasks, settings)
        lines += reference_lines(name, "openai", lambda name=name: load_model(name, pretrained="openai").config, tasks, results)
    print("\n" + "\n".join(lines))
    num_gaps = sum("PASS" not in line for line in lines)
    print(f"{len(lines) - num_gaps} of {len(lines)} numbers pass")
    return 1 if num_gaps or not lines else 0


def known_sets() -> dict[str, SuiteTaskConfig]:
    """{CLIP_benchmark's name: where it is} of the sets of the suite datacomp38 that have published numbers."""
    published = {row.task for row in read_table()}
    found = {set_name(str(one.task)): one for one in measured_tasks(read_suite("datacomp38"))}
    return {name: one for name, one in found.items() if name in published}


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--out", default="reproduce_openai")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
