"""Keep secrets and home folders out of what is printed, written and sent

Secrets are logins and keys in URLs, access tokens, and values of names such as api_key. REDACTED stands for each. A
home folder becomes ~, or ~name if it is that of someone else; `expand_home` reverts this in settings that are read.
"""

import contextlib
import logging
import ntpath
import os
import re
import shlex
import sys
import traceback
import urllib.parse
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Set, TextIO, Tuple, TypeVar, cast

Value = TypeVar('Value')

REDACTED = 'REDACTED'
_SHORTEST = 6  # letters of a secret that is replaced wherever it stands; shorter ones may be parts of words
# names in the query of a URL whose values say what is asked for. All others may be keys
_HARMLESS = {
    *('alt', 'dl', 'download', 'export', 'file', 'filename', 'format', 'id', 'name', 'path', 'raw', 'ref', 'rev'),
    *('revision', 'v', 'version'),
}
_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://[^\s"<>|\\^`{}]+')
_SECRET_IN_QUERY = re.compile(r'sig|token|key|cred|pass|pw|auth|secret|hash|policy|code', re.IGNORECASE)
_END_OF_SENTENCE = '\'"),.;:'
# whole names, and ends of names such as WANDB_API_KEY; but not class_token
_SECRET_NAME = re.compile(
    r'(?!(?:.*[-_.])?(?:cls|class|dist|distill|mask|pos|prompt|query|reg|register)[-_]?token$)(?:[\w.-]*[-_.])?'
    r'(?:(?:api|access|account|auth|encryption|kaggle|private|secret|shared|signing)[-_]?key(?:[-_]?id)?|'
    r'passw(?:or)?d|passphrase|pwd|secret|credentials?|authorization|signature|'
    r'(?:access|api|auth|bearer|hf|id|oauth|refresh|sas|security|session|user)?token)',
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r'(?<![\w.-])([\w.-]{3,60})(["\']?\s*[=:]\s*["\']?)([^\s"\',;&)}\]]{6,})')
_AUTHORIZED = re.compile(r'\b(Bearer|Basic)\s+[A-Za-z0-9+/=._~-]{8,}')
_TOKENS = re.compile(
    r'\bhf_[A-Za-z0-9]{8,}|\bhf_oauth_[\w.-]{8,}|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bAIza[\w-]{30,}|'
    r'\b(?:gh[opusr]_|github_pat_|glpat-|wandb_v\d_|sk-|xox[abprs]-)[\w-]{16,}|\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?'
)
_HOME_OF_ANYONE = re.compile(r'(?<![\w.~-])(?:/home/|/Users/|[A-Za-z]:\\{1,2}Users\\{1,2})([\w.-]*\w)')
_TILDE = re.compile(r'(?<![\w.~-])~([\w.-]*)(?=[/\\]|$)')
# an absolute path, or one that leads upwards, also behind such as hfds/ or local-dir:
_PATH = re.compile(r'(?P<before>(?:[\w-]{2,}[:/])?)(?P<path>(?:~[\w.-]*|\.\.|[A-Za-z]:|)[/\\].*)', re.DOTALL)

_known: Set[str] = set()  # secrets of this process


def split_url(url: str) -> Tuple[str, List[str]]:
    """A URL without what may be secret in it, and those parts that are secret by their place or name."""
    secrets: List[str] = []

    def hide(part: str, is_secret: bool = True) -> str:
        secrets.extend([part] if is_secret and part else [])
        return REDACTED if part else ''

    def hide_value(part: str) -> str:
        name, equals, value = part.partition('=')
        if name.lower() in _HARMLESS or part in '&;':
            return part
        return f'{name}={hide(value, bool(_SECRET_IN_QUERY.search(name)))}' if equals else hide(part, len(part) > 15)

    scheme, _, rest = url.partition('://')
    # a password may have marks in it that should have been encoded
    has_odd_login = re.match(r'[^/?#@\[]*:(?!\d*(?:[/?#]|$))', rest) and '@' in rest
    login, at, rest = rest.rpartition('@') if has_odd_login else ('', '', rest)
    rest, mark, fragment = rest.partition('#')
    rest, question, query = rest.partition('?')
    if not at:
        authority, slash, path = rest.partition('/')
        login, at, host = authority.rpartition('@')
        rest = f'{host}{slash}{path}'
    query = ''.join(hide_value(part) for part in re.split('([&;])', query))
    if not re.fullmatch(r'[a-z_.-]*', fragment):  # a place in a page is a word, the key to a file is not
        fragment = hide(fragment)
    return f'{scheme}://{hide(login)}{at}{rest}{question}{query}{mark}{fragment}', secrets


def _redact_url(match: 're.Match[str]') -> str:
    url = match.group().rstrip(_END_OF_SENTENCE)
    return split_url(url)[0] + match.group()[len(url) :]


def _redact_assigned(match: 're.Match[str]') -> str:
    name, between, value = match.groups()
    is_secret = _SECRET_NAME.fullmatch(name) and not value.startswith('//')
    return f'{name}{between}{REDACTED}' if is_secret else match.group()


def _homes() -> List[str]:
    """The home folder of the user under all of its names, long ones first."""
    found = {os.path.expanduser('~')}
    with contextlib.suppress(ImportError, KeyError):  # Windows, or a user without an entry
        import pwd

        found.add(pwd.getpwuid(os.getuid()).pw_dir)
    found |= {os.path.realpath(home) for home in found}
    return sorted({home.rstrip('/\\') for home in found if os.path.isabs(home)} - {''}, key=len, reverse=True)


