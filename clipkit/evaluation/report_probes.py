"""The parts of a report on probes: the choice of lambda, and what labelled pictures are worth beside texts."""

import math
from collections.abc import Sequence

from clipkit.evaluation.report_figures import Curve, curves_figure
from clipkit.evaluation.report_numbers import ShownTask, Thumbnails, surest_first, worst_confusions
from clipkit.evaluation.report_page import counted, name, percent
from clipkit.evaluation.report_sections import NUM_CONFUSIONS, confusion_cards
from clipkit.evaluation.results import Result
from clipkit.evaluation.tasks import CLASSIFICATION

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
POWERS = range(-6, 7, 2)  # of ten, below the curve of lambda


def linear_probe_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show how well a classifier learned from labels does, how its regularisation was chosen, and what it confuses."""
    answers = surest_first(shown.answers)
    num_right = sum(answer.right for answer in answers)
    confusions = worst_confusions(answers, NUM_CONFUSIONS)
    pictures = thumbnails(shown.task, list(dict.fromkeys(key for one in confusions for key in (one.key, one.guess_key) if key)))
    return "\n".join((
        f'<p class="lead">Learned from the labelled pictures of the train split, on {name(shown.rules[0])}: right for '
        f"{num_right:,} of {counted(len(answers), 'picture', 'pictures')} ({percent(num_right / len(answers))})."
        f"{_zero_shot_sentence(shown.results)}</p>",
        _lambda_curve(shown),
        "<h3>Worst confusions</h3>", confusion_cards(confusions, pictures),
    ))


def few_shot_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show how accuracy grows with labelled pictures, and how many of them the class texts are worth."""
    del thumbnails  # several classifiers, none of which is shown by itself
    draws = shown.tables["draws"]
    found = {int(result.metric.removeprefix("fewshot_k").removesuffix("_acc1")): result for result in shown.results
             if result.kind == shown.kind}
    by_shots = sorted(found.items())
    curve = Curve("few-shot", [(math.log2(k), one.value) for k, one in by_shots],
                  [(one.value if one.ci_low is None else one.ci_low, one.value if one.ci_high is None else one.ci_high)
                   for _, one in by_shots],
                  [(math.log2(row["shots"]), row["accuracy"]) for row in draws.to_dict("records")])
    levels = [(title, one.value) for title, one in (("zero-shot", _zero_shot(shown.results)), (
        "linear probe, all labels", _result(shown.results, "linear_probe", "lp_acc1"))) if one]
    figure = curves_figure([curve], title="Accuracy over labelled pictures a class", levels=levels,
                           axis="labelled pictures a class", ticks=[(math.log2(k), str(k)) for k, _ in by_shots])
    num_draws = max((int(row["draw"]) + 1 for row in draws.to_dict("records")), default=0)
    return (f'<p class="lead">{_worth(by_shots, _zero_shot(shown.results))}</p>'
            f'<div class="columns"><figure>{figure}</figure><div><p class="soft">A linear classifier learns from k pictures of '
            f"each class; the same is done with {counted(num_draws, 'draw', 'draws')} of them. Large dots are the means, small "
            "ones the draws, lines the 95% t intervals over draws. Lambda is chosen on up to 4 further training pictures a "
            "class; the pictures that are measured have no part in it.</p></div></div>")


def _lambda_curve(shown: ShownTask) -> str:
    table = shown.tables.get("lambdas")
    if table is None:
        return ""
    curves, lines = [], []
    for rule in dict.fromkeys(table["prompts"]):
        rows = table.loc[table["prompts"] == rule].sort_values("regularisation").to_dict("records")
        chosen = next(row for row in rows if row["chosen"])
        curves.append(Curve(str(rule), [(math.log10(row["regularisation"]), row["validation_accuracy"]) for row in rows],
                            chosen=math.log10(chosen["regularisation"])))
        test = _result(shown.results, shown.kind, "lp_acc1", str(rule))
        lines.append(f"<tr><td>{name(rule)}</td><td>{chosen['regularisation']:.3g}</td>"
                     f"<td>{percent(chosen['validation_accuracy'])}</td><td>{_with_interval(test)}</td></tr>")
    figure = curves_figure(curves, title="Accuracy on validation pictures over lambda", axis="lambda",
                           ticks=[(power, f"10{str(power).translate(SUPERSCRIPTS)}") for power in POWERS])
    return (f'<h3>The choice of lambda</h3><div class="columns"><figure>{figure}</figure><div><p class="soft">Each dot is a '
            f"classifier, measured on {int(table['num_validation'].iloc[0]):,} validation pictures out of the train split; the "
            "large dot was chosen, of equally good ones the strongest regularisation. The pictures that are measured were "
            'looked at once, at the end.</p><div class="scroll"><table><thead><tr><th></th><th>lambda</th>'
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
