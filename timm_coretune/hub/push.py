"""Push a model to the Hugging Face Hub: a model in memory, or the best weights in the folder of a run"""

import itertools
import json
import os
import urllib.parse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import torch.nn as nn
import yaml
from timm.models import get_pretrained_cfg, is_model

from ..checkpoint.source import hub_id_of, split_hub_id
from ..export import export_backbone, export_model
from ..redaction import join_command, redact, redact_values, strip_path
from ..run_folder import (
    ARGS_NAME,
    BEST_WEIGHTS_NAME,
    CONFIG_NAME,
    EVAL_PREFIX,
    PUBLISHED_NAMES,
    SEGMENTATION_CONFIG_NAME,
    SEGMENTATION_WEIGHTS_NAME,
    SUMMARY_NAME,
    WEIGHTS_NAME,
    read_args,
    read_json,
    read_notes,
    read_summary,
)
from .card import CardFacts, create_card
from .upload import upload


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    data_config: Optional[Dict[str, Any]] = None,
    label_names: Optional[Sequence[str]] = None,
    facts: Optional[CardFacts] = None,
    private: bool = False,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    commit_message: str = 'Add tuned model',
) -> str:
    """Push a model to the Hub, so that `timm.create_model('hf-hub:owner/name', pretrained=True)` loads it.

    Args:
        model: A timm model, such as the `get_eval_model()` of a task.
        repo_id: Repository as owner/name. It is created if missing, otherwise it gets a new commit.
        data_config: Input size, mean, std, interpolation and crop of the training. When None those of the model.
        label_names: Names of the classes by index.
        facts: Facts about data, origin, licence and metrics to show on the model card.
        private: Make the repository private.
        revision: Branch to push to, created if missing. When None the main branch.
        token: Access token. When None that of the environment or of the login.
        commit_message: First line of the commit message.

    Returns:
        Web address of the commit.

    Raises:
        HubError: Nothing was pushed. The message says why.
    """
    with TemporaryDirectory() as folder:
        export_model(model, folder, data_config, label_names)
        files = {name: os.path.join(folder, name) for name in (WEIGHTS_NAME, CONFIG_NAME)}
        config = read_json(files[CONFIG_NAME])
        card = create_card(repo_id, config, facts or CardFacts())
        return upload(files, card, repo_id, config['architecture'], private, revision, token, commit_message)


def push_run(
    folder: str,
    repo_id: str,
    private: bool = False,
    revision: Optional[str] = None,
    token: Optional[str] = None,
    license: Optional[str] = None,
) -> str:
    """Push the best weights of a run of train.py with a model card.

    Args:
        folder: Output folder of the run.
        repo_id: Repository as owner/name. It is created if missing, otherwise it gets a new commit.
        private: Make the repository private.
        revision: Branch to push to, created if missing. When None the main branch.
        token: Access token. When None that of the environment or of the login.
        license: Licence of the weights as the Hub calls it, such as apache-2.0.

    Returns:
        Web address of the commit.

    Raises:
        ValueError: The folder lacks files that a run which saved weights has.
        HubError: Nothing was pushed. The message says why.
    """
    configs = (SEGMENTATION_CONFIG_NAME, CONFIG_NAME)
    found = {
        name for name in (BEST_WEIGHTS_NAME, *configs, *PUBLISHED_NAMES) if os.path.isfile(os.path.join(folder, name))
    }
    missing = [name for name in (BEST_WEIGHTS_NAME, ARGS_NAME, SUMMARY_NAME) if name not in found]
    missing += [] if found & set(configs) else [' or '.join(configs)]
    if missing:
        raise ValueError(f'Expected a run of train.py in {folder!r}, found no {", ".join(missing)}.')
    with TemporaryDirectory() as exported:
        files = _model_files(folder, exported)
        files.update({name: os.path.join(folder, name) for name in PUBLISHED_NAMES if name in found})
        config = read_json(files[CONFIG_NAME])
        facts = read_facts(folder, license)
        card = create_card(repo_id, config, facts)
        return upload(_publishable(files), card, repo_id, config['architecture'], private, revision, token)


def push_command(
    folder: str,
    repo_id: str,
    private: bool = False,
    revision: Optional[str] = None,
    license: Optional[str] = None,
) -> str:
    """Write the shell command that pushes a run."""
    words = ['python', '-m', 'timm_coretune.hub', 'push', os.path.abspath(folder), repo_id]
    words += ['--private'] if private else []
    words += ['--revision', revision] if revision else []
    words += ['--license', license] if license else []
    return join_command(words)


def _model_files(folder: str, exported: str) -> Dict[str, str]:
    """Collect the files that the model of a run is loaded from.

    Args:
        folder: Output folder of the run.
        exported: An empty folder, for the files that the output folder does not have.

    Returns:
        Path of every file by its name in the repository.
    """
    weights = os.path.join(folder, BEST_WEIGHTS_NAME)
    segmentation = os.path.join(folder, SEGMENTATION_CONFIG_NAME)
    if not os.path.isfile(segmentation):
        return {WEIGHTS_NAME: weights, CONFIG_NAME: os.path.join(folder, CONFIG_NAME)}
    export_backbone(weights, read_json(segmentation)['backbone'], exported)
    files = {name: os.path.join(exported, name) for name in (WEIGHTS_NAME, CONFIG_NAME)}
    return {**files, SEGMENTATION_WEIGHTS_NAME: weights, SEGMENTATION_CONFIG_NAME: segmentation}


