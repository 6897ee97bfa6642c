"""Finds out whether records, such as those of Hugging Face, have the fields of the image and the label"""

from typing import Any

from timm.data.readers.targets import has_field, parse_target_keys

from ...checks import shorten
from ..cli.settings import DataSettings

_DEFAULTS = {'--input-key': 'image', '--target-key': 'label'}  # those of timm


def check_fields(features: Any, settings: DataSettings) -> None:
    """Raise a ValueError that names the fields there are, if one that is to be read is missing.

    Args:
        features: Fields by name, or a record.
        settings: The names of the fields that are to be read.
    """
    asked = {'--input-key': settings.input_key, '--target-key': settings.target_key}
    for flag, default in _DEFAULTS.items():
        key = asked[flag] or default
        missing = [name for name in parse_target_keys(key) or (key,) if not has_field(features, name)]
        if missing:
            told = f'{flag} {key}' if asked[flag] else f'{key!r}, the default of {flag},'
            fix = f'Name one of them by {flag}.' if len(missing) < 2 else f'Missing: {shorten(missing)}.'
            raise ValueError(
                f'Expected the field {told} in {settings.dataset}, which has {shorten(sorted(features), 20)}. {fix}'
            )


def check_stream(reader: Any, settings: DataSettings) -> None:
    """The same for a stream of Hugging Face, of which the first record is read if its description tells no fields."""
    open_stream = getattr(getattr(reader, 'builder', None), 'as_streaming_dataset', None)
    if open_stream is not None:
        check_fields(reader.builder.info.features or next(iter(open_stream(split=reader.split))), settings)
