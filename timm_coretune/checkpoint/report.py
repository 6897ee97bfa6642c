"""Report of what a checkpoint gave to a model, and what was left out"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Mapping, Tuple

from ..checks import shorten
from ..redaction import python_path


def few(names: Iterable[str], most: int = 5) -> str:
    """The first few names as text, and how many more there are."""
    return shorten(sorted(names), most) or 'none'


def count_objects(counts: Mapping[str, int]) -> str:
    """Classes and how many objects there are of each, as text."""
    return few(name if number == 1 else f'{name} ({number})' for name, number in counts.items() if number > 0)


def by_head(names: Iterable[str]) -> str:
    """Count names by their part before the first dot, as text."""
    counts = Counter(name.partition('.')[0] for name in names)
    return few((f'{head} ({n})' for head, n in counts.items()), 20)


def create_call(name: str, arguments: Dict[str, Any], checkpoint_path: str = '') -> str:
    """The Python call that creates a timm model, and loads a file if there is one."""
    words = [repr(name), *(f'{key}={value!r}' for key, value in arguments.items())]
    if checkpoint_path:
        words.append(f'checkpoint_path={python_path(checkpoint_path)}')
    return f'timm.create_model({", ".join(words)})'


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint gave to a model.

    Attributes:
        source: The checkpoint as the user named it.
        kind: Format of the files.
        method: Pretraining method or library that writes such files.
        container: Keys that lead to the state dict inside the file, joined by slashes.
        prefix: Start of the keys of the backbone in the state dict.
        copy: Copy of the encoder that was taken (query encoder, teacher, ...).
        why: Why this copy was taken.
        names: How the names inside the backbone were changed, '' if the file has timm's names.
        total: Number of tensors of the backbone.
        loaded: Names of the model's tensors that got their value from the file.
        classifier: Whether the classifier was loaded too.
        renamed: Names of the loaded tensors that have another name in the file.
        resized: Names of the loaded tensors whose values were computed from those in the file, to fit another size:
            position embeddings, patch embeddings and input convolutions.
        cast: Names of the loaded tensors that have another dtype in the file.
        dropped: Keys of heads, queues and other copies of the encoder that were left out.
        missing: Names of the backbone's tensors that are not in the file, and of norms that keep their initial values.
        left_over: Keys of the file that belong neither to the backbone nor to a known head.
        data_config: Mean, std and input size of the pretraining images, as far as they are known. Of tuned weights
            with a config.json of the same timm model also interpolation and crop.
        left_out: Number of objects of each class that a pickle has beside tensors. They were not rebuilt.
        described_by: This config.json, '' if there is none.
        notes: Notes for the user.
        architecture: timm model and its arguments, '' if the report is of `load_checkpoint`.
        model_args: Arguments of the timm model, empty if the report is of `load_checkpoint`.
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
    described_by: str = ''
    left_out: Dict[str, int] = field(default_factory=dict)
    model_args: Dict[str, Any] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        """Number of tensors of the backbone that the file fills."""
        return self.total - len([name for name in self.missing if not name.startswith('fc_norm.')])

    def call(self, checkpoint_path: str = '', **more: Any) -> str:
        """The Python call that creates the timm model, '' if the report is of `load_checkpoint`.

        Args:
            checkpoint_path: File that the call loads, '' for none.
            more: Further arguments, which are written first.
        """
        name = self.architecture.partition(',')[0]
        return create_call(name, {**more, **self.model_args}, checkpoint_path) if name else ''

    @property
    def place(self) -> str:
        """Place of the backbone in the file: container and prefix."""
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
        """The report with one fact on each line."""
        rows = (
            ('source', f'{self.source} ({self.kind})'),
            ('method', self.method),
            ('copy', f'{self.copy} at {self.place}: {self.why}'),
            ('architecture', self.architecture),
            ('create it', self.call()),
            ('coverage', f'{self.matched} of {self.total} backbone tensors'),
            ('classifier', 'in the file' if self.classifier else ''),
            ('names', self.names),
            ('renamed', f'{len(self.renamed)} tensors' if self.renamed else ''),
            ('resized', few(self.resized) if self.resized else ''),
            ('cast', f'{len(self.cast)} tensors' if self.cast else ''),
            ('missing', few(self.missing) if self.missing else ''),
            ('dropped', by_head(self.dropped) if self.dropped else ''),
            ('left over', by_head(self.left_over) if self.left_over else ''),
            ('not read', count_objects(self.left_out) if self.left_out else ''),
            ('data', ', '.join(f'{k} {v}' for k, v in self.data_config.items())),
            *(('note', note) for note in self.notes),
        )
        return '\n'.join(f'{name:13}{value}' for name, value in rows if value)