def _publishable(files: Mapping[str, str]) -> Dict[str, Union[str, bytes]]:
    """The content of text files without secrets, of args.yaml also without paths, and the paths of all others."""
    published: Dict[str, Union[str, bytes]] = dict(files)
    for name, path in files.items():
        if name.endswith(('.yaml', '.json', '.csv')):
            text = Path(path).read_bytes().decode(errors='surrogateescape')  # with its ends of lines
            if name == ARGS_NAME:
                text = _strip_yaml(text)
            elif name.endswith('.csv'):
                text = redact(text)
            elif redact_values(json.loads(text)) != json.loads(text):  # of an earlier version
                text = json.dumps(redact_values(json.loads(text)), indent=2) + '\n'
            published[name] = text.encode(errors='surrogateescape')
    return published


def _strip_yaml(text: str) -> str:
    """Settings without secrets and paths. Comments stay, they are not indented."""
    parts = []
    for is_comment, lines in itertools.groupby(text.splitlines(keepends=True), lambda line: line.startswith('#')):
        part = ''.join(lines)
        values = None if is_comment else yaml.safe_load(part)
        stripped = redact_values(values, strip_path)
        same = is_comment or stripped == values
        parts.append(redact(part) if same else yaml.safe_dump(stripped, default_flow_style=False))
    return ''.join(parts)


def read_facts(folder: str, license: Optional[str] = None) -> CardFacts:
    """Read the facts for a model card from the files of a run. One that was interrupted early has no weights yet."""
    args = redact_values(read_args(folder))
    rows = read_summary(os.path.join(folder, SUMMARY_NAME))
    weights = os.path.join(folder, BEST_WEIGHTS_NAME)
    notes = read_notes(weights) if os.path.isfile(weights) else {}
    segmentation = os.path.join(folder, SEGMENTATION_CONFIG_NAME)
    of_epoch = {row['epoch']: row for row in rows}
    base_model = _base_model(args)
    return CardFacts(
        dataset=_dataset_name(args),
        dataset_split=notes.get('validated_on', args['val_split']) or None,
        base_model=base_model,
        start=None if base_model else _start(args),
        license=license,
        weights=_describe_weights(notes, rows),
        metrics=_metrics(of_epoch.get(notes.get('epoch', ''), {})),
        last_metrics=_metrics(rows[-1]) if rows else {},
        recipe=args,
        segmentation=read_json(segmentation) if os.path.isfile(segmentation) else None,
    )


def _metrics(row: Mapping[str, str]) -> Dict[str, float]:
    columns = [key for key in row if key.startswith(EVAL_PREFIX) and row[key]]
    return {key.removeprefix(EVAL_PREFIX): float(row[key]) for key in columns}


def _describe_weights(notes: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> Optional[str]:
    if 'epoch' not in notes:
        return None
    what = 'moving average (EMA) of the weights' if notes.get('weights') == 'ema' else 'weights'
    last = rows[-1]['epoch'] if rows else notes['epoch']
    return f'the {what} after epoch {notes["epoch"]}, the best of epochs 0 to {last}'


def _dataset_name(args: Mapping[str, Any]) -> Optional[str]:
    if args['dataset']:
        name = strip_path(args['dataset'])
        return name.partition('/')[2] or name  # hfds/owner/name, torch/cifar10
    # only the last part of the path: the whole path would publish how a machine is organized
    name = os.path.basename(os.path.normpath(args['data_dir'])) if args['data_dir'] else ''
    return name.removesuffix('.safetensors') or None


def _base_model(args: Mapping[str, Any]) -> Optional[str]:
    """Name of the tuned model on the Hub as owner/name, None if it is not on the Hub."""
    source = args['initial_checkpoint'] or args['pretrained_path']
    if source:
        hub_id = hub_id_of(source)
        return split_hub_id(hub_id)[0] if hub_id else None
    if args['model'].startswith('hf-hub:'):
        return split_hub_id(args['model'].removeprefix('hf-hub:'))[0] if args['pretrained'] else None
    if not args['pretrained'] or not is_model(args['model']):
        return None
    pretrained = get_pretrained_cfg(args['model'])
    if pretrained is None or pretrained.hf_hub_id != 'timm/':
        return getattr(pretrained, 'hf_hub_id', None)
    return f'timm/{pretrained.architecture}.{pretrained.tag}' if pretrained.tag else f'timm/{pretrained.architecture}'


def _start(args: Mapping[str, Any]) -> str:
    source = args['initial_checkpoint'] or args['pretrained_path']
    path = urllib.parse.urlsplit(source).path if source and '://' in source else source
    return f'the checkpoint `{os.path.basename(path)}`' if path else 'random weights'
