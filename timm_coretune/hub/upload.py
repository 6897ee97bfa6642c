"""Files into a repository of the Hub: one commit, repeated where that is safe, errors in sentences"""

import json
import logging
import os
import time
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, Iterator, Optional, Union

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled

from ..version import __version__
from .card import is_card_of

_logger = logging.getLogger(__name__)

CARD_NAME = 'README.md'
NOT_PUSHED = 3  # exit code
_WEIGHTS_SUFFIX = '.safetensors'
# The HTTP library below huggingface_hub changed twice; its errors and those of the system are what HfHubHTTPError is.
_NETWORK_ERRORS = tuple(c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception)
_NETWORK_ERRORS += (json.JSONDecodeError,)  # a proxy's page in place of an answer
_WAITS = (1, 2, 4, 8)  # seconds
_LONGEST_WAIT = 60


class HubError(RuntimeError):
    """Nothing was pushed, and why."""


def quiet_requests() -> None:
    """Keep the line that the HTTP library logs for every request out of a program's log."""
    for name in ('httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.WARNING)


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error and what it came from: the client wraps some of its own."""
    while error is not None:
        yield error
        error = error.__cause__


def _status_of(error: Exception) -> Optional[int]:
    """HTTP status an error came with, None where there was no answer."""
    statuses = [getattr(getattr(e, 'response', None), 'status_code', None) for e in _causes(error)]
    return next((status for status in statuses if status is not None), None)


def _explain(error: Exception, repo_id: str) -> str:
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
        return f'the Hub has an error of its own ({status}), also after {len(_WAITS)} more attempts. Push again later.'
    if isinstance(error, json.JSONDecodeError):
        return 'the Hub, or something on the way to it, answered with a page in place of data. Push again later.'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set. Push again without it.'
    what = ' '.join(str(error).split()) or type(error).__name__
    if status is not None:
        return f'the Hub refused the push ({status}): {what}'
    return f'no connection to the Hub, or it was cut ({what}). Push again when the network is back.'


def _is_transient(error: Exception) -> bool:
    status = _status_of(error)
    if status is None:
        return not isinstance(error, OfflineModeIsEnabled)
    return status == 429 or status >= 500


def _wait_for(error: Exception, wait: int) -> float:
    headers = getattr(getattr(error, 'response', None), 'headers', {})
    asked = headers.get('Retry-After', '')
    return min(max(wait, int(asked)), _LONGEST_WAIT) if asked.isdigit() else wait


def _retry(call: Callable[[], Any], repo_id: str) -> Any:
    """Call, again where a rate limit, an error of the server or a cut got in the way."""
    waits: Iterator[int] = iter(_WAITS)
    while True:
        try:
            return call()
        except Exception as e:
            if isinstance(e, HubError) or not any(isinstance(cause, _NETWORK_ERRORS) for cause in _causes(e)):
                raise
            wait = next(waits, None)
            if wait is None or not _is_transient(e):
                raise HubError(_explain(e, repo_id)) from e
            wait = _wait_for(e, wait)
            reason = _status_of(e) or type(e).__name__
            _logger.warning(f'The Hub did not answer as it should ({reason}). Trying again in {wait} s.')
            time.sleep(wait)


def _read_card(api: HfApi, repo_id: str, revision: str) -> str:
    with TemporaryDirectory() as folder:  # not the cache, which may be read-only
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=folder)
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read()


def _settle_card(card: ModelCard, existing: str, architecture: str, repo_id: str) -> Optional[ModelCard]:
    """The card to commit in place of an existing one: none, where that one is about something else."""
    if not is_card_of(existing, architecture):
        _logger.warning(
            f'{CARD_NAME} of {repo_id} describes something else than a {architecture} tuned here. It was kept, and '
            'does not tell of the weights now beside it: remove it and push again, or push to another name.'
        )
        return None
    if card.data.license is None:  # added by hand, most likely
        card.data.license = ModelCard(existing, ignore_metadata_errors=True).data.license
    return card


def upload(
    files: Dict[str, Union[str, bytes]],
    card: ModelCard,
    repo_id: str,
    architecture: str,
    private: bool = False,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    commit_message: str = 'Add tuned model',
) -> str:
    """Make a repository if there is none, and commit files and card to it at once.

    Args:
        files: Path of a file, or its content, by name in the repository.
        card: The model card.
        repo_id: owner/name.
        architecture: Name of the timm model; a card about another is kept.
        private: Make the repository private.
        revision: Branch, made if need be, the main one when None.
        token: Access token, that of the environment or of the login when None.
        commit_message: First line of the commit.

    Returns:
        Address of the commit.

    Raises:
        HubError: Nothing was pushed.
    """
    if token is None and get_token() is None:
        raise HubError('there is no token for the Hub. Log in once with `hf auth login`, or set HF_TOKEN.')
    api = HfApi(token=token, library_name='timm_coretune', library_version=__version__)
    try:
        repo_id = _retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id).repo_id
    except KeyError:  # 409 without the address of a repository that exists
        raise HubError(f'the name {repo_id} is taken (409). Choose another.') from None
    if revision is not None:
        _retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    info = _retry(lambda: api.model_info(repo_id, revision=revision), repo_id)
    if private and not info.private:
        raise HubError(f'{repo_id} exists and is public, but was to be private. Change that there, or choose another.')
    if any(sibling.rfilename == CARD_NAME for sibling in info.siblings or ()):
        existing = _retry(lambda: _read_card(api, repo_id, info.sha), repo_id)
        card = _settle_card(card, existing, architecture, repo_id)
    if card is not None:
        files = {CARD_NAME: str(card).encode(), **files}
    files = {name: os.fspath(file) if not isinstance(file, bytes) else file for name, file in files.items()}
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    # all of them: those of a frozen backbone do not change with the model around it
    tensors = [operation for operation in operations if operation.path_in_repo.endswith(_WEIGHTS_SUFFIX)]
    weights = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in tensors}
    attempts = []

    def commit() -> str:
        if attempts:  # an answer that was lost may have been a yes
            head = api.model_info(repo_id, revision=revision).sha
            if head != info.sha:
                stored = api.get_paths_info(repo_id, list(weights), revision=head)
                if {file.path: file.lfs.sha256 for file in stored if file.lfs} == weights:
                    return f'{api.endpoint}/{repo_id}/commit/{head}'
                raise HubError(f'{repo_id} was changed by someone else at this moment. Look at it, then push again.')
        attempts.append(True)
        # the parent is the one whose card was read: nobody's newer card is overwritten
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=info.sha
        ).commit_url

    return _retry(commit, repo_id)
