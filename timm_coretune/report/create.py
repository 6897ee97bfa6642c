"""Write the report of a run: one page of HTML, from what is in the run folder and from the images of the run"""

import contextlib
import io
import logging
import os
from typing import Any, Mapping, Optional, Union

import torch
import yaml

from ..atomic import write_text
from ..hub.card import CardFacts
from ..hub.push import read_facts
from ..redaction import join_command
from ..run_folder import ARGS_NAME, BEST_WEIGHTS_NAME, REPORT_NAME, read_args
from ..train.cli.arguments import parse_args
from ..train.cli.settings import Settings
from .contents import create_contents, start_of
from .examine import Findings, examine, why
from .plots import create_figure

_logger = logging.getLogger(__name__)

MAX_IMAGES = 2000


def create_report(
    folder: str,
    device: Optional[Union[str, torch.device]] = None,
    max_images: int = MAX_IMAGES,
    path: Optional[str] = None,
) -> str:
    """Write the report of a run.

    Args:
        folder: The run folder.
        device: Device to compute features on. When None a GPU if there is one.
        max_images: Number of held-out images, and of training images, to look at.
        path: File to write. When None report.html in the run folder.

    Returns:
        Path of the file.

    Raises:
        ValueError: The folder is not that of a run.
        ImportError: matplotlib is not installed.
    """
    if max_images < 1:
        raise ValueError(f'Expected --max-images of 1 or more, got {max_images}.')
    if not os.path.isfile(os.path.join(folder, ARGS_NAME)):
        raise ValueError(
            f'Expected the output folder of a run of train.py in {folder!r}, found no {ARGS_NAME}. Check the path.'
        )
    create_figure()  # without matplotlib this says so at once
    try:
        args, facts = read_args(folder), read_facts(folder)
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
        raise ValueError(f'Expected the settings of a run in {os.path.join(folder, ARGS_NAME)!r}: {e!r}') from e
    findings: Optional[Findings] = None
    problem = ''
    if facts.segmentation is None:
        try:
            findings = _examine(folder, facts, device, max_images)
            findings = findings._replace(no_before=_without_folders(findings.no_before, args, folder))
        except Exception as e:  # whatever it is, the page shows what the folder has
            problem = _without_folders(why(e), args, folder)
            _logger.warning(f'The report shows no images and features: {e}')
    path = path or os.path.join(folder, REPORT_NAME)
    write_text(create_contents(folder, facts, findings, problem), path)
    return path


def _without_folders(message: str, args: Mapping[str, Any], folder: str) -> str:
    """A message with only the last part of each path that the run knows: the page may be given to others."""
    paths = {value for value in (*args.values(), folder, os.path.abspath(folder)) if isinstance(value, str)}
    for path in sorted((path for path in paths if os.path.isabs(path) or path.startswith('~')), key=len, reverse=True):
        message = message.replace(path, os.path.basename(path.rstrip(os.sep)))
    return message


def _examine(folder: str, facts: CardFacts, device: Optional[Union[str, torch.device]], max_images: int) -> Findings:
    if not os.path.isfile(os.path.join(folder, BEST_WEIGHTS_NAME)):
        raise ValueError(f'the run has no {BEST_WEIGHTS_NAME}, as no epoch has ended')
    return examine(_read_settings(folder), folder, start_of(facts), device, max_images)


def _read_settings(folder: str) -> Settings:
    """The settings of a run, from its args.yaml."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args(['-c', os.path.join(folder, ARGS_NAME)]).settings
    except SystemExit as e:
        raise ValueError(f'its {ARGS_NAME} cannot be read: {said.getvalue().strip().splitlines()[-1]}') from e


def report_at_end(folder: str, is_over: bool, device: torch.device) -> None:
    """Write the report of a run that has just ended. If that fails, the log says how to try again."""
    command = join_command(['timm-coretune', 'report', os.path.abspath(folder)])
    if not is_over:
        _logger.info(f'Interrupted, so no report. What there is can be seen with:\n{command}')
        return
    try:
        path = create_report(folder, device)
    except Exception as e:  # whatever it is: the weights are there
        _logger.error(f'Trained, but there is no report: {type(e).__name__}: {e}. Try again with:\n{command}')
        return
    _logger.info(f'Report: {path}')
