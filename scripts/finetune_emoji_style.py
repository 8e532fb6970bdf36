"""Fine-tune the emoji run on a drawing style that it never saw, and see what was won and what was forgotten.

    python scripts/finetune_emoji_style.py --start runs/emoji

300 labelled drawings of the held-out style (EmojiTwo), chosen by seed, are trained on; the other 1,058, of other concepts, are
the target, and `emoji_val` (the styles of training) is what may be forgotten. Writes the two sets to --out, and a run.
Each batch is 30 % new drawings and 70 % those of before.

Expected (seed 0): the rest of the style 38.1 % -> 40.2 %, emoji_val (label) 71.0 % -> 69.5 %. The new
drawings alone (40 epochs in batches of 100, lr 5e-4, layer_decay 0.8) lose on both: 34.5 % and 54.1 %.
"""

import argparse
import json
import random
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from clipkit.commands import pretrain
from clipkit.data.emoji import emoji_shards
from clipkit.data.write import ShardWriter, write_benchmark_files, write_sizes

SETTINGS = ("experiment=finetune", "data=emoji", "loss=emoji", "optim=emoji", "train=emoji", "evaluation=emoji",
            "loss.mask_false_negatives=concept", "data.weights=[0.7,0.3]", "optim.lr=3e-4", "optim.layer_decay=null",
            "optim.text_lr_scale=0.1", "train.epochs=null", "train.samples=16_000", "train.global_batch_size=256")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--start", default="runs/emoji", help="the run to start from")
    parser.add_argument("--out", type=Path, default=Path("emojitwo"), help="folder for the two sets")
    parser.add_argument("--num", type=int, default=300, help="drawings to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings that are chosen, and of the run")
    parser.add_argument("settings", nargs="*", help="further settings of clipkit pretrain")
    given = parser.parse_args(arguments)
    rest = write_sets(given.out, num=given.num, seed=given.seed)
    settings = [*SETTINGS, f"model.start={given.start}", f"data.train=[emoji,{given.out}/train/shard-0.tar]",
                f"seed={given.seed}", f"name=emojitwo_{given.seed}", "evaluation.tasks=[]",
                f"evaluation.final_tasks=[{rest},emoji_val,emoji_test_concept]", *given.settings]
    pretrain.main(list({line.partition("=")[0]: line for line in settings}.values()))  # the last of a key is the one


def write_sets(out: Path, *, num: int, seed: int) -> Path:
    """Write `num` drawings of the held-out style as captioned shards, the others as a labelled set; return its folder."""
    samples = read_style()
    random.Random(seed).shuffle(samples)
    with ShardWriter(out / "train", samples_per_shard=num, name="shard-{}.tar") as writer:
        for sample in samples[:num]:
            writer.write(sample)
    write_sizes(out / "train", writer.sizes)
    names = [json.loads(sample["json"])["label"] for sample in samples[num:]]  # one drawing a concept
    with ShardWriter(out / "rest" / "test", samples_per_shard=len(names), name="{}.tar") as writer:
        for number, sample in enumerate(samples[num:]):
            writer.write({"png": sample["png"], "cls": str(number).encode()})
    write_benchmark_files(out / "rest", "test", names, ["{c}"], len(writer.sizes))
    return out / "rest"


def read_style() -> list[dict[str, bytes]]:
    """All drawings of the held-out style, {member: content} each, in the order of their keys."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in emoji_shards("test_style"):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[suffix] = content.read()
    return [samples[key] for key in sorted(samples)]


if __name__ == "__main__":
    main(sys.argv[1:])
