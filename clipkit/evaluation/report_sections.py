"""The part of a report on one task: classification in detail, retrieval in detail. The page's frame: report.py."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np

from clipkit.evaluation.calibration import expected_calibration_error, reliability_table
from clipkit.evaluation.report_figures import histogram, reliability_diagram
from clipkit.evaluation.report_numbers import (
    Answer,
    ClassRecall,
    Confusion,
    ShownTask,
    Thumbnails,
    class_recalls,
    rank_histogram,
    surest_first,
    worst_confusions,
)
from clipkit.evaluation.report_page import counted, escape, name, percent, picture
from clipkit.evaluation.report_templates import templates_section
from clipkit.evaluation.statistics import wilson_interval

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_CONFUSIONS = 12
NUM_PICTURES = 12  # in each contact sheet
NUM_RECALLS = 20  # classes with the lowest recall, and as many with the highest
NUM_QUERIES = 6  # worst queries each way
NUM_PROMPT_CLASSES, NUM_PROMPT_TEXTS = 4, 6  # examples of a prompt rule

DIRECTIONS = {"image_retrieval": "Text to image", "text_retrieval": "Image to text"}


def classification_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show what a classifier confuses, which classes it knows, how far its probabilities can be believed, and pictures."""
    answers = surest_first(shown.answers)
    right, wrong = ([answer for answer in answers if answer.right == side] for side in (True, False))
    confusions = worst_confusions(answers, NUM_CONFUSIONS)
    keys = [answer.key for answer in (*right[:NUM_PICTURES], *wrong[:NUM_PICTURES])]
    keys += [key for one in confusions for key in (one.key, one.guess_key) if key]
    pictures = thumbnails(shown.task, list(dict.fromkeys(keys)))
    return "\n".join((
        f'<p class="lead">The first guess is right for {len(right):,} of {counted(len(answers), "picture", "pictures")} '
        f"({percent(len(right) / len(answers))}).{_tie_sentence(answers)}</p>",
        "<h3>Surest and right</h3>", _sheet(right[:NUM_PICTURES], pictures, "No picture is named rightly."),
        "<h3>Surest and wrong</h3>", _sheet(wrong[:NUM_PICTURES], pictures, "No picture is named wrongly."),
        "<h3>Worst confusions</h3>", confusion_cards(confusions, pictures),
        "<h3>Recall of each class</h3>", _recalls(class_recalls(answers), len(shown.classes)),
        _calibration(answers),
        templates_section(shown.tables.get("templates")),
        prompts_section(shown.prompts, shown.classes),
    ))


