"""What was loaded from where, and what was not"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Tuple


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names and how many more there are."""
    names = sorted(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more or 'none'


def by_head(names: Iterable[str]) -> str:
    """Names summed up by what they start with."""
    counts = Counter(re.match(r'[^.]*', name).group() for name in names)
    return ', '.join(f'{head} ({n})' for head, n in sorted(counts.items())) or 'none'


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint gave to a model.

    Attributes:
        source: What was loaded, as the user named it.
        kind: Format of its files.
        method: Who writes such files.
        container: Path of keys to the state dict inside the file.
        prefix: What the keys of the backbone start with there.
        copy: Which of the file's encoders that is.
        why: Why this one.
        names: How names inside the backbone were changed, '' where they are timm's.
        total: Tensors of the backbone.
        loaded: Tensors of the model that got their value from the file.
        classifier: Whether the classifier is among them.
        renamed: Of these, those with another name in the file.
        resized: Of these, those computed from the file's: position embeddings, input convolutions.
        cast: Of these, those with another dtype in the file.
        dropped: Heads, memories and other copies of the file that were left out.
        missing: Tensors of the backbone that were not in the file, and norms that start fresh.
        left_over: Tensors of the file beside the backbone that are no known head.
        data_config: Mean, std and input size of the pretraining, as far as known.
        notes: What the user should know.
        architecture: timm model and arguments, where it was looked for.
    """

    source: str
    kind: str
    method: str
    container: str
    prefix: str
    copy: str
    why: str
    names: str
    total: int
    loaded: Tuple[str, ...]
    classifier: bool
    renamed: Tuple[str, ...] = ()
    resized: Tuple[str, ...] = ()
    cast: Tuple[str, ...] = ()
    dropped: Tuple[str, ...] = ()
    missing: Tuple[str, ...] = ()
    left_over: Tuple[str, ...] = ()
    data_config: Dict[str, Any] = field(default_factory=dict)
    notes: Tuple[str, ...] = ()
    architecture: str = ''

    @property
    def matched(self) -> int:
        """Tensors of the backbone that were filled."""
        return self.total - len([name for name in self.missing if not name.startswith('fc_norm.')])

    @property
    def place(self) -> str:
        """Where in the file the backbone is."""
        return '/'.join(filter(None, (self.container, self.prefix))) or 'top'

    def line(self) -> str:
        """The report in one line."""
        changed = {'renamed': self.renamed, 'resized': self.resized, 'cast': self.cast}
        changes = ''.join(f', {len(names)} {what}' for what, names in changed.items() if names)
        return (
            f'{self.source}: {self.method}, {self.copy} ({self.place}), {self.matched} of {self.total} backbone tensors'
            f'{changes}, classifier {"loaded" if self.classifier else "new"}'
        )

    def __str__(self) -> str:
        rows = (
            ('source', f'{self.source} ({self.kind})'),
            ('method', self.method),
            ('copy', f'{self.copy} at {self.place}: {self.why}'),
            ('architecture', self.architecture),
            ('coverage', f'{self.matched} of {self.total} backbone tensors'),
            ('classifier', 'in the file' if self.classifier else ''),
            ('names', self.names),
            ('renamed', f'{len(self.renamed)} tensors' if self.renamed else ''),
            ('resized', few(self.resized) if self.resized else ''),
            ('cast', f'{len(self.cast)} tensors' if self.cast else ''),
            ('missing', few(self.missing) if self.missing else ''),
            ('dropped', by_head(self.dropped) if self.dropped else ''),
            ('left over', by_head(self.left_over) if self.left_over else ''),
            ('data', ', '.join(f'{k} {v}' for k, v in self.data_config.items())),
            *(('note', note) for note in self.notes),
        )
        return '\n'.join(f'{name:13}{value}' for name, value in rows if value)
