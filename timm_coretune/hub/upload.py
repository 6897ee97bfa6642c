"""Upload files to the Hugging Face Hub in one commit, retry after network errors, and explain what failed"""

import json
import logging
import time
from tempfile import TemporaryDirectory
from typing import Any, Callable, Iterator, Mapping, Optional

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from ..version import __version__
from .card import is_card_of

_logger = logging.getLogger(__name__)

CARD_NAME = 'README.md'
NOT_PUSHED = 3  # exit code of a program whose push failed
_WEIGHTS_SUFFIX = '.safetensors'
# huggingface_hub changed its HTTP library twice. HfHubHTTPError inherits from the errors of the library in use.
_NETWORK_ERRORS = tuple(c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception)
_NETWORK_ERRORS += (json.JSONDecodeError,)  # a proxy answered with a web page
_WAITS = (1, 2, 4, 8)  # seconds before each further attempt
_LONGEST_WAIT = 60  # seconds, if the server asks for more time


class HubError(RuntimeError):
    """Nothing was pushed. The message says why, and what to do."""


def quiet_requests() -> None:
    """Silence the line that the HTTP library logs for every request."""
    for name in ('httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.WARNING)


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """Yield an error, then the error that caused it, and so on. The client of the Hub wraps some errors in others."""
    while error is not None:
        yield error
        error = error.__cause__


def _status_of(error: Exception) -> Optional[int]:
    """HTTP status in an error or its causes, None if the server did not answer."""
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
    """Call a function, and call it again after a rate limit, an error of the server or a lost connection."""
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
            seconds = _wait_for(e, wait)
            reason = _status_of(e) or type(e).__name__
            _logger.warning(f'The Hub did not answer as it should ({reason}). Trying again in {seconds} s.')
            time.sleep(seconds)


def _read_card(api: HfApi, repo_id: str, revision: str) -> str:
    with TemporaryDirectory() as folder:  # the cache may be read-only
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=folder)
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read()


def _settle_card(card: ModelCard, existing: str, architecture: str, repo_id: str) -> Optional[ModelCard]:
    """Decide which card to commit over an existing one: None keeps a card that describes another model."""
    if not is_card_of(existing, architecture):
        _logger.warning(
            f'{CARD_NAME} of {repo_id} describes something else than a {architecture} tuned here. It was kept, so '
            'it does not describe the weights that were pushed. Remove it and push again, or push elsewhere.'
        )
        return None
    if card.data.get('license') is None:  # keep a licence that somebody added to the card on the Hub
        card.data['license'] = ModelCard(existing, ignore_metadata_errors=True).data.get('license')
    return card


def upload(
    files: Mapping[str, str],
    card: ModelCard,
    repo_id: str,
    architecture: str,
    private: bool = False,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    commit_message: str = 'Add tuned model',
) -> str:
    """Create a repository if it is missing, and push files and a model card to it in one commit.

    Args:
        files: Path of every file by its name in the repository.
        card: The model card.
        repo_id: Repository as owner/name.
        architecture: Name of the timm model. If the repository has a card about another architecture, that card stays.
        private: Make the repository private.
        revision: Branch to push to, created if missing. When None the main branch.
        token: Access token. When None that of the environment or of the login.
        commit_message: First line of the commit message.

    Returns:
        Web address of the commit.

    Raises:
        HubError: Nothing was pushed. The message says why.
    """
    if token is None and get_token() is None:
        raise HubError('there is no token for the Hub. Log in once with `hf auth login`, or set HF_TOKEN.')
    api = HfApi(token=token, library_name='timm_coretune', library_version=__version__)
    try:
        repo_id = _retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id).repo_id
    except KeyError:  # the client reads the repository from the answer, which has none if the name is taken (409)
        raise HubError(f'the name {repo_id} is taken (409). Choose another.') from None
    if revision is not None:
        _retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    info = _retry(lambda: api.model_info(repo_id, revision=revision), repo_id)
    if private and not info.private:
        raise HubError(f'{repo_id} exists and is public, but was to be private. Change that there, or choose another.')
    new_card: Optional[ModelCard] = card
    if any(sibling.rfilename == CARD_NAME for sibling in info.siblings or ()):
        existing = _retry(lambda: _read_card(api, repo_id, info.sha), repo_id)
        new_card = _settle_card(card, existing, architecture, repo_id)
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    if new_card is not None:
        operations.insert(0, CommitOperationAdd(CARD_NAME, str(new_card).encode()))
    # Compare all weights: those of a frozen backbone are the same in every version of a segmentation model.
    tensors = [operation for operation in operations if operation.path_in_repo.endswith(_WEIGHTS_SUFFIX)]
    weights = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in tensors}
    is_repeated = False

    def commit() -> str:
        nonlocal is_repeated
        if is_repeated:  # the answer to the first attempt was lost, but the commit may be there
            head = api.model_info(repo_id, revision=revision).sha
            if head != info.sha:
                stored = api.get_paths_info(repo_id, list(weights), revision=head)
                if {f.path: f.lfs.sha256 for f in stored if isinstance(f, RepoFile) and f.lfs} == weights:
                    return f'{api.endpoint}/{repo_id}/commit/{head}'
                raise HubError(f'{repo_id} was changed by someone else at this moment. Look at it, then push again.')
        is_repeated = True
        # the parent is the commit whose card was read, so that nobody's newer card is overwritten
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=info.sha
        ).commit_url

    return _retry(commit, repo_id)
