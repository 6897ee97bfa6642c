"""Upload files to the Hugging Face Hub in one commit"""

import logging
from tempfile import TemporaryDirectory
from typing import List, Mapping, Optional, Union

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.hf_api import ModelInfo, RepoFile

from ..redaction import redact, remember
from ..version import __version__
from .card import is_card_of
from .connection import HubError, limited_client, retry

_logger = logging.getLogger(__name__)

CARD_NAME = 'README.md'
_WEIGHTS_SUFFIX = '.safetensors'


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
    files: Mapping[str, Union[str, bytes]],
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
        files: Path or content of every file by its name in the repository.
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
    remember({'token': token or get_token() or ''})
    if token is None and get_token() is None:
        raise HubError('there is no token for the Hub. Log in once with `hf auth login`, or set HF_TOKEN.')
    with limited_client() as statuses:
        api = HfApi(token=token, library_name='timm_coretune', library_version=__version__)
        return _upload(api, statuses, files, card, repo_id, architecture, private, revision, commit_message)


def _create(api: HfApi, statuses: List[int], repo_id: str, private: bool) -> str:
    """Create a repository if it is missing, and return its full name."""
    try:
        return api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    except KeyError:  # the client reads the repository from the answer, which has none if the name is taken
        if statuses[-1] == 409:
            raise HubError(f'the name {repo_id} is taken (409). Choose another.') from None
        raise


def _look_up(api: HfApi, repo_id: str, revision: Optional[str]) -> ModelInfo:
    """Commit, visibility and files of a repository.

    Raises:
        ValueError: The answer does not tell them.
    """
    info = api.model_info(repo_id, revision=revision)
    if not isinstance(info.sha, str) or not isinstance(info.private, bool):
        raise ValueError('no commit and visibility of the repository')
    return info


def _upload(
    api: HfApi,
    statuses: List[int],
    files: Mapping[str, Union[str, bytes]],
    card: ModelCard,
    repo_id: str,
    architecture: str,
    private: bool,
    revision: Optional[str],
    commit_message: str,
) -> str:
    repo_id = retry(lambda: _create(api, statuses, repo_id, private), repo_id)
    if revision is not None:
        retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    info = retry(lambda: _look_up(api, repo_id, revision), repo_id)
    if private and not info.private:
        raise HubError(f'{repo_id} exists and is public, but was to be private. Change that there, or choose another.')
    new_card: Optional[ModelCard] = card
    if any(sibling.rfilename == CARD_NAME for sibling in info.siblings or ()):
        existing = retry(lambda: _read_card(api, repo_id, info.sha), repo_id)
        new_card = _settle_card(card, existing, architecture, repo_id)
    contents = {**({} if new_card is None else {CARD_NAME: redact(str(new_card)).encode()}), **files}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    # Compare all weights: those of a frozen backbone are the same in every version of a segmentation model.
    tensors = [operation for operation in operations if operation.path_in_repo.endswith(_WEIGHTS_SUFFIX)]
    weights = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in tensors}
    is_repeated = False

    def commit() -> str:
        nonlocal is_repeated, operations
        if is_repeated:  # the answer to the first attempt was lost, but the commit may be there
            head = _look_up(api, repo_id, revision).sha
            if head != info.sha:
                stored = api.get_paths_info(repo_id, list(weights), revision=head)
                if {f.path: f.lfs.sha256 for f in stored if isinstance(f, RepoFile) and f.lfs} == weights:
                    return f'{api.endpoint}/{repo_id}/commit/{head}'
                raise HubError(f'{repo_id} was changed by someone else at this moment. Look at it, then push again.')
            if any(getattr(operation, '_is_committed', False) for operation in operations):
                # the client refuses operations of a commit whose answer it could not read
                operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        is_repeated = True
        # the parent is the commit whose card was read, so that nobody's newer card is overwritten
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=info.sha
        ).commit_url

    return retry(commit, repo_id)
