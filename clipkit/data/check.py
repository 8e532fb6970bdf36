"""Read a set of shards once and say what is in it: counts, picture sizes, caption lengths, duplicates, bad samples."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from clipkit.config.visible import visible
from clipkit.data.decode import DecodeError, decode_image
from clipkit.data.samples import SampleError, check_text, parse_json
from clipkit.data.tars import BadSample, RawSample

EXAMPLES_PER_CAUSE = 3


class BadCount:
    """Bad samples by cause, with the first few of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, cause: str, example: str) -> None:
        self.counts[cause] += 1
        if self.counts[cause] <= EXAMPLES_PER_CAUSE:
            self.examples.setdefault(cause, []).append(visible(example))

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> list[str]:
        """One line a cause, most frequent first, each with examples below."""
        lines = []
        for cause, count in self.counts.most_common():
            lines.append(f"  {cause:<24}{count:>10,}")
            lines += [f"    {example}" for example in self.examples[cause]]
            if count > EXAMPLES_PER_CAUSE:
                lines.append(f"    ... and {count - EXAMPLES_PER_CAUSE:,} more")
        return lines


@dataclass
class SetReport:
    """What a pass over a set found. Memory: about 150 bytes a sample."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0  # of pictures
    formats: Counter[str] = field(default_factory=Counter)
    widths: array = field(default_factory=lambda: array("I"))
    heights: array = field(default_factory=lambda: array("I"))
    captions_per_sample: array = field(default_factory=lambda: array("I"))
    caption_tokens: array = field(default_factory=lambda: array("I"))
    labels: Counter[str] = field(default_factory=Counter)
    pictures: Counter[bytes] = field(default_factory=Counter)  # by digest
    captions: Counter[bytes] = field(default_factory=Counter)  # by digest
    repeated: dict[bytes, str] = field(default_factory=dict)  # the captions that occur more than once
    bad: BadCount = field(default_factory=BadCount)


def check_sample(item: RawSample | BadSample, report: SetReport, *, count_tokens: Callable[[str], int],
                 max_pixels: int) -> None:
    """Add one sample to a report.

    Args:
      item: as read_shard gives it.
      report: is added to.
      count_tokens: caption -> its tokens, with the start and end tokens.
      max_pixels: as in decode_image.
    """
    where = f"{item.url} {item.key or ''}".strip()
    if isinstance(item, BadSample):
        report.num_samples += item.key is not None
        report.bad.add(item.cause, f"{where}: {item.detail}")
        return
    report.num_samples += 1
    try:
        if item.image is None:
            raise SampleError("no image", "no .jpg, .png, .webp, ... member")
        height, width, _ = decode_image(item.image, max_pixels=max_pixels).shape
        captions = sample_captions(item)
    except (DecodeError, SampleError) as error:
        report.bad.add(error.cause, f"{where}: {error.detail}")
        return
    report.num_bytes += len(item.image)
    report.formats[item.suffix] += 1
    report.widths.append(width)
    report.heights.append(height)
    report.pictures[_digest(item.image)] += 1
    report.captions_per_sample.append(len(captions))
    if item.label is not None:
        report.labels[item.label.decode("utf-8", "replace").strip()] += 1
    for caption in captions:
        report.caption_tokens.append(count_tokens(caption))
        digest = _digest(caption.encode("utf-8", "surrogatepass"))
        report.captions[digest] += 1
        if report.captions[digest] == 2:
            report.repeated[digest] = caption


def sample_captions(item: RawSample) -> list[str]:
    """All captions of a sample: the json field `captions`, else the .txt; none for a labelled sample.

    Raises:
      SampleError: there is none and no .cls either, or the json or the text cannot be read.
    """
    found = parse_json(item.json).get("captions")
    texts = found if isinstance(found, list) else [found]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions and item.text is not None:
        try:
            captions = [text for text in [item.text.decode("utf-8-sig").strip()] if text]
        except UnicodeDecodeError as error:
            raise SampleError("bad text", f"the .txt is not UTF-8: {error}") from error
    if not captions and item.label is None:
        raise SampleError("no caption", "nothing in captions (json), .txt or .cls")
    return [check_text(caption) for caption in captions]


def report_lines(report: SetReport, context_length: int) -> list[str]:
    """The report as a short table."""
    good = len(report.widths)
    lines = [f"samples             {report.num_samples:,} (shards {report.num_shards:,}), good {good:,}, pictures of "
             f"{report.num_bytes / 1e6:,.1f} MB"]
    if good:
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in report.formats.most_common())
        lines += [f"formats             {kinds}", f"{'':<20}{'min':>8}{'median':>8}{'95 %':>8}{'max':>8}",
                  _spread("width, pixels", report.widths), _spread("height, pixels", report.heights)]
    if report.caption_tokens:
        tokens = np.asarray(report.caption_tokens)
        lines += [_spread("captions a sample", report.captions_per_sample), _spread("tokens a caption", tokens),
                  f"long captions       {np.mean(tokens > context_length):.1%} have more than {context_length} tokens "
                  "and are cut"]
    if report.labels:
        lines.append(f"classes             {len(report.labels):,}, {min(report.labels.values()):,} to "
                     f"{max(report.labels.values()):,} samples each")
    lines += [f"equal pictures      {_repeats(report.pictures)}"] if good else []
    if report.captions:
        lines.append(f"equal captions      {_repeats(report.captions)}")
        most = report.captions.most_common(1)[0]
        if most[1] > 1:
            lines.append(f"                    {most[1]:,} times {_shortened(report.repeated[most[0]])!r}")
    lines.append(f"bad                 {report.bad.total:,}{'' if report.bad.total else ' (all can be used)'}")
    return lines + report.bad.lines()


def check_shards(shards: Iterable[Iterable[RawSample | BadSample]], *, count_tokens: Callable[[str], int],
                 max_pixels: int, progress: Callable[[SetReport], None]) -> SetReport:
    """Read every sample of every shard once.

    Args:
      shards: for each shard its samples, as read_shard gives them.
      count_tokens, max_pixels: as in check_sample.
      progress: called after each sample.
    """
    report = SetReport()
    for samples in shards:
        report.num_shards += 1
        for item in samples:
            check_sample(item, report, count_tokens=count_tokens, max_pixels=max_pixels)
            progress(report)
    return report


def _spread(name: str, values: Sequence[int] | array | np.ndarray) -> str:
    low, middle, high, top = np.percentile(np.asarray(values), (0, 50, 95, 100), method="inverted_cdf")  # values that occur
    return f"{name:<20}{low:>8,.0f}{middle:>8,.0f}{high:>8,.0f}{top:>8,.0f}"


def _repeats(counts: Counter[bytes]) -> str:
    extra = counts.total() - len(counts)
    return f"{extra:,} of {counts.total():,} repeat an earlier one ({extra / counts.total():.1%})" if extra else "none"


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
