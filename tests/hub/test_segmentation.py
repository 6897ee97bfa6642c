"""Segmentation models on a Hub on loopback: what a push leaves there, and what comes back of it"""

import json
import os
import time

import numpy as np
import pytest
import timm
import torch
import yaml
from hub_server import Repository
from huggingface_hub import ModelCard
from paths import SAMPLE
from PIL import Image
from runs import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from segmentation_models import tuned

from timm_coretune.export import create_config, export_model, save_weights, write_json
from timm_coretune.hub import HubError, push_run
from timm_coretune.segmentation import export_segmentation_model, load_segmentation_model, predict_image
from timm_coretune.segmentation.data.scenes import FashionScenes
from timm_coretune.segmentation.locate import find_model_files

NAMES = ['sky', 'road', 'car']

pytestmark = pytest.mark.usefixtures('one_thread')
HEAD = {'mean': [0.4, 0.5, 0.6], 'std': [0.1, 0.2, 0.3], 'interpolation': 'bilinear'}
DATA_CONFIG = {**HEAD, 'input_size': (3, 96, 96), 'crop_pct': 1.0, 'crop_mode': 'center'}
ARGS = dict(
    model='test_resnet', pretrained=True, initial_checkpoint='', pretrained_path='', dataset='',
    data_dir='/home/me/street', val_split='validation', coretune=True, contrast_weight=1.0, epochs=2,
    segmentation=True, segmentation_head='deeplabv3', anchors_per_image=64, reduce_zero_label=False,
)  # fmt: skip
SUMMARY = (
    'epoch,train_loss,eval_loss,eval_pa,eval_mpa,eval_miou,eval_fwiou,lr\n'
    '0,2.5,0.9,81.5,61.25,51.5,71.5,0.1\n1,2.0,1.1,80.5,60.5,50.5,70.5,0.05\n'
)


