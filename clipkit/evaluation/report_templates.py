"""The part of a report on prompt templates: what each is worth alone, and what the others are worth without it."""

from typing import TYPE_CHECKING, Any

from clipkit.evaluation.report_figures import difference_bar, interval_bar
from clipkit.evaluation.report_page import counted, name, percent

if TYPE_CHECKING:
    from pandas import DataFrame

NUM_SHOWN = 10  # templates that help most, and as many that help least


def templates_section(table: "DataFrame | None") -> str:
    """Show the templates of each prompt rule, sorted by what the whole loses without them. "" where none were measured.

    Args:
      table: columns `prompts` and those of template_effects.COLUMNS.
    """
    if table is None or not len(table):
        return ""
    parts = ["<h3>What each template does</h3>",
             '<p class="soft">Each template by itself, and all the others without it. Differences are to the whole, in points '
             "of accuracy, with 95% intervals over the same pictures; in blue where that leaves out 0. Of 20 templates that "
             "do nothing, about one stands so by chance.</p>"]
    for rule, rows in table.groupby("prompts", sort=False):
        parts.append(_rule_table(str(rule), rows.to_dict("records")))
    return "".join(parts)


def _rule_table(rule: str, rows: list[dict[Any, Any]]) -> str:
    limit = max(abs(row[f"without_difference_ci_{end}"]) for row in rows for end in ("low", "high")) or 1.0
    whole = rows[0]
    lines = [f'<tr class="whole"><td>all {len(rows)}, {name(rule)}</td><td>{percent(whole["acc1_whole"])}</td><td></td>'
             "<td></td><td></td><td></td><td></td></tr>"]
    shown = rows if len(rows) <= 2 * NUM_SHOWN else [*rows[:NUM_SHOWN], None, *rows[-NUM_SHOWN:]]
    for row in shown:
        if row is None:
            between = counted(len(rows) - 2 * NUM_SHOWN, "template", "templates")
            lines.append(f'<tr><td class="soft" colspan="7">{between} between; all of them are in templates.csv</td></tr>')
            continue
        bars = (interval_bar(row["acc1_alone"], row["alone_ci_low"], row["alone_ci_high"]),
                difference_bar(row["without_difference"], row["without_difference_ci_low"],
                               row["without_difference_ci_high"], limit))
        lines.append(f'<tr><td>{name(row["template"])}</td><td>{percent(row["acc1_alone"])}</td><td>{bars[0]}</td>'
                     f'<td>{_points(row, "alone")}</td><td>{percent(row["acc1_without"])}</td><td>{bars[1]}</td>'
                     f'<td>{_points(row, "without")}</td></tr>')
    titles = ("template", "alone", "", "alone less the whole", "without it", "", "without it less the whole")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (f'<div class="scroll"><table class="effects"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
            "</table></div>")


def _points(row: dict[Any, Any], which: str) -> str:
    value, low, high = (100 * row[f"{which}_difference{end}"] for end in ("", "_ci_low", "_ci_high"))
    return f"{value:+.1f} <small>{low:+.1f} to {high:+.1f}</small>"
