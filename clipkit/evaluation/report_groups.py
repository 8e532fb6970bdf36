"""The part of a report on groups of pictures: the accuracy of each, with its interval, the worst first."""

from collections.abc import Sequence

from clipkit.evaluation.report_numbers import ShownTask
from clipkit.evaluation.report_page import escape, name, percent
from clipkit.evaluation.report_sections import NUM_RECALLS
from clipkit.evaluation.results import Result, is_of_group


def groups_section(shown: ShownTask) -> str:
    """Show each group under the first prompt rule; "" where there are none."""
    found = [one for one in shown.results if one.kind == shown.kind and one.prompts == shown.rules[0]
             and is_of_group(one.metric)]
    metrics = dict.fromkeys(one.metric.partition("[")[0] for one in found)
    return "".join(_metric(metric, [one for one in found if one.metric.startswith(f"{metric}[")]) for metric in metrics)


def _metric(metric: str, groups: Sequence[Result]) -> str:
    ordered = sorted(groups, key=lambda one: (one.value, -one.n, one.metric))
    column = ordered[0].metric.removeprefix(f"{metric}[").partition("=")[0]
    text = (f'<h3>{escape(metric)} by {name(column)}</h3><p class="soft">{len(ordered):,} groups, from '
            f"{percent(ordered[0].value)} to {percent(ordered[-1].value)}; lines are 95% intervals. The lowest of many groups "
            "is low by chance too: look at its interval.</p>")
    columns = {"": ordered[:-(-len(ordered) // 2)], " ": ordered[-(-len(ordered) // 2):]}
    if len(ordered) > 2 * NUM_RECALLS:
        columns = {f"Lowest {NUM_RECALLS}": ordered[:NUM_RECALLS], f"Highest {NUM_RECALLS}": ordered[:-NUM_RECALLS - 1:-1]}
    return text + f'<div class="recalls">{"".join(_column(title, part) for title, part in columns.items())}</div>'


def _column(title: str, groups: Sequence[Result]) -> str:
    lines = []
    for one in groups:
        assert one.ci_low is not None and one.ci_high is not None
        group = one.metric.partition("=")[2].removesuffix("]")
        lines.append(f'<div class="recall wide">{name(group)}<span class="rail"><i style="width:{one.value:.1%}"></i>'
                     f'<s style="left:{one.ci_low:.1%};width:{one.ci_high - one.ci_low:.1%}"></s></span>'
                     f"<span>{percent(one.value)} <small>n {one.n:,}</small></span></div>")
    return f"<div>{f'<h4>{escape(title)}</h4>' if title.strip() else ''}{''.join(lines)}</div>"
