"""`clipkit shards write`: shards from a folder or a table. `clipkit shards check`: what is in a set of shards."""

import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.config.launch import EXIT_BAD_INPUT, launch
from clipkit.config.shards import ShardsCheckConfig, ShardsWriteConfig

if TYPE_CHECKING:
    from clipkit.data.check import BadCount
    from clipkit.data.tables import Record
    from clipkit.data.write import ShardWriter

CAPTIONED_SHARDS = "shard-{:06d}.tar"
BENCHMARK_SHARDS = "{}.tar"  # in a folder of the split's name: CLIP_benchmark's layout of a labelled set
BENCHMARK_SUFFIXES = ("jpg", "png", "webp")  # what CLIP_benchmark reads
TEMPLATES = ("a photo of a {c}.", "an image of a {c}.", "{c}")
BAD_FRACTION_AFTER = 100  # samples; a share of fewer says little, so it is judged at the end
EXIT_BAD_SAMPLES = 1
USAGE = """clipkit shards write source=<folder|table> out=<folder>    shards from pictures with captions or labels
clipkit shards check data=<shards>                        read a set once: counts, sizes, lengths, duplicates, bad samples

clipkit shards write --help and clipkit shards check --help list the settings."""


def main(arguments: Sequence[str]) -> None:
    """Run `write` or `check`, whichever the first argument names."""
    action = arguments[0] if arguments else "--help"
    if action == "write":
        launch("shards/write", ShardsWriteConfig, write_shards, arguments[1:])
    elif action == "check":
        launch("shards/check", ShardsCheckConfig, check_shards, arguments[1:])
    elif action in ("--help", "-h"):
        print(USAGE)
    else:
        print(f"clipkit: shards {action}: no such command; choose write or check", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def write_shards(config: ShardsWriteConfig) -> None:
    """Write the pictures of a folder or a table as WebDataset shards, and a labelled folder as a CLIP_benchmark set.

    Raises:
      FileNotFoundError: the source is not there.
      ValueError: the source cannot be understood, `out` holds shards already, or too much of the source is bad.
      OSError: the shards cannot be written.
    """
    print(f"clipkit shards write: looking at {config.source}", flush=True)
    from clipkit.data.check import BadCount
    from clipkit.data.tables import open_source, split_labelled
    from clipkit.data.write import ShardWriter, existing_shards, write_benchmark_files, write_sizes

    out = Path(config.out).expanduser()
    source = open_source(Path(config.source).expanduser(), image_column=config.image_column,
                         caption_column=config.caption_column, shuffle_seed=config.shuffle_seed,
                         image_root=Path(config.image_root).expanduser() if config.image_root else None)
    print(source.summary, flush=True)
    name = BENCHMARK_SHARDS if source.classnames else CAPTIONED_SHARDS
    if config.test_fraction:
        splits: dict[str, Any] = split_labelled(source, test_fraction=config.test_fraction, seed=config.shuffle_seed)
    else:
        splits = {"test" if source.classnames else "": source.records}
    for split in splits:
        old = existing_shards(out / split, name)
        if old and not config.overwrite:
            raise ValueError(f"{out / split} holds {len(old)} shards already; give another out=..., or overwrite=true to "
                             "replace them")
    bad = BadCount()
    for split, records in splits.items():
        folder = out / split
        try:
            with ShardWriter(folder, samples_per_shard=config.samples_per_shard, name=name) as writer:
                write_samples(records, len(records) if len(splits) > 1 else source.num_records, writer, bad, config,
                              source.classnames)
            if source.classnames:
                write_benchmark_files(out, split, source.classnames, TEMPLATES, len(writer.sizes))
            else:
                write_sizes(out, writer.sizes)
        except OSError as error:
            from clipkit.training.atomic_files import one_line_os_error

            raise one_line_os_error(error, folder) from error
        print(f"wrote {folder}: samples {writer.num_samples:,}, shards {len(writer.sizes):,}, {writer.num_bytes / 1e6:,.1f} MB")
    if bad.total:
        print("\n".join([f"left out as bad: {bad.total:,}", *bad.lines()]))
    print("\n".join(["next:", *(f"  {line}" for line in next_commands(out, list(writer.sizes), list(splits)))]))


def write_samples(records: "Iterable[Record]", num_records: int, writer: "ShardWriter", bad: "BadCount",
                  config: ShardsWriteConfig, classnames: Sequence[str]) -> None:
    """Write each record that can be used, and count the others by cause.

    Args:
      records: what the source holds.
      num_records: how many there will be.
      writer: takes the good ones.
      bad: is added to.
      config: image_size, max_pixels, max_bad_fraction.
      classnames: of a labelled folder, else empty.

    Raises:
      ValueError: too much is bad, or nothing is good.
    """
    from clipkit.data.decode import DecodeError
    from clipkit.data.tables import SourceError
    from clipkit.training.live_line import LiveLine

    line, started = LiveLine(sys.stdout), time.monotonic()
    for count, record in enumerate(records, start=1):
        try:
            writer.write(sample_members(record, config, classnames))
        except (DecodeError, SourceError) as error:
            bad.add(error.cause, f"{record.name}: {error.detail}")
            if count >= BAD_FRACTION_AFTER:
                _check_bad(bad, count, config.max_bad_fraction)
        rate = count / max(time.monotonic() - started, 1e-9)
        line.update(f"{count:,} of {num_records:,}  {rate:,.0f}/s  shards {len(writer.sizes):,}  bad {bad.total:,}",
                    always=count == num_records)
    line.close()
    _check_bad(bad, writer.num_samples + bad.total, config.max_bad_fraction)
    if not writer.num_samples:
        raise ValueError(f"source {config.source!r} gave no sample that can be used{': ' if bad.total else ''}"
                         f"{', '.join(f'{cause} {count:,}' for cause, count in bad.counts.items())}")


def sample_members(record: "Record", config: ShardsWriteConfig, classnames: Sequence[str]) -> dict[str, bytes]:
    """The archive members of one record: picture and label, or picture, caption and the table's other columns."""
    from clipkit.data.tables import read_captions, read_picture
    from clipkit.data.write import picture_member

    captions = read_captions(record) if record.label is None else []
    suffix, picture = picture_member(read_picture(record), image_size=config.image_size, max_pixels=config.max_pixels,
                                     only=BENCHMARK_SUFFIXES if record.label is not None else None)
    if record.label is not None:
        about = json.dumps({"label": classnames[record.label]}, ensure_ascii=False).encode("utf-8", "replace")
        return {suffix: picture, "cls": str(record.label).encode(), "json": about}
    members = {suffix: picture, "txt": captions[0].encode("utf-8", "replace")}
    fields = {**record.fields, **({"captions": captions} if len(captions) > 1 else {})}
    return members | ({"json": json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")} if fields else {})


def next_commands(out: Path, shards: Sequence[str], splits: Sequence[str]) -> list[str]:
    """The command lines to try with the shards just written."""
    if splits != [""]:
        lines = [f"clipkit shards check data={shlex.quote(f'{out}/test/*.tar')}",
                 f"clipkit zero-shot model=ViT-B-32 pretrained=openai task={shlex.quote(str(out))}"]
        tune = (f"clipkit pretrain experiment=finetune_labels model=ViT-B-32 model.pretrained=openai "
                f"data.train={shlex.quote(f'{out}/train/*.tar')} evaluation.final_tasks={shlex.quote(f'[{out},emoji_val]')} "
                f"name={shlex.quote(out.resolve().name)}")
        return [*lines, tune] if "train" in splits else lines
    first, last = (name.removeprefix("shard-").removesuffix(".tar") for name in (shards[0], shards[-1]))
    number = first if first == last else f"{{{first}..{last}}}"
    pattern = shlex.quote(f"{out}/shard-{number}.tar")
    return [f"clipkit shards check data={pattern}",
            f"clipkit pretrain data.train={pattern} name={shlex.quote(out.resolve().name)}"]


def check_shards(config: ShardsCheckConfig) -> int:
    """Read a set of shards once and print what is in it.

    Returns:
      0, or EXIT_BAD_SAMPLES where some samples cannot be used.

    Raises:
      FileNotFoundError: a shard is not there.
      ValueError: the pattern cannot be understood.
    """
    print(f"clipkit shards check: looking for {', '.join(config.data)}", flush=True)
    from clipkit.data import check
    from clipkit.data.shards import expand_shards, read_shard
    from clipkit.training.live_line import LiveLine

    shards = expand_shards(config.data, allow_pipe=config.allow_pipe)
    print(f"shards: {len(shards):,}; loading the tokenizer", flush=True)
    from clipkit.data.tokenize import make_tokenizer

    encode = make_tokenizer({}).tokenizer.encode
    line, started = LiveLine(sys.stdout), time.monotonic()

    def show(report: check.SetReport) -> None:
        rate = report.num_samples / max(time.monotonic() - started, 1e-9)
        line.update(f"shard {report.num_shards:,} of {len(shards):,}  samples {report.num_samples:,}  {rate:,.0f}/s  "
                    f"bad {report.bad.total:,}")

    report = check.check_shards((read_shard(url, allow_pipe=config.allow_pipe) for url in shards),
                                count_tokens=lambda caption: len(encode(caption)) + 2,  # start and end
                                max_pixels=config.max_pixels, progress=show)
    line.close()
    print("\n".join(check.report_lines(report, config.context_length)))
    return EXIT_BAD_SAMPLES if report.bad.total else 0


def _check_bad(bad: "BadCount", count: int, max_bad_fraction: float) -> None:
    if bad.total > max_bad_fraction * count:
        found = ", ".join(f"{cause} {number:,} (as {bad.examples[cause][0]})" for cause, number in
                          bad.counts.most_common(3))
        raise ValueError(f"{bad.total:,} of {count:,} samples are bad, more than max_bad_fraction = {max_bad_fraction}: "
                         f"{found}; nothing was written")
