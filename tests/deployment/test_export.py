"""Exported files compute, in their own runtimes and without this package, what plain timm computes"""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import segmentation_models
import timm
import torch
from paths import ROOT
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_coretune import deployment, export_model
from timm_coretune.__main__ import main
from timm_coretune.deployment import formats
from timm_coretune.prediction import Predictor
from timm_coretune.segmentation import export_segmentation_model

NAMES = ['ant', 'bee', 'cat']
IMAGES = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.1), 'interpolation': 'bilinear', 'input_size': (3, 32, 32)}
KINDS = ('test_resnet', 'test_vit', 'segmentation')
SIZES = (1, 3, 7)
# each computes all files in a process of its own
RUNTIMES = {
    'onnx': """import sys, numpy, onnxruntime
for kind in sys.argv[1:]:
    session = onnxruntime.InferenceSession(f'{kind}.onnx')
    for size in (1, 3, 7):
        numpy.save(f'{kind}{size}.npy', session.run(None, {'image': numpy.load(f'in{size}.npy')})[0])
assert not {'torch', 'timm', 'timm_coretune'} & set(sys.modules)""",
    'torch.export': """import sys, numpy, torch
for kind in sys.argv[1:]:
    model = torch.export.load(f'{kind}.pt2').module()
    for size in (1, 3, 7):
        numpy.save(f'{kind}{size}.npy', model(torch.from_numpy(numpy.load(f'in{size}.npy'))).numpy())
assert not {'timm', 'timm_coretune'} & set(sys.modules)""",
}


def create(name):
    """A model whose statistics of BatchNorm are not those of a fresh one, and that tells classes apart."""
    torch.manual_seed(0)
    kwargs = {'img_size': 32, 'dynamic_img_size': False} if name == 'test_vit' else {}
    model = timm.create_model(name, num_classes=3, **kwargs).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
        model.get_classifier().weight.mul_(10)
    return model.eval()


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Folders with models, and the models."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        if kind == 'segmentation':
            model = segmentation_models.tuned('test_resnet', img_size=(32, 32), output_stride=8)
            config = {name: IMAGES[name] for name in ('mean', 'std', 'interpolation')}
            export_segmentation_model(model, str(folder), config, ['a', 'b', 'c', 'd'])
        else:
            model = create(kind)
            export_model(model, str(folder), {**IMAGES, 'crop_pct': 0.9, 'crop_mode': 'center'}, NAMES)
        found[kind] = folder, model
    return found


def metadata_of(path):
    if path.suffix == '.onnx':
        import onnx

        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    files = {'metadata.json': ''}
    torch.export.load(path, extra_files=files)
    return json.loads(files['metadata.json'])


@pytest.mark.slow
@pytest.mark.parametrize('format', RUNTIMES)
def test_a_file_computes_what_the_model_computes_without_this_package(exported, tmp_path, launch, format):
    if format == 'onnx':
        pytest.importorskip('onnxruntime', reason="needs the 'test-formats' extra")
    paths = {kind: tmp_path / f'{kind}{formats.FORMATS[format].ending}' for kind in KINDS}
    for kind, path in paths.items():
        written = deployment.deploy(exported[kind][0], format, path)
        assert written.path == str(path)
        assert sorted(written.difference) == [1, 2, 5]
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())
    inputs = {size: torch.randn(size, 3, 32, 32) for size in SIZES}
    for size, images in inputs.items():
        np.save(tmp_path / f'in{size}.npy', images.numpy())
    launch([sys.executable, '-c', RUNTIMES[format], *KINDS])
    for kind, path in paths.items():
        for size, images in inputs.items():
            with torch.no_grad():
                expected = exported[kind][1](images).numpy()
            np.testing.assert_allclose(np.load(tmp_path / f'{kind}{size}.npy'), expected, rtol=1e-4, atol=1e-4)
        told, of_pixels = metadata_of(path), kind == 'segmentation'
        assert json.loads(told['class_names']) == (['a', 'b', 'c', 'd'] if of_pixels else NAMES)
        assert json.loads(told['mean']) == [0.4, 0.5, 0.6]
        assert json.loads(told['std']) == [0.2, 0.3, 0.1]
        assert json.loads(told['input_size']) == [3, 32, 32]
        assert (told['output'], told['interpolation']) == ('logits', 'bilinear')
        assert (told['task'] == 'segmentation') == of_pixels
        assert told.get('crop_pct') == (None if of_pixels else '0.9')


@pytest.mark.parametrize('kind', KINDS)
def test_weights_alone_are_plain_timms(exported, tmp_path, kind):
    folder, model = exported[kind]
    main(['export', str(folder), '--format', 'safetensors', '--output', str(tmp_path / 'out')])
    backbone = getattr(model, 'backbone', model)
    found = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, num_classes=backbone.num_classes)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, backbone.state_dict()[name]), name
    assert deployment.deploy(tmp_path / 'out', 'safetensors', tmp_path / 'again').difference == {1: 0, 2: 0, 5: 0}


