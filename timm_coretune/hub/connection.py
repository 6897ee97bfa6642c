"""Requests to the Hugging Face Hub: time limits, further attempts, and what failed in words"""

import contextlib
import logging
import time
from typing import Any, Callable, Iterator, List, Optional, Tuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import _http, hf_raise_for_status

from ..redaction import redact, redact_error

_logger = logging.getLogger(__name__)

NOT_PUSHED = 3  # exit code of a program whose push failed
# huggingface_hub changed its HTTP library twice. HfHubHTTPError inherits from the errors of the library in use.
_NETWORK_ERRORS = tuple(c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception)
WAITS = (1, 2, 4, 8)  # seconds before each further attempt
_LONGEST_WAIT = 60  # seconds, if the server asks for more time
CONNECT_LIMIT, ANSWER_LIMIT = 10, 30  # seconds until a connection is there, and without a byte in it
_LONGEST_REASON = 400  # letters of a message of the client
_ATTEMPTS_WITHOUT_ANSWER = 2  # of requests that took the whole ANSWER_LIMIT


class HubError(RuntimeError):
    """Nothing was pushed. The message says why, and what to do."""


class _NoAnswerError(Exception):
    """The connection failed. It has the error of the HTTP library as its cause, on which the client would try again."""


def quiet_requests() -> None:
    """Silence the line that the HTTP library logs for every request."""
    for name in ('httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def limited_client() -> Iterator[List[int]]:
    """Let the client of the Hub wait no longer than the limits, and leave further attempts to `retry`.

    The client has no time limit for most requests. Some it tries again by itself, which would multiply waits.

    Yields:
        Statuses of the answers so far.
    """
    statuses: List[int] = []
    is_old = hasattr(huggingface_hub, 'configure_http_backend')  # releases before 1.0 use requests
    factory_name = '_GLOBAL_BACKEND_FACTORY' if is_old else '_GLOBAL_CLIENT_FACTORY'
    set_factory = huggingface_hub.configure_http_backend if is_old else huggingface_hub.set_client_factory
    before = getattr(_http, factory_name, None) or getattr(_http, 'default_client_factory')  # noqa: B009, by release

    def create() -> Any:
        client = before()  # it may know the proxy of a user
        send = client.send

        def limited_send(request: Any, **kwargs: Any) -> Any:
            if is_old:
                kwargs['timeout'] = kwargs.get('timeout') or (CONNECT_LIMIT, ANSWER_LIMIT)
            else:
                limits = {'connect': CONNECT_LIMIT, **dict.fromkeys(('read', 'write', 'pool'), ANSWER_LIMIT)}
                asked = request.extensions.get('timeout') or {}
                request.extensions['timeout'] = {**limits, **{k: v for k, v in asked.items() if v is not None}}
            try:
                response = send(request, **kwargs)
            except OfflineModeIsEnabled:
                raise
            except _NETWORK_ERRORS as e:
                raise _NoAnswerError(str(e)) from e
            statuses.append(response.status_code)
            if response.status_code == 409 and request.method == 'POST' and 'in progress' in response.text:
                raise _NoAnswerError('another operation is in progress')  # the client would ask again without end
            if _passes(response.status_code):
                hf_raise_for_status(response)
            return response

        client.send = limited_send
        return client

    set_factory(create)
    try:
        yield statuses
    finally:
        set_factory(before)


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """Yield an error, then the error that caused it, and so on. The client of the Hub wraps some errors in others."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer_in(error: Exception) -> Any:
    """The HTTP response in an error or its causes, None if the server did not answer."""
    responses = (getattr(e, 'response', None) for e in _causes(error))
    return next((response for response in responses if response is not None), None)


def _status_of(error: Exception) -> Optional[int]:
    """HTTP status in an error or its causes, None if the server did not answer."""
    return getattr(_answer_in(error), 'status_code', None)


def explain(error: Exception, repo_id: str) -> str:
    """Say in a sentence what failed, and what to do."""
    status = _status_of(error)
    if status == 401:
        return (
            'the Hub does not know the token (401). Log in again with `hf auth login`, or set HF_TOKEN to a valid one.'
        )
    if status == 403:
        return (
            f'the token may not write to {repo_id} (403). Use a token with write access, or a name below your own '
            'account or organization.'
        )
    if status == 404:
        return f'the Hub finds no {repo_id}, or does not show it to this token (404). Check the name and the token.'
    if status in (409, 412):
        return f'{repo_id} was changed by someone else at this moment ({status}). Look at it, then push again.'
    if status == 429:
        return 'the Hub takes no more requests from you for now (429). Wait some minutes, then push again.'
    if status is not None and status >= 500:
        return f'the Hub has an error of its own ({status}), also after {len(WAITS)} more attempts. Push again later.'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set. Push again without it.'
    what = redact(' '.join(str(error).split())) or type(error).__name__
    what = what if len(what) <= _LONGEST_REASON else f'{what[:_LONGEST_REASON]}...'
    if isinstance(error, HFValidationError):
        return f'{repo_id} cannot be the name of a repository or branch: {what}'
    if _local_error(error) is not None:
        return f'a file of the run cannot be read ({redact(str(_local_error(error)))}).'
    if status is not None and status >= 400:
        return f'the Hub refused the push ({status}): {what}'
    if _is_network_error(error):
        return f'no connection to the Hub, or it was cut ({what}). Push again when the network is back.'
    return (
        'the Hub, or something on the way to it, answered with a page in place of data, or with data of another kind '
        f'({type(error).__name__}: {what}). Push again later.'
    )


def _local_error(error: Exception) -> Optional[BaseException]:
    """The error of the disk in an error or its causes. Those of the Hub are OSErrors too, but without a file name."""
    found = (c for c in _causes(error) if isinstance(c, OSError) and getattr(c, 'filename', None) is not None)
    return next(found, None)


def _is_network_error(error: Exception) -> bool:
    kinds: Tuple[Any, ...] = (_NoAnswerError, *_NETWORK_ERRORS)  # requests counts JSON that cannot be read among them
    return any(isinstance(cause, kinds) and not isinstance(cause, ValueError) for cause in _causes(error))


def _passes(status: int) -> bool:
    return status == 429 or status >= 500


def _is_transient(error: Exception) -> bool:
    status = _status_of(error)
    if status is not None and status >= 400:
        return _passes(status)
    return not isinstance(error, (OfflineModeIsEnabled, HFValidationError)) and _local_error(error) is None


def _wait_for(error: Exception, wait: int) -> float:
    asked = getattr(_answer_in(error), 'headers', {}).get('Retry-After', '')
    return min(max(wait, int(asked)), _LONGEST_WAIT) if asked.isdigit() else wait


def retry(call: Callable[[], Any], repo_id: str) -> Any:
    """Call a function, and call it again after a rate limit, an error of the server, or an answer that makes no sense.

    Raises:
        HubError: The call failed for good, whatever it raised.
    """
    waits, unanswered = iter(WAITS), 0
    while True:
        try:
            return call()
        except HubError:
            raise
        except Exception as e:  # an answer of another kind makes the client raise anything
            unanswered += any('Timeout' in type(cause).__name__ for cause in _causes(e))
            wait = next(waits, None)
            if wait is None or unanswered == _ATTEMPTS_WITHOUT_ANSWER or not _is_transient(e):
                redact_error(e)  # it may have the signed URL of an upload
                raise HubError(explain(e, repo_id)) from e
            seconds = _wait_for(e, wait)
            reason = _status_of(e) or type(e).__name__
            _logger.warning(f'The Hub did not answer as it should ({reason}). Trying again in {seconds} s.')
            time.sleep(seconds)
