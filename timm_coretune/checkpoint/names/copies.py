"""Which of several copies of an encoder is to be loaded, told by the roles that their names speak of

Methods with two encoders train one by gradients and let the other follow as a moving average. Nearly all call them by
the same few words (online and target, student and teacher, query and key). The one that gradients train is taken, as
the authors of most such methods evaluate it. A method whose authors evaluate the other has a row in `rules.py`.
"""

import re
from typing import List, Optional, Sequence, Set, Tuple

TRAINED = ('online', 'student', 'query', 'q')
AVERAGED = ('target', 'teacher', 'momentum', 'key', 'k', 'm', 'ema', 'average', 'averaged', 'avg', 'slow', 'mean')
# beside these words a target is no moving average: adaptation from a source domain to a target domain trains both
_OTHER_ROLES = ('source', 'src')


def _words(label: str) -> List[str]:
    """Words of a name in lower case, whether they are joined by marks or by capital letters."""
    return re.findall(r'[a-z]+', re.sub(r'(?<=[a-z])(?=[A-Z])', '_', label).lower())


def _said(words: Set[str], known: Sequence[str]) -> str:
    """The first of the known words that is among others, alone or as in `targetnet`, '' if none is."""
    return next((word for word in known if words & {word, f'{word}net'}), '')


def choose_copy(labels: Sequence[str]) -> Optional[Tuple[int, str, str]]:
    """Choose among copies of an encoder by their names.

    Args:
        labels: Name of each copy: the keys and the prefix that lead to it.

    Returns:
        Position of the copy that gradients train, what it is called, and why it was chosen. None if the names do not
        tell: none speaks of a moving average, or more than one copy may be the trained one.
    """
    words = [set(_words(label)) for label in labels]
    shared = set.intersection(*words)
    own = [found - shared for found in words]
    averaged = [_said(found, AVERAGED) for found in own]
    rest = [i for i, said in enumerate(averaged) if not said]
    trained = [i for i in rest if _said(own[i], TRAINED)]
    chosen = trained if len(trained) == 1 else rest
    if not any(averaged) or len(chosen) != 1 or any(found & set(_OTHER_ROLES) for found in own):
        return None
    position = chosen[0]
    others = ', '.join(repr(label) for i, label in enumerate(labels) if i != position)
    said = _said(own[position], TRAINED)
    name = {'': 'trained encoder', 'q': 'query encoder'}.get(said, f'{said} encoder')
    return position, name, f'by its name the encoder that gradients train; {others} beside it was not taken'