@pytest.fixture(scope='module')
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resnet')
    export_model(create('test_resnet'), str(folder), {**IMAGES, 'crop_pct': 1.0, 'crop_mode': 'center'}, NAMES)
    return folder


def test_with_its_preprocessing_a_file_takes_pixels_and_returns_probabilities(resnet, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    picture.save(tmp_path / 'a.png')
    path = tmp_path / 'model.pt2'
    main(['export', str(resnet), '--format', 'torch.export', '--output', str(path), '--with-preprocessing'])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    found = torch.export.load(path).module()(pixels)[0]
    (prediction,) = Predictor(resnet, 'cpu')(tmp_path / 'a.png')
    expected = dict(zip(prediction.indices, prediction.probabilities, strict=True))
    assert found.tolist() == pytest.approx([expected[i] for i in range(3)], rel=1e-5)
    model = timm.create_model(f'local-dir:{resnet}', pretrained=True).eval()
    image = create_transform(**resolve_model_data_config(model))(picture)
    torch.testing.assert_close(found, model(image[None])[0].softmax(dim=0))


def test_another_image_size_and_a_fixed_batch(tmp_path):
    model = create('test_vit')
    export_model(model, str(tmp_path / 'model'), {**IMAGES, 'crop_pct': 1.0, 'crop_mode': 'center'}, NAMES)
    written = deployment.deploy(tmp_path / 'model', 'torch.export', tmp_path / 'f.pt2', (48, 64), batch_size=3)
    assert list(written.difference) == [3]
    images = torch.randn(3, 3, 48, 64)
    model.set_input_size(img_size=(48, 64))
    loaded = torch.export.load(tmp_path / 'f.pt2').module()
    torch.testing.assert_close(loaded(images), model(images))
    with pytest.raises(Exception, match='(?i)expected .*3|guard|size'):
        loaded(images[:2])


def test_a_file_that_computes_something_else_is_deleted(resnet, tmp_path, monkeypatch):
    kind = formats.FORMATS['torch.export']

    def load(path):
        model = kind.load(path)
        return lambda batch: model(batch) * 1.01

    monkeypatch.setitem(formats.FORMATS, 'torch.export', kind._replace(load=load))
    (tmp_path / 'model.pt2').write_text('before')
    with pytest.raises(ValueError, match='those of the exported file differ by .* with 1 image'):
        deployment.deploy(resnet, 'torch.export', tmp_path / 'model.pt2')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['before']


@pytest.mark.parametrize(
    'words, message',
    [
        ('RUN --output model.pb', "Expected a file that ends in .onnx for onnx, got 'model.pb'"),
        ('RUN --format safetensors --output RUN', 'Expected a new or empty folder to write to'),
        ('RUN --format safetensors --output new -b 3', 'safetensors holds weights alone'),
        ('RUN --format torch.export -b 0', 'Expected a batch_size of 1 or more, got 0'),
        ('RUN --img-size 1 2 3', '--img-size: expected one size or height and width, got [1, 2, 3]'),
        ('VIT --img-size 8 --format torch.export', 'Expected a size that the model takes as --img-size, got 8 x 8'),
        ('nowhere', 'Expected the output folder of a run, an exported model or its weights'),
    ],
)
def test_bad_input_is_refused_in_a_sentence(resnet, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    export_model(create('test_vit'), str(tmp_path / 'vit'), IMAGES, NAMES)
    places = {'RUN': str(resnet), 'VIT': str(tmp_path / 'vit')}
    with pytest.raises(SystemExit) as stopped:
        main(['export', *(places.get(word, word) for word in words.split())])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['vit']


def test_a_missing_package_is_named_with_its_extra(resnet, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit):
        main(['export', str(resnet), '--output', str(tmp_path / 'model.onnx')])
    assert "pip install 'timm-coretune[onnx]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_commands_and_readers_of_the_docs_run(resnet, tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime', reason="needs the 'test-formats' extra")
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'output' / 'train' / 'RUN').mkdir(parents=True)
    for path in resnet.iterdir():
        (tmp_path / 'output' / 'train' / 'RUN' / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.zeros((40, 32, 3), dtype=np.uint8)).save('image.png')
    text = (ROOT / 'docs' / 'exporting.md').read_text()
    (block,) = re.findall(r'```bash\n(.*?)```', text, re.DOTALL)
    for line in block.splitlines():
        main(shlex.split(line)[1:])
    (prediction,) = Predictor('output/train/RUN', 'cpu')(['image.png'])
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 2
    for source in blocks:
        capsys.readouterr()
        exec(source, {})
        assert capsys.readouterr().out.strip() == prediction.label
