"""Write the drawings of the style that the default run never saw as a folder of class folders: photos to try commands on.

    python scripts/emoji_folders.py photos

1,358 PNGs of 64 pixels in nine folders, by their group: food_&_drink, flags, ...
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from clipkit.data.emoji import emoji_shards
from clipkit.data.tars import RawSample, read_shard


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args(arguments).out
    samples = [raw for shard in emoji_shards("test_style") for raw in read_shard(shard) if isinstance(raw, RawSample)]
    for raw in samples:
        folder = out / json.loads(raw.json or b"")["group"].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{raw.key}.{raw.suffix}").write_bytes(raw.image or b"")
    print(f"wrote {len(samples):,} pictures in {len(list(out.iterdir()))} folders of {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