@pytest.fixture
def backbone():
    model = timm.create_model('test_resnet', num_classes=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return model


@pytest.fixture
def run_folder(tmp_path, backbone):
    """A folder as a run of segmentation leaves it, of 2 epochs."""
    folder = tmp_path / 'run'
    folder.mkdir()
    tensors = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    tensors.update({'decoder.0.weight': torch.randn(8, 256, 3, 3), 'classifier.weight': torch.randn(3, 8, 1, 1)})
    save_weights(tensors, str(folder / 'model_best.safetensors'), epoch='0', weights='ema')
    write_json(create_config(backbone, DATA_CONFIG), str(folder / 'backbone.json'))
    config = {
        'head': 'deeplabv3', 'num_classes': 3, 'class_names': NAMES, 'ignore_index': 255, 'img_size': [96, 96], **HEAD,
        'reductions': [4, 8, 16, 32], 'backbone': json.loads((folder / 'backbone.json').read_text()),
    }  # fmt: skip
    (folder / 'backbone.json').unlink()
    (folder / 'segmentation.json').write_text(json.dumps(config))
    (folder / 'args.yaml').write_text(yaml.safe_dump(ARGS))
    (folder / 'summary.csv').write_text(SUMMARY)
    for name in ('curves.png', 'confusion.csv', 'confusion.png', 'per_class.csv', 'segmentation.png'):
        (folder / name).write_bytes(f'this is {name}'.encode())
    (folder / 'last.pth.tar').write_bytes(b'not to be pushed')
    return folder


def test_a_run_is_pushed_whole_and_its_backbone_for_plain_timm(hub, run_folder, backbone, tmp_path):
    push_run(str(run_folder), 'me/street')
    files = hub.repositories['me/street'].files()
    run_files = {
        *('args.yaml', 'summary.csv', 'curves.png', 'confusion.csv', 'confusion.png', 'per_class.csv'),
        *('segmentation.png', 'segmentation.json', 'segmentation.safetensors'),
    }
    assert set(files) == run_files | {'README.md', 'config.json', 'model.safetensors'}
    for name in run_files:
        local = run_folder / {'segmentation.safetensors': 'model_best.safetensors'}.get(name, name)
        assert name == 'args.yaml' or files[name] == local.read_bytes()
    assert str(run_folder.parent).encode() not in files['args.yaml']
    assert len(hub.repositories['me/street'].branches['main']) == 2  # one commit after the initial one
    assert json.loads(files['config.json']) == json.loads(files['segmentation.json'])['backbone']
    (tmp_path / 'pushed.safetensors').write_bytes(files['model.safetensors'])
    with safe_open(tmp_path / 'pushed.safetensors', framework='pt') as pushed:
        assert pushed.metadata() == {'format': 'pt', 'epoch': '0', 'weights': 'ema'}
    backbone.load_state_dict(load_file(tmp_path / 'pushed.safetensors'), strict=True)


@pytest.mark.slow
def test_the_backbone_comes_back_with_the_same_features(hub, run_folder, backbone, run_python, tmp_path):
    push_run(str(run_folder), 'me/street')
    image = torch.randn(2, 3, 96, 96)
    torch.save(image, tmp_path / 'image.pt')
    code = (
        'import json, sys, timm, torch\n'
        'models = [\n'
        '    timm.create_model("hf-hub:me/street", pretrained=True, **kwargs).eval()\n'
        '    for kwargs in ({"num_classes": 0}, {})\n'
        ']\n'
        'assert "timm_coretune" not in sys.modules\n'
        'torch.save([model(torch.load("image.pt")) for model in models], "output.pt")\n'
        'print(json.dumps(timm.data.resolve_data_config({}, model=models[0])))\n'
    )
    config = json.loads(run_python(code))
    for features in torch.load(tmp_path / 'output.pt'):
        assert torch.equal(features, backbone(image))
    assert config == json.loads(json.dumps(DATA_CONFIG))


def test_the_card_tells_of_a_segmentation(hub, run_folder):
    push_run(str(run_folder), 'me/street', license='mit')
    card = ModelCard(hub.repositories['me/street'].files()['README.md'].decode())
    assert card.data.pipeline_tag == 'image-segmentation'
    assert card.data.tags == ['image-segmentation', 'timm', 'coretune', 'test_resnet']
    front = card.data.to_dict()
    assert (front['library_name'], front['license']) == ('timm', 'mit')
    assert card.data.base_model == 'timm/test_resnet.r160_in1k'
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        'mean_iou': 51.5, 'pixel_accuracy': 81.5, 'mean_accuracy': 61.25, 'frequency_weighted_iou': 71.5, 'loss': 0.9,
    }  # fmt: skip
    assert {result.task_type for result in results.values()} == {'image-segmentation'}
    assert (results['mean_iou'].metric_name, results['mean_iou'].dataset_name) == ('mIoU (%)', 'street')
    assert 'the moving average (EMA) of the weights after epoch 0, the best of epochs 0 to 1' in card.text
    assert '- Architecture: `test_resnet` with a `deeplabv3` head, 3 classes\n' in card.text
    assert '- Input: 3 x 96 x 96, mean [0.4, 0.5, 0.6], std [0.1, 0.2, 0.3], bilinear interpolation\n' in card.text
    assert '| mIoU (%) | 51.5 | 50.5 |' in card.text
    assert '| `--segmentation-head` | deeplabv3 |' in card.text
    assert '| `--anchors-per-image` | 64 |' in card.text
    assert 'reduce-zero-label' not in card.text
    assert 'classifier' not in card.text
    assert '```bash\npip install timm-coretune\n```' in card.text
    assert '[timm_coretune](https://github.com/timm-coretune/timm_coretune) loads it' in card.text
    assert 'REPO_ID' not in card.text


def test_the_code_of_the_card_is_python_that_loads_from_its_repository(hub, run_folder):
    push_run(str(run_folder), 'me/street')
    text = hub.repositories['me/street'].files()['README.md'].decode()
    for block in text.split('```python\n')[1:]:
        compile(block.split('```')[0], 'README.md', 'exec')
    assert "model = timm_coretune.load_segmentation_model('hf-hub:me/street')" in text
    assert 'predict_image(model, image)' in text
    assert "timm.create_model('hf-hub:me/street', pretrained=True, num_classes=0)" in text
    assert 'python -m timm_coretune.segmentation predict hf-hub:me/street IMAGES --output MASKS' in text


