"""The part of a report on choices among near misses: how many are right, and the clearest mistakes."""

from typing import TYPE_CHECKING

from clipkit.evaluation.choices import BETWEEN
from clipkit.evaluation.report_numbers import Answer, ShownTask, Thumbnails
from clipkit.evaluation.report_page import counted, name, percent, picture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

NUM_SHOWN = 12
CAPTIONS_OF_PICTURES = "text"  # direction: each picture chooses its caption


def choices_section(shown: ShownTask, thumbnails: Thumbnails) -> str:
    """Show how many questions are right, and those that go wrong by the greatest distance."""
    whole = [answer for answer in shown.answers if not answer.direction]
    num_right, num_tied = sum(answer.right for answer in whole), sum(answer.tied for answer in whole)
    ties = f" {counted(num_tied, 'question is', 'questions are')} missed by an exact tie." if num_tied else ""
    of_captions = [answer for answer in shown.answers if answer.direction == CAPTIONS_OF_PICTURES] or whole
    wrong = sorted((answer for answer in of_captions if not answer.right), key=lambda answer: (answer.margin, answer.key))
    worst = wrong[:NUM_SHOWN]
    pictures = thumbnails(shown.task, list(dict.fromkeys(key for answer in worst for key in answer.key.split(BETWEEN))))
    cards = "".join(_card(answer, pictures) for answer in worst)
    return (f'<p class="lead">All choices are right in {num_right:,} of {counted(len(whole), "question", "questions")} '
            f"({percent(num_right / len(whole))}).{ties}</p><h3>The clearest mistakes</h3>"
            + (f'<p class="soft">Pictures that are nearer to a wrong caption, the greatest distance first.</p>'
               f'<div class="cards">{cards}</div>' if cards else '<p class="soft">None: every picture finds its caption.</p>'))


def _card(answer: Answer, pictures: "Mapping[str, Image]") -> str:
    parts = []
    columns = (answer.key.split(BETWEEN), answer.label_name.split(BETWEEN), answer.guess_name.split(BETWEEN))
    for key, right, chosen in zip(*columns, strict=False):
        texts = {"right": right} if right == chosen else {"right": right, "chosen": chosen}
        lines = "".join(f'<p><small>{what}</small><span class="clip">{name(text)}</span></p>' for what, text in texts.items())
        parts.append(f'<div class="query">{picture(pictures, key, right)}<div>{lines}</div></div>')
    return (f'<div class="card">{"".join(parts)}'
            f'<div class="count">cosine of the right less that of the chosen: {answer.margin:+.3f}</div></div>')
