"""Mistakes of a model as pictures, with the training images whose features are nearest"""

from typing import List, NamedTuple

from .html import Picture, listed, name, number, paragraph, section, text


class Neighbour(NamedTuple):
    """A training image near a mistake.

    Attributes:
        picture: The image.
        label: Name of its class.
        cosine: Cosine of its features and those of the mistake.
    """

    picture: Picture
    label: str
    cosine: float


class Mistake(NamedTuple):
    """A held-out image that was classified wrongly.

    Attributes:
        picture: The image.
        label: Name of its true class.
        said: Name of the class that was said.
        probability: Probability of that class, by the model.
        neighbours: Training images, the nearest first.
    """

    picture: Picture
    label: str
    said: str
    probability: float
    neighbours: List[Neighbour]


def show_mistakes(mistakes: List[Mistake], num_mistakes: int, source: str) -> str:
    """The section of mistakes.

    Args:
        mistakes: Those to show, the most confident first.
        num_mistakes: How many there are.
        source: Sentence that tells which images were looked at.
    """
    if not mistakes:
        return section('mistakes', 'Mistakes', paragraph(source, 'None of them was classified wrongly.'))
    which = f'{number(num_mistakes, 0)} of them were classified wrongly. Shown'
    which += ' are all' if num_mistakes == len(mistakes) else f' are {len(mistakes)}'
    which += ', those with the highest probability of the wrong class first.'
    below = ''
    if any(mistake.neighbours for mistake in mistakes):
        below = (
            'Below each: the training images whose features are nearest, with the cosine. '
            'A <span class="said">red</span> frame is the class that was said, '
            'a <span class="true">green</span> one the true class.'
        )
    return section('mistakes', 'Mistakes', paragraph(source, which, below), listed([*map(_show, mistakes)], 'mistakes'))


def _kind(neighbour: Neighbour, mistake: Mistake) -> str:
    return {mistake.label: 'true', mistake.said: 'said'}.get(neighbour.label, 'other')


def _show(mistake: Mistake) -> str:
    near = [
        f'<span class="{_kind(neighbour, mistake)}" title="{text(neighbour.label)}">'
        f'{neighbour.picture.show(text(f"training image of class {neighbour.label}"))}{neighbour.cosine:.2f}</span>'
        for neighbour in mistake.neighbours
    ]
    return (
        f'<div class="what">{mistake.picture.show(text(f"image of class {mistake.label}"))}<dl>'
        f'<dt>true</dt><dd>{name(mistake.label)}</dd><dt>said</dt><dd class="said">{name(mistake.said)} '
        f'<b>{number(100 * mistake.probability)}&nbsp;%</b></dd></dl></div>'
        + (f'<div class="near">{"".join(near)}</div>' if near else '')
    )