def test_an_answer_that_was_lost_is_looked_up(hub, run_folder):
    hub.fail('commit', 'lost')
    push_run(str(run_folder), 'me/street')
    assert len(hub.repositories['me/street'].branches['main']) == 2


def test_the_same_backbone_in_a_commit_of_someone_else_is_not_taken_for_this_push(hub, run_folder, monkeypatch):
    push_run(str(run_folder), 'me/street')
    repository = hub.repositories['me/street']
    tensors = load_file(run_folder / 'model_best.safetensors')
    tensors['classifier.weight'] += 1  # the backbone was frozen
    save_weights(tensors, str(run_folder / 'model_best.safetensors'), epoch='0', weights='ema')
    theirs = ('1' * 40, 'theirs', repository.files())
    monkeypatch.setattr(time, 'sleep', lambda _: repository.add_once(theirs))
    hub.fail('commit', 'cut')
    with pytest.raises(HubError, match='changed by someone else'):
        push_run(str(run_folder), 'me/street')


def test_a_folder_that_is_no_run_is_refused(hub, run_folder):
    save_file({'conv1.weight': torch.zeros(1)}, run_folder / 'model_best.safetensors')
    with pytest.raises(ValueError, match="none of its keys starts with 'backbone.'"):
        push_run(str(run_folder), 'me/street')
    (run_folder / 'segmentation.json').unlink()
    with pytest.raises(ValueError, match=r'found no segmentation.json or config.json\.$'):
        push_run(str(run_folder), 'me/street')
    assert hub.requests == []


@pytest.mark.slow
def test_heads_of_transformers_come_back_from_the_hub(hub, run_folder, run_python, tmp_path):
    images = torch.randn(1, 3, 64, 64)
    torch.save(images, tmp_path / 'images.pt')
    models = {head: tuned('test_vit', head) for head in ('linear', 'eomt')}
    for head, model in models.items():
        export_segmentation_model(model, str(run_folder), class_names=['a', 'b', 'c', 'd'])
        os.replace(run_folder / 'segmentation.safetensors', run_folder / 'model_best.safetensors')
        push_run(str(run_folder), f'me/{head}')
    run_python(
        'import timm, torch, timm_coretune\n'
        'outputs = []\n'
        'for head in ("linear", "eomt"):\n'
        '    model = timm_coretune.load_segmentation_model(f"hf-hub:me/{head}")\n'
        '    plain = timm.create_model(f"hf-hub:me/{head}", pretrained=True, num_classes=0)\n'
        '    assert all(torch.equal(x, plain.state_dict()[k]) for k, x in model.backbone.state_dict().items())\n'
        '    outputs.append(model(torch.load("images.pt")).detach())\n'
        'torch.save(outputs, "output.pt")\n'
    )
    for output, model in zip(torch.load(tmp_path / 'output.pt'), models.values(), strict=True):
        assert torch.equal(output, model(images))


# finding the files of a model


def test_the_files_of_a_run_and_of_an_exported_folder_are_found(run_folder):
    config, weights = (str(run_folder / name) for name in ('segmentation.json', 'model_best.safetensors'))
    assert find_model_files(str(run_folder)) == (config, weights)
    exported = str(run_folder / 'segmentation.safetensors')
    os.rename(weights, exported)
    assert find_model_files(str(run_folder)) == (config, exported)
    os.remove(exported)
    with pytest.raises(ValueError, match=r'Expected model_best.safetensors or segmentation.safetensors beside'):
        find_model_files(str(run_folder))


def test_what_is_no_segmentation_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="found none at 'nowhere'. Check the path"):
        find_model_files('nowhere')
    with pytest.raises(ValueError, match='found no segmentation.json. Give the output folder'):
        find_model_files(str(tmp_path))
    export_model(timm.create_model('test_resnet', num_classes=3), str(tmp_path))
    with pytest.raises(ValueError, match=r"this is a classifier. Load it with timm.create_model\('local-dir:"):
        find_model_files(str(tmp_path))


