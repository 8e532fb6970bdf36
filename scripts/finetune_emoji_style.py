"""Fine-tune the emoji run on a drawing style that it never saw, and see what was won and what was forgotten.

    python scripts/finetune_emoji_style.py --start runs/emoji

300 labelled drawings of the held-out style (EmojiTwo), chosen by seed, are trained on; the other 1,058, of other concepts, are
the target, and `emoji_val` (the styles of training) is what may be forgotten. Two runs go on from the start at 48 pixels, with
15 % new drawings in each batch and 85 % of those of before, and what is kept is the mean of their weights (a soup). Writes
the two sets and the soup to --out, and the runs to runs/emojitwo_<seed>_<number>/.

Expected (seed 0): the rest of the style 39.1 % -> 56.0 % (one run: 52.3, the other: 53.9), emoji_val (label) 70.7 % -> 79.9 %;
about 5,000 CPU seconds. --runs 1 leaves the mean out.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from clipkit.commands import interpolate, pretrain, zero_shot
from clipkit.data.emoji import emoji_shards
from clipkit.data.tars import RawSample, read_shard
from clipkit.data.write import ShardWriter, write_benchmark_files, write_sizes

SETTINGS = ("experiment=finetune", "data=emoji", "loss=emoji", "optim=emoji", "train=emoji", "evaluation=emoji",
            "loss.mask_false_negatives=concept", "data.weights=[0.85,0.15]", "data.augment.elastic=0.06",
            "data.augment.colour_noise=0.06", "model.image_size=48", "optim.lr=1.5e-3", "optim.layer_decay=null",
            "train.epochs=null", "train.samples=300_000", "train.global_batch_size=256", "evaluation.tasks=[]")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--start", default="runs/emoji", help="the run to start from")
    parser.add_argument("--out", type=Path, default=Path("emojitwo"), help="folder for the two sets")
    parser.add_argument("--num", type=int, default=300, help="drawings to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings that are chosen")
    parser.add_argument("--runs", type=int, default=2, help="runs whose weights are averaged, with seeds 0, 1, ...")
    parser.add_argument("settings", nargs="*", help="further settings of clipkit pretrain")
    given = parser.parse_args(arguments)
    rest = write_sets(given.out, num=given.num, seed=given.seed)
    names = [f"emojitwo_{given.seed}_{number}" for number in range(given.runs)]
    for number, name in enumerate(names):
        settings = [*SETTINGS, f"model.start={given.start}", f"data.train=[emoji,{given.out}/train/shard-0.tar]",
                    f"seed={number}", f"name={name}", f"evaluation.final_tasks=[{rest},emoji_val]", *given.settings]
        pretrain.main(list({line.partition("=")[0]: line for line in settings}.values()))  # the last of a key is the one
    if len(names) > 1:
        soup = given.out / "soup"
        models = ",".join(f"runs/{name}" for name in names)
        interpolate.main([f"models=[{models}]", "soup=uniform", f"task={rest}", "against=emoji_val", f"out={soup}",
                          "overwrite=true"])
        zero_shot.main([f"model=[{given.start},{soup}/model]", f"task=[{rest},emoji_val]"])


def write_sets(out: Path, *, num: int, seed: int) -> Path:
    """Write `num` drawings of the held-out style as captioned shards, the others as a labelled set; return its folder."""
    samples = read_style()
    random.Random(seed).shuffle(samples)
    with ShardWriter(out / "train", samples_per_shard=num, name="shard-{}.tar") as writer:
        for raw in samples[:num]:
            writer.write({raw.suffix: raw.image or b"", "json": raw.json or b""})
    write_sizes(out / "train", writer.sizes)
    names = [json.loads(raw.json or b"")["label"] for raw in samples[num:]]  # one drawing a concept
    with ShardWriter(out / "rest" / "test", samples_per_shard=len(names), name="{}.tar") as writer:
        for number, raw in enumerate(samples[num:]):
            writer.write({raw.suffix: raw.image or b"", "cls": str(number).encode()})
    write_benchmark_files(out / "rest", "test", names, ["{c}"], len(writer.sizes))
    return out / "rest"


def read_style() -> list[RawSample]:
    """All drawings of the held-out style, in the order of their keys."""
    samples = [raw for shard in emoji_shards("test_style") for raw in read_shard(shard) if isinstance(raw, RawSample)]
    return sorted(samples, key=lambda raw: raw.key)


if __name__ == "__main__":
    main(sys.argv[1:])
