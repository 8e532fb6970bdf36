"""The parts of a report on learning from labels: what was chosen, and what labelled pictures are worth beside texts."""

import math
import re
from collections.abc import Callable, Sequence

from clipkit.evaluation.report_figures import Curve, curves_figure
from clipkit.evaluation.report_numbers import ShownTask, Thumbnails, surest_first, worst_confusions
from clipkit.evaluation.report_page import counted, name, percent
from clipkit.evaluation.report_sections import NUM_CONFUSIONS, confusion_cards
from clipkit.evaluation.results import Result
from clipkit.evaluation.tasks import CLASSIFICATION

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SHOTS_METRIC = re.compile(r"(?:fewshot|tip_adapter)_k(\d+)_acc1")
POWERS = range(-6, 7, 2)  # of ten, below the curve of lambda


def linear_probe_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show how well a classifier learned from labels does, how its regularisation was chosen, and what it confuses."""
    figure = _choice(shown, "lambdas", "regularisation", title="lambda", scale=math.log10, metric="lp_acc1",
                     ticks=[(power, f"10{str(power).translate(SUPERSCRIPTS)}") for power in POWERS],
                     each="a classifier", of_equals="the strongest regularisation")
    return _learned(shown, thumbnails, "Learned from the labelled pictures of the train split", figure)


def knn_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show how well the nearest labelled pictures do, how their number was chosen, and what they confuse."""
    tried = shown.tables.get("neighbours")
    ticks = [] if tried is None else [(math.log2(k), str(k)) for k in sorted(set(tried["neighbours"]))]
    figure = _choice(shown, "neighbours", "neighbours", title="k", scale=math.log2, metric="knn_acc1", ticks=ticks,
                     each="a number of pictures that vote, at the temperature that was chosen", of_equals="the largest k")
    return _learned(shown, thumbnails, "Named by a vote of the nearest labelled pictures of the train split", figure)


def _learned(shown: ShownTask, thumbnails: Thumbnails, how: str, figure: str) -> str:
    """One classifier that learned from labels: how well it does, what was chosen, what it confuses."""
    answers = surest_first(shown.answers)
    num_right = sum(answer.right for answer in answers)
    confusions = worst_confusions(answers, NUM_CONFUSIONS)
    pictures = thumbnails(shown.task, list(dict.fromkeys(key for one in confusions for key in (one.key, one.guess_key) if key)))
    return "\n".join((
        f'<p class="lead">{how}, on {name(shown.rules[0])}: right for {num_right:,} of '
        f"{counted(len(answers), 'picture', 'pictures')} ({percent(num_right / len(answers))})."
        f"{_zero_shot_sentence(shown.results)}</p>",
        figure,
        "<h3>Worst confusions</h3>", confusion_cards(confusions, pictures),
    ))


def few_shot_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show how accuracy grows with labelled pictures, and how many of them the class texts are worth."""
    del thumbnails  # several classifiers, none of which is shown by itself
    by_shots, zero_shot = _by_shots(shown.results, shown.kind, shown.rules[0]), _zero_shot(shown.results)
    levels = [(title, one.value) for title, one in (("zero-shot", zero_shot), (
        "linear probe, all labels", _result(shown.results, "linear_probe", "lp_acc1"))) if one]
    return _draws(shown, _worth(by_shots, zero_shot), [_draws_curve(shown, "few-shot", by_shots)], levels,
                  "A linear classifier learns from k pictures of each class", "Lambda is")


def tip_adapter_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show what a cache of a few labelled pictures adds to the class texts, beside learning from the same pictures."""
    del thumbnails
    rule = shown.rules[0]
    by_shots, zero_shot = _by_shots(shown.results, shown.kind, rule), _result(shown.results, shown.kind, "zeroshot_acc1", rule)
    learned = _by_shots(shown.results, "few_shot")
    curves = [_draws_curve(shown, "Tip-Adapter", by_shots)]
    curves += [Curve("linear probe", [(math.log2(k), one.value) for k, one in learned])] if learned else []
    last, best = by_shots[-1]
    lead = f"Texts (\u201c{name(rule)}\u201d) and {_pictures(last, best)} in the cache"
    levels = [("zero-shot", zero_shot.value)] if zero_shot else []
    return _draws(shown, f"{lead}; texts alone are right for {percent(zero_shot.value)}." if zero_shot else f"{lead}.", curves,
                  levels, "The k pictures of each class add to the score of their class the more, the nearer they are",
                  "The weights of nearness and of the cache are")


def _draws(shown: ShownTask, lead: str, curves: Sequence[Curve], levels: Sequence[tuple[str, float]], how: str,
           chosen: str) -> str:
    """Accuracy over labelled pictures a class."""
    ticks = [(x, str(round(2**x))) for x, _ in curves[0].points]
    figure = curves_figure(curves, title="Accuracy over labelled pictures a class", levels=levels, ticks=ticks,
                           axis="labelled pictures a class")
    num_draws = max(shown.tables["draws"]["draw"].tolist()) + 1
    return (f'<p class="lead">{lead}</p>'
            f'<div class="columns"><figure>{figure}</figure><div><p class="soft">{how}; the same is done with '
            f"{counted(num_draws, 'draw', 'draws')} of them. Large dots are the means, small "
            f"ones the draws, lines the 95% t intervals over draws. {chosen} chosen on up to 4 further training pictures a "
            "class; the pictures that are measured have no part in it.</p></div></div>")