FIND = """
from timm_coretune.segmentation.locate import find_model_files
for source in {sources}:
    try:
        config, weights = find_model_files(source)
    except ValueError as e:
        print(e)
    else:
        print(open(config, 'rb').read() == open({config!r}, 'rb').read(), end=' ')
        print(open(weights, 'rb').read() == open({weights!r}, 'rb').read())
"""


@pytest.fixture
def find_anew(run_python, run_folder):
    """What a fresh process finds in sources: whether the files are those of run_folder, or why there are none."""
    config, weights = (str(run_folder / name) for name in ('segmentation.json', 'model_best.safetensors'))
    return lambda sources, **more: run_python(
        FIND.format(sources=sources, config=config, weights=weights), **more
    ).splitlines()


@pytest.mark.slow
def test_the_files_of_a_repository_are_downloaded_and_then_found_without_the_hub(hub, run_folder, find_anew):
    push_run(str(run_folder), 'me/street', revision='first')
    main = hub.repositories['me/street'].branches['main']
    config = (run_folder / 'segmentation.json').read_bytes()
    main.append(('2' * 40, 'no segmentation', {'README.md': b'', 'config.json': b'{}'}))
    hub.repositories['me/half'] = Repository()
    hub.repositories['me/half'].branches['main'].append(('3' * 40, 'half', {'segmentation.json': config}))
    hub.repositories['me/empty'] = Repository()
    sources = ['hf-hub:me/street@first', 'hf-hub:me/street', 'hf-hub:me/half', 'hf-hub:me/empty', 'hf-hub:me/none']
    found, classifier, half, empty, absent = find_anew(sources)
    assert found == 'True True'
    assert "this is a classifier. Load it with timm.create_model('hf-hub:me/street', pretrained=True)" in classifier
    assert half.startswith('Expected segmentation.safetensors beside segmentation.json in hf-hub:me/half')
    assert empty.startswith("Expected a segmentation model in 'hf-hub:me/empty', found no segmentation.json. Give")
    assert absent.startswith('Expected a repository of the Hub in hf-hub:me/none, got RepositoryNotFoundError')

    sources = ['hf-hub:me/street@first', 'hf-hub:me/other']
    again, other = find_anew(sources, HF_HUB_OFFLINE='1')
    assert again == 'True True'
    assert other.startswith('Expected a repository of the Hub in hf-hub:me/other, got LocalEntryNotFoundError')
    assert 'Check its name and the connection' in other


@pytest.mark.slow
def test_training_ends_with_a_repository_whose_card_and_command_predict_masks(hub, run_python, tmp_path):
    flags = ['--label-fraction', '0.1', '--epochs', '1', '--coretune', '--push-to-hub', 'me/scenes']
    flags += ['--model-ema', '--model-ema-publish', 'ema']
    folder = train(None, tmp_path, '--segmentation', *flags, base=())
    files = hub.repositories['me/scenes'].files()
    assert {'segmentation.json', 'segmentation.safetensors', 'segmentation.png', 'model.safetensors'} <= set(files)
    image, _ = FashionScenes(SAMPLE, 'validation').load(3)
    image = image.resize((70, 45))
    image.save(tmp_path / 'image.png')
    expected = predict_image(load_segmentation_model(folder), image)
    assert len(expected.unique()) > 1
    code = files['README.md'].decode().split('```python\n')[1].split('```')[0]
    run_python(code)
    with Image.open(tmp_path / 'mask.png') as mask:
        assert torch.equal(torch.from_numpy(np.array(mask)), expected)
    words = ['predict', 'hf-hub:me/scenes', str(tmp_path / 'image.png'), '--output', str(tmp_path / 'masks')]
    run_python(f'from timm_coretune.segmentation.__main__ import run; run({words})')
    with Image.open(tmp_path / 'masks' / 'image.png') as mask:
        assert mask.mode == 'P'
        assert torch.equal(torch.from_numpy(np.array(mask)), expected)