def retrieval_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show at which place the right answers stand, both ways, and the queries that fare worst."""
    of_direction = {direction: [answer for answer in shown.answers if answer.direction == direction]
                    for direction in DIRECTIONS}
    worst = {direction: sorted((answer for answer in answers if answer.rank), key=lambda answer: -answer.rank)[:NUM_QUERIES]
             for direction, answers in of_direction.items()}
    keys = [answer.key for answers in worst.values() for answer in answers]
    keys += [answer.guess_name for answer in worst["image_retrieval"]]  # the pictures that were found instead
    pictures = thumbnails(shown.task, list(dict.fromkeys(keys)))
    texts_of: dict[str, list[str]] = {}  # the right answers of a picture
    for answer in of_direction["image_retrieval"]:
        texts_of.setdefault(answer.key, []).append(answer.label_name)
    parts = ['<div class="columns">']
    for direction, answers in of_direction.items():
        if answers:
            parts.append(f"<div><h3>{DIRECTIONS[direction]}</h3>{_ranks(answers, DIRECTIONS[direction])}</div>")
    parts.append("</div>")
    for direction, answers in worst.items():
        if answers:
            queries = [_text_query(answer, pictures) if direction == "image_retrieval" else
                       _image_query(answer, pictures, texts_of.get(answer.key, [])) for answer in answers]
            cards = "".join(f'<div class="card">{query}<div class="count">right answer at place {answer.rank + 1:,}</div></div>'
                            for query, answer in zip(queries, answers, strict=True))
            parts.append(f'<h3>{DIRECTIONS[direction]}: the worst queries</h3><div class="cards">{cards}</div>')
    return "\n".join(parts)


def _tie_sentence(answers: Sequence[Answer]) -> str:
    num_tied = sum(answer.tied for answer in answers)
    if not num_tied:
        return ""
    return (f" In {counted(num_tied, 'question', 'questions')} ({percent(num_tied / len(answers))}) another answer has "
            "exactly the top score; the one listed first counts as the guess.")


def _sheet(answers: Sequence[Answer], pictures: "Mapping[str, Image]", empty: str) -> str:
    """Pictures with the guess, its probability, and the right name where the guess is wrong."""
    if not answers:
        return f'<p class="soft">{empty}</p>'
    figures = []
    for answer in answers:
        emphasis = "right" if answer.right else "wrong"
        guess = f'<b class="{emphasis}">{name(answer.guess_name)}</b>{percent(answer.probability)}'
        truth = "" if answer.right else f"<br>is {name(answer.label_name)}"
        figures.append(f"<figure>{picture(pictures, answer.key, answer.label_name)}<figcaption>{guess}{truth}"
                       "</figcaption></figure>")
    return f'<div class="sheet">{"".join(figures)}</div>'


def confusion_cards(confusions: Sequence[Confusion], pictures: "Mapping[str, Image]") -> str:
    """Pairs of pictures: one of the right class, one of the class that it is taken for."""
    if not confusions:
        return '<p class="soft">None: every picture is named rightly.</p>'
    order = ("The most frequent first, of equal ones the surest." if confusions[0].count > 1 else
             "No pair occurs more than once; the surest come first.")
    cards = []
    for one in confusions:
        cards.append(
            f'<div class="card"><div class="pair"><figure>{picture(pictures, one.key, one.label_name)}'
            f'<figcaption>is<b>{name(one.label_name)}</b></figcaption></figure><span class="arrow">\u2192</span>'
            f'<figure>{picture(pictures, one.guess_key, one.guess_name)}'
            f'<figcaption>taken for<b>{name(one.guess_name)}</b></figcaption></figure></div>'
            f'<div class="count">{one.count:,} of {counted(one.num_of_label, "picture", "pictures")}</div></div>')
    return f'<p class="soft">{order}</p><div class="cards">{"".join(cards)}</div>'


def _recalls(recalls: Sequence[ClassRecall], num_classes: int) -> str:
    """How recall spreads over the classes, and the lowest and highest of them."""
    missing = f"; {num_classes - len(recalls):,} more have no picture" if num_classes > len(recalls) else ""
    known = sum(one.hits == one.n for one in recalls)
    unknown = sum(one.hits == 0 for one in recalls)
    text = (f'<p class="soft">{counted(len(recalls), "class has", "classes have")} pictures{missing}. Mean recall '
            f"{percent(fmean(one.recall for one in recalls))}. {known:,} always recognised, {unknown:,} never.")
    if max(one.n for one in recalls) == 1:
        return f"{text} Each has a single picture, so none is shown by itself.</p>"
    if len(recalls) <= 2 * NUM_RECALLS:
        half = -(-len(recalls) // 2)
        return f"{text}</p>{_recall_columns({'': recalls[:half], ' ': recalls[half:]})}"
    highest = sorted(recalls, key=lambda one: (-one.recall, -one.n, one.name))[:NUM_RECALLS]
    text += " Of equal ones, those with most pictures are shown; lines are 95% intervals.</p>"
    return text + _recall_columns({f"Lowest {NUM_RECALLS}": recalls[:NUM_RECALLS], f"Highest {NUM_RECALLS}": highest})


def _recall_columns(columns: Mapping[str, Sequence[ClassRecall]]) -> str:
    parts = []
    for title, recalls in columns.items():
        rows = []
        for one in recalls:
            low, high = wilson_interval(one.recall, one.n)
            rows.append(f'<div class="recall">{name(one.name)}<span class="rail"><i style="width:{one.recall:.1%}"></i>'
                        f'<s style="left:{low:.1%};width:{high - low:.1%}"></s></span>'
                        f"<span>{one.hits:,}/{one.n:,}</span></div>")
        parts.append(f"<div>{f'<h4>{escape(title)}</h4>' if title.strip() else ''}{''.join(rows)}</div>")
    return f'<div class="recalls">{"".join(parts)}</div>'


def _calibration(answers: Sequence[Answer]) -> str:
    """The reliability diagram at the learned scale and at 100, with ECE and NLL."""
    right = np.array([answer.right for answer in answers])  # (N,)
    learned = [answer.probability for answer in answers], [answer.nll for answer in answers]
    at_100 = [answer.probability_100 for answer in answers], [answer.nll_100 for answer in answers]
    scales = {"scale 100": at_100} if learned == at_100 else {"learned scale": learned, "scale 100": at_100}
    curves, lines = [], []
    for title, (probabilities, nll) in scales.items():
        confidence = np.array(probabilities).clip(0, 1)  # (N,) float sums may pass 1
        if np.isnan(confidence).any():
            continue  # a kind of task that has no probabilities
        curves.append((title, reliability_table(confidence, right)))
        lines.append(f"<tr><td>{title}</td><td>{percent(expected_calibration_error(confidence, right))}</td>"
                     f"<td>{fmean(nll):.3f}</td><td>{percent(confidence.mean())}</td><td>{percent(right.mean())}</td></tr>")
    if not curves:
        return ""
    return (
        '<h3>Can the probabilities be believed?</h3><div class="columns">'
        f'<figure>{reliability_diagram(curves)}</figure><div><p class="soft">On the dashed line, guesses with a probability of '
        "70% are right in 70% of the cases; below it the model is too sure of itself, above it too modest. The larger a dot, "
        "the more guesses, which the bars below count; the line through it is the 95% interval.</p>"
        '<div class="scroll"><table><thead><tr><th></th><th>ECE</th><th>NLL, nats</th><th>mean probability</th><th>right</th>'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div></div></div>")


def prompts_section(prompts: Mapping[str, Sequence[Sequence[str]]], classes: Sequence[str]) -> str:
    """Each prompt rule folded away, with the texts of a few classes."""
    if not prompts or not classes:
        return ""
    parts = ["<h3>Prompts</h3>"]
    for rule, texts in prompts.items():
        sizes = sorted({len(of_class) for of_class in texts})
        each = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        items = []
        for class_name, of_class in zip(classes[:NUM_PROMPT_CLASSES], texts, strict=False):
            more = f"<br>and {len(of_class) - NUM_PROMPT_TEXTS:,} more" if len(of_class) > NUM_PROMPT_TEXTS else ""
            lines = "<br>".join(name(text) for text in of_class[:NUM_PROMPT_TEXTS])
            items.append(f"<dt>{name(class_name)}</dt><dd>{lines}{more}</dd>")
        rest = len(texts) - NUM_PROMPT_CLASSES
        items += [f"<dt>and {rest:,} more {'class' if rest == 1 else 'classes'}</dt><dd></dd>"] if rest > 0 else []
        parts.append(f"<details><summary>{name(rule)}<small>{counted(len(texts), 'class', 'classes')}, "
                     f"{each} {'text' if sizes == [1] else 'texts'} each</small></summary><dl>{''.join(items)}</dl></details>")
    return "".join(parts)


def _ranks(answers: Sequence[Answer], title: str) -> str:
    ranks = [answer.rank for answer in answers]
    bars = [(str(one.first) if one.first == one.last else f"{one.first}\u2013{one.last}", one.count)
            for one in rank_histogram(ranks)]
    figure = histogram(bars, title=f"{title}: place of the right answer", axis="place of the right answer (1 = top)",
                       num_strong=1)
    return (f'<p class="soft">{counted(len(ranks), "query", "queries")}; median place {median(ranks) + 1:g}.'
            f"{_tie_sentence(answers)}</p><figure>{figure}</figure>")


def _text_query(answer: Answer, pictures: "Mapping[str, Image]") -> str:
    shown = {"the right picture": picture(pictures, answer.key, answer.label_name),
             "found instead": picture(pictures, answer.guess_name, "the picture found")}
    figures = '<span class="arrow"></span>'.join(f"<figure>{image}<figcaption>{what}</figcaption></figure>"
                                                 for what, image in shown.items())
    return (f'<p class="asked clip">\u201c{name(answer.label_name)}\u201d</p>'
            f'<div class="pair">{figures}</div>')


def _image_query(answer: Answer, pictures: "Mapping[str, Image]", right: Sequence[str]) -> str:
    shown = {"right": "; ".join(right), "found instead": answer.guess_name}
    texts = "".join(f'<p><small>{what}</small><span class="clip">{name(text)}</span></p>'
                    for what, text in shown.items() if text)
    return f'<div class="query">{picture(pictures, answer.key, "; ".join(right) or "the query")}<div>{texts}</div></div>'
