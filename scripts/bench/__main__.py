"""`make bench`: all benchmarks beside open_clip_train on this CPU, then the page.

  python -m scripts.bench --peer-python .venv-open-clip/bin/python [--only loader loss] [--full]

Writes docs/benchmarks/<device>.json and redraws docs/benchmarks.md. About a quarter of an hour; --full takes hours.
"""

import argparse
from pathlib import Path

from scripts.bench import growth, loader, loss, step
from scripts.bench.page import write_page

BENCHES = {"loader": loader.bench, "step": step.bench, "loss": loss.bench, "growth": growth.bench}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, required=True, help="Python of the environment of open_clip_train")
    parser.add_argument("--only", nargs="*", default=tuple(BENCHES), choices=tuple(BENCHES))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/cpu.json"))
    parser.add_argument("--full", action="store_true", help="larger batches, all sizes")
    options = parser.parse_args()
    for name in options.only:
        BENCHES[name](options.peer_python, options.out, quick=not options.full)
    print(write_page(options.out.parent, Path("docs/benchmarks.md")))


if __name__ == "__main__":
    main()
