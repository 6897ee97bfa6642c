"""Each kind of file gives every tensor of its backbone, from the copy that should be taken"""

import pytest
import timm
import torch
from checkpoint_docs import page
from checkpoint_formats import CASES, FORMATS, SMALL, create, weights
from paths import ROOT
from safetensors.torch import load_file, save_file

from timm_coretune import convert_checkpoint, inspect_checkpoint, load_checkpoint
from timm_coretune.checkpoint.rules import RULES

IDS = [f'{fmt.name}-{architecture}' for fmt, architecture in CASES]


@pytest.fixture
def saved(request, tmp_path):
    """The file of a format, and the model it is for."""
    fmt, architecture = request.param
    path = tmp_path / 'checkpoint.pth'
    torch.save(fmt.content(weights(architecture), weights(architecture, seed=1)), path)
    return fmt, architecture, str(path)


@pytest.mark.parametrize('saved', CASES, ids=IDS, indirect=True)
def test_all_of_the_backbone_is_loaded_from_the_right_copy(saved):
    fmt, architecture, path = saved
    expected = weights(architecture)
    model = create(architecture, num_classes=5)
    classifier = model.get_classifier().weight.clone()
    report = load_checkpoint(model, path)
    assert (report.method, report.copy) == (fmt.method, fmt.copy)
    assert torch.equal(model.get_classifier().weight, classifier)
    assert not report.left_over
    fresh = [name for name in expected if name.startswith('fc_norm.')]
    assert list(report.missing) == sorted(fresh)
    half = 'clip_quickgelu' in architecture
    state = model.state_dict()
    for name, value in expected.items():
        if name not in fresh and not (name.endswith('num_batches_tracked') and name not in report.loaded):
            assert torch.equal(state[name], value.half().float() if half else value), name
    assert report.matched == report.total


FLAT = ('DINOv2, as released', 'DINOv2 with registers', 'DINOv3', 'OpenAI CLIP', 'ConvNeXt, original names')


@pytest.mark.parametrize(
    'fmt, architecture', [c for c in CASES if c[0].name in FLAT], ids=lambda v: getattr(v, 'name', v)
)
def test_the_same_is_loaded_from_safetensors_which_are_read_piece_by_piece(fmt, architecture, tmp_path):
    content = fmt.content(weights(architecture), weights(architecture, seed=1))
    save_file({k: v.contiguous().clone() for k, v in content.items()}, tmp_path / 'model.safetensors')
    torch.save(content, tmp_path / 'model.pth')
    models = create(architecture), create(architecture)
    for model, file in zip(models, ('model.safetensors', 'model.pth'), strict=True):
        assert load_checkpoint(model, tmp_path / file).missing == ()
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('saved', CASES, ids=IDS, indirect=True)
def test_it_is_inspected_and_converted_for_plain_timm(saved, tmp_path):
    fmt, architecture, path = saved
    small = architecture in SMALL
    report = inspect_checkpoint(path, create(architecture) if small else None)
    text = str(report)
    assert all(part in text for part in (fmt.method, fmt.copy, architecture, f'{report.total} of {report.total}'))
    if report.missing:  # a norm that starts fresh is not in the file, so the file cannot fill a model strictly
        return
    destination = str(tmp_path / 'converted.safetensors')
    convert_checkpoint(path, destination, create(architecture))  # which looks for a model as inspect does
    model = timm.create_model(architecture, num_classes=0, checkpoint_path=destination, **SMALL.get(architecture, {}))
    tensors = load_file(destination)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_every_row_of_the_table_has_a_file_that_it_reads():
    # transformers is in test_transformers.py, torchvision and plain files are in test_libraries.py
    tested = {fmt.method for fmt in FORMATS} | {'torchvision', 'InternViT'}
    assert {rule.method for rule in RULES if not rule.method.startswith('Hugging Face')} <= tested


def test_the_page_of_the_docs_is_that_of_these_tests():
    written = ROOT / 'docs' / 'checkpoints.md'
    assert written.read_text() == page(), 'python tests/helpers/checkpoint_docs.py > docs/checkpoints.md'
