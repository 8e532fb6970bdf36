"""The same evaluation by clipkit and by CLIP_benchmark's command line: equality first, then times side by side.

  python scripts/bench/clip_benchmark.py --clip-benchmark <its environment>/bin/clip_benchmark --model runs/emoji

CLIP_benchmark (1.6.2 was tried) wants an environment of its own: pip install clip-benchmark==1.6.2 "numpy<2.3" requests.
The tasks are five sets of prompts over one set of pictures, written in CLIP_benchmark's layout. It runs once for each;
clipkit measures all five in one command, its embedding store empty at first, then once more from the store.

Expected: acc1, acc5 and mean_per_class_recall equal in every task; CLIP_benchmark's five runs take at least 3 times
clipkit's one, most of which is start-up when the model is small.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT_SETS = (("{}",), ("a picture of a {}",), ("an emoji of a {}", "{} emoji"),
               ("a drawing of a {}", "an icon of a {}", "{}"), ("a {} sign", "a small {}", "a large {}", "the {}"))
METRICS = ("acc1", "acc5", "mean_per_class_recall")
Numbers = list[dict[str, float]]  # of each prompt set


def main() -> None:
    options = arguments()
    repeats = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        split = write_set(options.task, folder / "set")
        for number in range(options.repeats):
            theirs, their_seconds = timed(lambda: run_clip_benchmark(options, folder, split))
            ours, our_seconds = timed(lambda number=number: run_clipkit(options, folder, split, f"cache{number}"))
            again, stored_seconds = timed(lambda number=number: run_clipkit(options, folder, split, f"cache{number}"))
            for one in (ours, again):
                if one != theirs:
                    sys.exit(f"the numbers differ: clipkit {one}, CLIP_benchmark {theirs}")
            seconds = {"clip_benchmark": their_seconds, "clipkit": our_seconds, "clipkit_stored": stored_seconds}
            ratios = {clock: their_seconds[clock] / our_seconds[clock] for clock in their_seconds}
            repeats.append({"seconds": seconds, "ratio": ratios})
            print(f"repeat {number}: {seconds}; CLIP_benchmark / clipkit {ratios}", flush=True)
    report = {"model": options.model, "task": options.task, "prompt_sets": PROMPT_SETS, "numbers": ours, "repeats": repeats,
              "threads": options.threads, "machine": platform.processor() or platform.machine()}
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip-benchmark", required=True, help="its command")
    parser.add_argument("--model", default="runs/emoji", help="a run or a model folder")
    parser.add_argument("--task", default="emoji_test_style", help="as in clipkit zero-shot")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file for the figures")
    return parser.parse_args()


def write_set(task_name: str, folder: Path) -> str:
    """Write a task in CLIP_benchmark's layout; return its split."""
    from clipkit.evaluation.benchmark_writer import write_benchmark_set
    from clipkit.evaluation.tasks import load_task

    task = load_task(task_name)
    write_benchmark_set(task, folder)
    return task.split


def run_clip_benchmark(options: argparse.Namespace, folder: Path, split: str) -> Numbers:
    model = Path(options.model)
    model = (model / "model" if (model / "model").is_dir() else model).resolve()
    found = []
    for templates in PROMPT_SETS:
        (folder / "templates.json").write_text(json.dumps({"wds/set": [text.replace("{}", "{c}") for text in templates]}))
        run([options.clip_benchmark, "eval", "--dataset=wds/set", f"--dataset_root={folder / 'set'}", f"--split={split}",
             "--task=zeroshot_classification", f"--model=local-dir:{model}", "--pretrained=", "--num_workers=1", "--no_amp",
             "--batch_size=256", f"--custom_template_file={folder / 'templates.json'}", f"--output={folder / 'theirs.json'}",
             "--quiet"], options.threads)
        metrics = json.loads((folder / "theirs.json").read_text())["metrics"]
        found.append({name: metrics[name] for name in METRICS})
    return found


def run_clipkit(options: argparse.Namespace, folder: Path, split: str, cache: str) -> Numbers:
    files = []
    for number, templates in enumerate(PROMPT_SETS):
        files.append(folder / f"templates{number}.txt")
        files[-1].write_text("".join(f"{text}\n" for text in templates))
    run([sys.executable, "-m", "clipkit", "zero-shot", f"model={options.model}", f"task={folder / 'set' / split}",
         f"templates=[{','.join(map(str, files))}]", f"out={folder / 'ours'}", f"cache_dir={folder / cache}", "report=false"],
        options.threads)
    rows = json.loads((folder / "ours" / "results.json").read_text())
    return [{row["metric"]: row["value"] for row in rows if row["prompts"] == str(file) and row["metric"] in METRICS}
            for file in files]


def run(command: list[str], threads: int) -> None:
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def timed(call: Callable[[], Numbers]) -> tuple[Numbers, dict[str, float]]:
    """What a call returns, and its seconds by the clock and in processor time (its child processes')."""
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    numbers = call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return numbers, {"clock": time.perf_counter() - clock,
                     "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


if __name__ == "__main__":
    main()
