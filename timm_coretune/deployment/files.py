"""Export a tuned model to a file for other programs, and see that the file computes what the model computes"""

import os
import shutil
import uuid
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn

from ..atomic import move_into_place, publish
from ..checks import clip
from ..run_folder import ARGS_NAME
from .formats import FORMATS, Format, Job
from .source import Source, WithPreprocessing, describe, load_source

_BATCH_SIZES = (1, 2, 5)  # that a file with a dynamic batch is tried with
_TRACED = 2  # images: exporters take a batch of one for a constant


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: The file, or the folder.
        difference: Greatest absolute difference of its outputs to those of the model, by batch size.
        largest: Greatest absolute output of the model on the same images.
    """

    path: str
    difference: Dict[int, float]
    largest: float


def _check_path(output: str, format: str) -> None:
    ending = FORMATS[format].ending
    if ending and not output.endswith(ending):
        raise ValueError(f'Expected a file that ends in {ending} for {format}, got {output!r}. Name it so.')
    if ending and os.path.isdir(output):
        raise ValueError(f'Expected a file to write to, got the folder {output!r}. Name a file in it.')
    if not ending and os.path.lexists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise ValueError(f'Expected a new or empty folder to write to, there is something in {output!r}. Name another.')


def _images(source: Source, size: int, as_pixels: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    shape = (size, *source.data_config['input_size'])
    if as_pixels:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def _verify(path: str, format: Format, job: Job, sizes: Tuple[int, ...], tolerance: float) -> Exported:
    run, difference, largest = format.load(path), {}, 0.0
    for size in sizes:
        batch = _images(job.source, size, job.example.dtype == torch.uint8)
        expected = job.module(batch)
        try:
            found = run(batch)
        except Exception as e:  # runtimes raise errors of many kinds
            raise ValueError(
                f'Expected a file that takes {size} images at once, it fails: {clip(str(e))}. The file is deleted. '
                'Give a fixed --batch-size.'
            ) from e
        if found.shape != expected.shape:
            raise ValueError(
                f'Expected outputs {tuple(expected.shape)} of the exported file, got {tuple(found.shape)}. The file is '
                'deleted. Give a fixed --batch-size.'
            )
        difference[size] = (found - expected).abs().max().item()
        largest = max(largest, expected.abs().max().item())
        if not difference[size] <= tolerance * max(1.0, largest):
            raise ValueError(
                f'Expected the outputs of the model within {tolerance:g} of their size, those of the exported file '
                f'differ by {difference[size]:.3g} of {largest:.3g} with {size} image(s). The file is deleted.'
            )
    return Exported(path, difference, largest)


def deploy(
    source: Union[str, os.PathLike],
    format: str,
    output: Union[str, os.PathLike],
    img_size: Optional[Tuple[int, int]] = None,
    batch_size: Optional[int] = None,
    with_preprocessing: bool = False,
    tolerance: float = 1e-3,
) -> Exported:
    """Export a tuned model to a file for other programs.

    The file is loaded again by the library of its format, and computes batches of random images. Its outputs are
    compared with those of the model. It appears under its name when this is over.

    Args:
        source: Output folder of train.py, folder of an exported model, or `hf-hub:owner/name[@revision]`.
        format: One of FORMATS.
        output: File to write, or folder for `safetensors`.
        img_size: Height and width of the images. When None those of the validation.
        batch_size: Number of images that the file takes at once. When None any.
        with_preprocessing: The file takes pixels as uint8 and returns probabilities, in place of normalised images and
            logits.
        tolerance: Greatest difference to accept, as a share of the greatest output, or of 1 if that is less.

    Raises:
        ImportError: The format needs a package that is not installed.
        ValueError: There is no such model, torch cannot export it, or the file computes something else. Then there is
            no file.
    """
    source, output = os.fspath(source), os.fspath(output)
    if format not in FORMATS:
        raise ValueError(f'Expected a format of {", ".join(FORMATS)}, got {format!r}.')
    if batch_size is not None and batch_size < 1:
        raise ValueError(f'Expected a batch_size of 1 or more, got {batch_size}. Leave it out for any.')
    kind = FORMATS[format]
    if not kind.traced and (with_preprocessing or batch_size is not None):
        raise ValueError(f'{format} holds weights alone, without preprocessing or a size of batches. Leave them out.')
    _check_path(output, format)
    loaded = load_source(source, img_size)
    module: nn.Module = loaded.model
    if with_preprocessing:
        config: Any = loaded.data_config
        module = WithPreprocessing(module, config['mean'], config['std'], loaded.multi_label).eval()
    example = _images(loaded, batch_size or _TRACED, with_preprocessing)
    job = Job(loaded, module, example, batch_size is None, describe(loaded, with_preprocessing))
    parent, name = os.path.split(os.path.abspath(output))
    # the names of files of large ONNX models are in the model, so it is written under its own name
    staging = os.path.join(parent, f'.{name[:100]}.{uuid.uuid4().hex[:8]}.tmp')
    os.makedirs(staging)
    try:
        written = os.path.join(staging, name)
        try:
            kind.write(job, written)
        except ImportError:
            raise
        except Exception as e:  # exporters raise errors of many kinds
            raise ValueError(
                f'Expected a model that torch can export as {format}, it fails: {clip(str(e))}. A fixed --batch-size '
                'may help.'
            ) from e
        sizes = _BATCH_SIZES if batch_size is None else (batch_size,)
        exported = _verify(written, kind, job, sizes, tolerance)
        if kind.ending:
            for entry in sorted(os.listdir(staging), key=lambda entry: entry == name):  # the model comes last
                move_into_place(os.path.join(staging, entry), os.path.join(parent, entry))
        else:
            if os.path.isfile(os.path.join(source, ARGS_NAME)):  # tells whether images have several labels
                shutil.copyfile(os.path.join(source, ARGS_NAME), os.path.join(written, ARGS_NAME))
            publish(written, output, sorted(os.listdir(written)))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return exported._replace(path=output)
