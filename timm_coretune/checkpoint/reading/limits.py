"""What no checkpoint is larger than, and the error for a file that cannot be read"""

from ...checks import clip

MAX_TENSORS = 50_000  # in one checkpoint, over all its files; those of the known methods have less than 10,000
MAX_KEY = 1_000  # characters of a key
MAX_DOTS = 50  # in a key
MAX_ALL_DOTS = 500_000  # in all keys of a file: each part of a key up to a dot may be where the backbone begins
MAX_DEPTH = 8  # dictionaries that are nested deeper are not searched; the deepest known format, of VISSL, has depth 4
MAX_OPERATIONS = 10_000_000  # of a pickle; 50,000 tensors need 2.5 million, and each may make an object of 64 bytes
MAX_JSON = 50 * 2**20  # bytes of a config, of an index and of the header of a safetensors file
MAX_UNPACKED = 20  # times its size that an archive may unpack to


class UnreadableError(ValueError):
    """A file is no checkpoint, or none that can be read."""


def refuse(path: str, got: str, fix: str) -> UnreadableError:
    """Create the error for a file that is no checkpoint: what it is instead, and what to do."""
    return UnreadableError(
        f'Expected a checkpoint in safetensors or PyTorch format, could not read {path!r}: it is {clip(got, 300)}. '
        f'{fix}'
    )


def refuse_damaged(path: str, error: Exception, what: str = 'file') -> UnreadableError:
    """Create the error for a file that its parser fails on, whatever the parser raises."""
    return refuse(path, f'a damaged {what} ({clip(str(error), 200) or type(error).__name__})', 'Get it again.')
