"""The formats that a model is exported to: how each is written, and how it is loaded again by its own library"""

import json
import logging
import os
from typing import Any, Callable, Dict, NamedTuple

import timm
import torch
import torch.nn as nn
from timm.utils.onnx import onnx_export

from ..export import create_config, export_backbone, export_model
from ..run_folder import SEGMENTATION_WEIGHTS_NAME
from ..segmentation import export_segmentation_model, load_segmentation_model
from .source import Source

INPUT_NAME = 'image'
METADATA_NAME = 'metadata.json'  # in the archive of torch.export
_LARGEST_FILE = 1.8e9  # bytes of weights in an ONNX file, which may have 2 GB
Runner = Callable[[torch.Tensor], torch.Tensor]


class Job(NamedTuple):
    """What is written.

    Attributes:
        source: The model with its description.
        module: The model, or the model with its preprocessing.
        example: A batch of images for tracing.
        dynamic: Whether the file takes batches of any size.
        metadata: Texts to keep in the file, by name.
    """

    source: Source
    module: nn.Module
    example: torch.Tensor
    dynamic: bool
    metadata: Dict[str, str]


class Format(NamedTuple):
    """A format.

    Attributes:
        ending: Ending of the file, '' for a folder.
        write: Writes a job to a path.
        load: Loads what is at the path by the library of the format. Returns what computes a batch.
        traced: Whether the network is traced, so that a file may hold the preprocessing, and one size of batches.
    """

    ending: str
    write: Callable[[Job, str], None]
    load: Callable[[str], Runner]
    traced: bool = True


def _write_onnx(job: Job, path: str) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401, the file is verified by it
        import onnxscript  # noqa: F401, torch writes by it
    except ImportError as e:
        raise ImportError(f"ONNX needs further packages: pip install 'timm-coretune[onnx]' ({e})") from e
    logging.getLogger('onnxscript').setLevel(logging.ERROR)
    output = job.metadata['output']
    if job.dynamic:
        # timm's exporter marks the batch as dynamic
        onnx_export(
            job.module,
            path,
            example_input=job.example,
            use_dynamo=True,
            input_names=[INPUT_NAME],
            output_names=[output],
        )
    else:
        torch.onnx.export(
            job.module,
            (job.example,),
            path,
            input_names=[INPUT_NAME],
            output_names=[output],
            external_data=sum(p.nbytes for p in job.module.parameters()) > _LARGEST_FILE,
            dynamo=True,
            verbose=False,
        )
    proto = onnx.load(path, load_external_data=False)  # of more than 2 GB the weights are in a file beside it
    onnx.helper.set_model_props(proto, job.metadata)
    onnx.save(proto, path)


def _load_onnx(path: str) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda batch: torch.from_numpy(session.run(None, {INPUT_NAME: batch.numpy()})[0])


def _write_torch_export(job: Job, path: str) -> None:
    shapes: Any = ({0: torch.export.Dim('batch')},) if job.dynamic else None
    program = torch.export.export(job.module, (job.example,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={METADATA_NAME: json.dumps(job.metadata, indent=2)})


def _load_torch_export(path: str) -> Runner:
    return torch.export.load(path).module()


def _write_safetensors(job: Job, path: str) -> None:
    model, data_config, class_names, _ = job.source
    if not job.source.segmentation:
        export_model(model, path, data_config, class_names)
        return
    export_segmentation_model(model, path, data_config, class_names)
    weights = os.path.join(path, SEGMENTATION_WEIGHTS_NAME)
    export_backbone(weights, create_config(model.backbone, data_config), path)


def _load_safetensors(path: str) -> Runner:
    if os.path.isfile(os.path.join(path, SEGMENTATION_WEIGHTS_NAME)):
        return load_segmentation_model(path)
    return timm.create_model(f'local-dir:{os.path.abspath(path)}', pretrained=True).eval()


FORMATS: Dict[str, Format] = {
    'onnx': Format('.onnx', _write_onnx, _load_onnx),
    'torch.export': Format('.pt2', _write_torch_export, _load_torch_export),
    'safetensors': Format('', _write_safetensors, _load_safetensors, traced=False),
}
