"""The part of a report on pictures with several right classes: how well each class finds its pictures."""

from typing import TYPE_CHECKING, Any

from clipkit.evaluation.report_numbers import ShownTask, Thumbnails
from clipkit.evaluation.report_page import counted, escape, name, percent
from clipkit.evaluation.report_sections import NUM_RECALLS, prompts_section

if TYPE_CHECKING:
    from clipkit.evaluation.results import Result


def multi_label_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show the average precision and the AUROC of each class."""
    del thumbnails  # it has no single guess whose picture could be shown
    table = shown.tables["classes"]
    rows = table.loc[table["prompts"] == shown.rules[0]].to_dict("records")
    measured = sorted((row for row in rows if row["num_positive"]), key=lambda row: (row["average_precision"], row["class"]))
    numbers = {result.metric: result for result in shown.results
               if (result.kind, result.prompts) == (shown.kind, shown.rules[0])}
    without = [row["class"] for row in rows if not row["num_positive"]]
    left_out = (f" {counted(len(without), 'class has', 'classes have')} no picture and no part in the mean: "
                f"{', '.join(name(one) for one in without[:5])}{', ...' if len(without) > 5 else ''}." if without else "")
    half = -(-len(measured) // 2)
    columns = {"": measured[:half], " ": measured[half:]}
    if len(measured) > 2 * NUM_RECALLS:
        columns = {f"Lowest {NUM_RECALLS}": measured[:NUM_RECALLS], f"Highest {NUM_RECALLS}": measured[:-NUM_RECALLS - 1:-1]}
    return "\n".join((
        f'<p class="lead">{_lead(numbers, len(measured))}{left_out}</p>',
        "<h3>Average precision of each class</h3>",
        '<p class="soft">How purely the pictures of a class stand at the top when all are ranked for it. The upright mark is '
        "the class's AUROC, n the number of its pictures. Single classes have no interval: with other pictures, those of few "
        "would move most.</p>",
        '<div class="recalls">', *(_column(title, part) for title, part in columns.items()), "</div>",
        prompts_section(shown.prompts, shown.classes),
    ))


def _lead(numbers: "dict[str, Result]", num_classes: int) -> str:
    over = f"over {counted(num_classes, 'class', 'classes')}"
    mean = numbers.get("mean_average_precision")
    if mean is None or mean.ci_low is None or mean.ci_high is None:
        return f"Measured {over}."
    titles = {"macro_auroc": "on average over classes", "micro_auroc": "over all pairs of picture and class"}
    areas = [f"{percent(numbers[metric].value)} {title}" for metric, title in titles.items() if metric in numbers]
    auroc = f" The area under the ROC curve is {', '.join(areas)}." if areas else ""
    return (f"The mean average precision {over} is {percent(mean.value)} (95% interval {percent(mean.ci_low)} to "
            f"{percent(mean.ci_high)}, {mean.n:,} pictures).{auroc}")


def _column(title: str, rows: list[dict[Any, Any]]) -> str:
    lines = []
    for row in rows:
        area = "" if row["auroc"] != row["auroc"] else f'<u style="left:{row["auroc"]:.1%}"></u>'  # NaN: no negative picture
        lines.append(f'<div class="recall wide">{name(row["class"])}<span class="rail"><i style="width:'
                     f'{row["average_precision"]:.1%}"></i>{area}</span>'
                     f'<span>{percent(row["average_precision"])} <small>n {row["num_positive"]:,}</small></span></div>')
    return f"<div>{f'<h4>{escape(title)}</h4>' if title.strip() else ''}{''.join(lines)}</div>"