def redact(text: str) -> str:
    """Replace the secrets in a text, and home folders at the start of paths."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    if '://' in text:
        text = _URL.sub(_redact_url, text)
    text = _TOKENS.sub(REDACTED, _AUTHORIZED.sub(rf'\1 {REDACTED}', text))
    text = _ASSIGNED.sub(_redact_assigned, text)
    for home in _homes():
        if home in text:
            text = re.sub(rf'(?<![\w.~-]){re.escape(home)}(?![\w.-]*\w)', '~', text)
    return _HOME_OF_ANYONE.sub(r'~\1', text)


def strip_path(text: str) -> str:
    """Redact a setting, and leave only the last part of a path that tells how a machine is organized."""
    text = redact(text)
    match = None if '://' in text else _PATH.fullmatch(text)
    return text if match is None else match['before'] + ntpath.basename(match['path'].rstrip('/\\'))


def _home_of(name: str) -> Optional[str]:
    known = os.path.expanduser(f'~{name}')
    places = [os.path.join(root, name) for root in ('/home', '/Users')] if known.startswith('~') else [known]
    return next((place for place in places if os.path.isdir(place)), None)


def expand_home(text: str) -> str:
    """Write the home folders in full that `redact` has shortened in a setting."""
    return _TILDE.sub(lambda match: _home_of(match[1]) or match[0], text)


def python_path(path: str) -> str:
    """Write a path as Python code."""
    shown = redact(path)
    return f'os.path.expanduser({shown!r})' if shown.startswith('~') else repr(shown)


def join_command(words: Sequence[str]) -> str:
    """Write a shell command without secrets. A ~ at the start of a word is left to the shell to expand."""
    found = [cast('re.Match[str]', re.fullmatch(r'(~[\w.-]*/|)(.*)', redact(word), re.DOTALL)) for word in words]
    return ' '.join(match[1] + (shlex.quote(match[2]) if match[2] or not match[1] else '') for match in found)


def map_texts(value: Value, change: Callable[[str], str], of_secret: Optional[Callable[[str], str]] = None) -> Value:
    """Change the texts in a value, which may be nested in lists and mappings.

    Args:
        value: The value.
        change: Gives the new text.
        of_secret: Gives the new text of a value whose name is that of a secret, such as api_key. When None change does.
    """
    result: Any = value
    if isinstance(value, str):
        result = change(value)
    elif isinstance(value, Mapping):
        result = {}
        for name, item in value.items():
            is_secret = of_secret is not None and isinstance(item, str) and _SECRET_NAME.fullmatch(str(name))
            result[name] = map_texts(item, of_secret if is_secret and of_secret else change, of_secret)
    elif type(value) in (list, tuple):
        items = [map_texts(item, change, of_secret) for item in cast(Sequence[Any], value)]
        result = items if isinstance(value, list) else tuple(items)
    return cast(Value, result)


def redact_values(value: Value, change: Callable[[str], str] = redact) -> Value:
    """Redact the texts in a value, which may be nested in lists and mappings."""
    return map_texts(value, change, lambda text: REDACTED if text else text)


def remember(settings: Any) -> None:
    """Have `redact` replace the secrets in these settings wherever they stand from now on."""

    def note(secret: str) -> str:
        if len(secret) >= _SHORTEST and REDACTED not in secret:
            _known.add(secret)
        return secret

    def note_url(text: str) -> str:
        if '://' in text:
            for secret in split_url(text)[1]:
                for part in (secret, *secret.split(':', 1)[1:]):  # as they are, and as a message may show them
                    note(repr(note(part))[1:-1])
                    note(urllib.parse.unquote(part))
        return text

    map_texts(settings, note_url, note)


def redact_error(error: Optional[BaseException]) -> None:
    """Redact the messages of an error and of those that led to it."""
    seen: List[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        for name in ('args', 'filename', 'filename2', 'strerror', 'msg', 'reason', 'code', '__notes__'):
            with contextlib.suppress(Exception):  # an error may lack it, or refuse to be changed
                before = getattr(error, name)
                after = redact_values(before)
                if after != before:  # an OSError would say something else with a name that is None
                    setattr(error, name, after)
        error = error.__cause__ or error.__context__


class _RedactingStream:
    """Writes to a stream what `redact` leaves of a text."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _redact_record(record: logging.LogRecord) -> logging.LogRecord:
    with contextlib.suppress(Exception):  # logging reports a wrong format itself
        record.msg, record.args = redact(record.getMessage()), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = redact(''.join(traceback.format_exception(*record.exc_info)).rstrip())
    return record


def _excepthook(kind: Any, error: BaseException, where: Any) -> None:
    print(redact(''.join(traceback.format_exception(kind, error, where))), end='', file=sys.stderr)


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Redact what a program prints and logs, and the errors that leave it, with their tracebacks."""
    remember({name: value for name, value in os.environ.items() if len(value) > 7 and os.sep not in value})
    for handler in list(logging.root.handlers):  # of a program before in this process, which would say all again
        if isinstance(getattr(handler, 'stream', None), _RedactingStream):
            logging.root.removeHandler(handler)
    streams, create_record = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    sys.stdout, sys.stderr = (cast(TextIO, _RedactingStream(stream)) for stream in streams)
    logging.setLogRecordFactory(lambda *args, **kwargs: _redact_record(create_record(*args, **kwargs)))
    if sys.excepthook is sys.__excepthook__:  # it is called when this is left
        sys.excepthook = _excepthook
    try:
        yield
    except BaseException as e:
        redact_error(e)
        raise
    finally:
        sys.stdout, sys.stderr = streams
        logging.setLogRecordFactory(create_record)


@contextlib.contextmanager
def redacted_command_line() -> Iterator[None]:
    """Show a redacted command line to libraries that record it, as trackers do."""
    words, sys.argv = sys.argv, [redact(word) for word in sys.argv]
    try:
        yield
    finally:
        sys.argv = words