def _by_shots(results: Sequence[Result], kind: str, rule: str | None = None) -> list[tuple[int, Result]]:
    """The accuracy for each number of labelled pictures a class."""
    found = ((SHOTS_METRIC.fullmatch(one.metric), one) for one in results if one.kind == kind and rule in (None, one.prompts))
    return sorted(((int(match[1]), one) for match, one in found if match), key=lambda pair: pair[0])


def _draws_curve(shown: ShownTask, title: str, by_shots: Sequence[tuple[int, Result]]) -> Curve:
    draws = shown.tables["draws"]
    draws = draws.loc[draws["prompts"] == shown.rules[0]]
    return Curve(title, [(math.log2(k), one.value) for k, one in by_shots],
                 [(one.value if one.ci_low is None else one.ci_low, one.value if one.ci_high is None else one.ci_high)
                  for _, one in by_shots],
                 [(math.log2(row["shots"]), row["accuracy"]) for row in draws.to_dict("records")])


def _choice(shown: ShownTask, table_name: str, column: str, *, title: str, scale: Callable[[float], float], metric: str,
            ticks: Sequence[tuple[float, str]], each: str, of_equals: str) -> str:
    """What was chosen on validation pictures: accuracy there over a column of a table, for each kind of features."""
    table = shown.tables.get(table_name)
    if table is None:
        return ""
    curves, lines = [], []
    for rule in dict.fromkeys(table["prompts"]):
        rows = table.loc[table["prompts"] == rule].sort_values(column).to_dict("records")
        chosen = next(row for row in rows if row["chosen"])
        curve = [row for row in rows if row.get("temperature") == chosen.get("temperature")]
        curves.append(Curve(str(rule), [(scale(row[column]), row["validation_accuracy"]) for row in curve],
                            chosen=scale(chosen[column])))
        test = _result(shown.results, shown.kind, metric, str(rule))
        also = f", temperature {chosen['temperature']:g}" if "temperature" in chosen else ""
        lines.append(f"<tr><td>{name(rule)}</td><td>{chosen[column]:.3g}{also}</td>"
                     f"<td>{percent(chosen['validation_accuracy'])}</td><td>{_with_interval(test)}</td></tr>")
    figure = curves_figure(curves, title=f"Accuracy on validation pictures over {title}", axis=title, ticks=ticks)
    return (f'<h3>The choice of {title}</h3><div class="columns"><figure>{figure}</figure><div><p class="soft">Each dot is '
            f"{each}, measured on {int(table['num_validation'].iloc[0]):,} validation pictures out of the train split; the "
            f"large dot was chosen, of equally good ones {of_equals}. The pictures that are measured were "
            f'looked at once, at the end.</p><div class="scroll"><table><thead><tr><th></th><th>{title}</th>'
            f"<th>validation</th><th>test</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div></div></div>")


def _result(results: Sequence[Result], kind: str, metric: str, prompts: str | None = None) -> Result | None:
    return next((one for one in results if (one.kind, one.metric) == (kind, metric) and prompts in (None, one.prompts)), None)


def _zero_shot(results: Sequence[Result]) -> Result | None:
    """Under the first prompt rule, as everywhere in the report."""
    return _result(results, CLASSIFICATION, "acc1")


def _with_interval(result: Result | None) -> str:
    if result is None or result.ci_low is None or result.ci_high is None:
        return "" if result is None else percent(result.value)
    return f"{percent(result.value)} <small>{100 * result.ci_low:.1f}\u2013{100 * result.ci_high:.1f}</small>"


def _zero_shot_sentence(results: Sequence[Result]) -> str:
    found = _zero_shot(results)
    return f" Texts alone, without a label, give {percent(found.value)} (\u201c{name(found.prompts)}\u201d)." if found else ""


def _worth(by_shots: Sequence[tuple[int, Result]], zero_shot: Result | None) -> str:
    """How many labelled pictures a class the texts are worth."""
    last, best = by_shots[-1]
    if zero_shot is None:
        return f"With {counted(last, 'labelled picture', 'labelled pictures')} a class, {percent(best.value)} are right."
    beaten = [(k, one) for k, one in by_shots if one.value <= zero_shot.value]
    better = [(k, one) for k, one in by_shots if one.value > zero_shot.value]
    parts = [f"Texts alone (\u201c{name(zero_shot.prompts)}\u201d) are right for {percent(zero_shot.value)}"]
    if beaten:
        parts.append(f"no less than a classifier that has learned from {_pictures(*beaten[-1])}")
    if better:
        parts.append(f"less than {'one' if beaten else 'a classifier'} that has learned from {_pictures(*better[0])}")
    return ", ".join(parts) + "."


def _pictures(shots: int, result: Result) -> str:
    return f"{counted(shots, 'picture', 'pictures')} a class ({percent(result.value)})"
