"""scripts/pretrain.py: its losses, its views, its kNN, and that its files load by name"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from augment import Augment
from contrastive import MoCo, nt_xent
from PIL import Image
from pretrain import knn_top1, main
from safetensors import safe_open
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms.functional import rgb_to_grayscale

from timm_coretune import load_checkpoint


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_loss_of_simclr_is_that_of_the_paper():
    first, second = F.normalize(draw(2, 5, 8), dim=2)
    views = [*first, *second]
    terms = []
    for i in range(10):
        similarity = [math.exp(float(views[i] @ views[k]) / 0.2) for k in range(10)]
        terms.append(-math.log(similarity[(i + 5) % 10] / (sum(similarity) - similarity[i])))
    assert nt_xent(first, second, 0.2).item() == pytest.approx(sum(terms) / 10, rel=1e-5)


def test_moco_contrasts_queries_with_past_keys_and_moves_the_key_encoder():
    torch.manual_seed(0)
    method = MoCo(timm.create_model('test_resnet', num_classes=0), 0.2, 12, 0.9, 2, torch.Generator().manual_seed(0))
    method.eval()  # then the statistics of a batch play no part
    with torch.no_grad():
        for parameter in method.key_encoder.parameters():
            parameter.mul_(0.5)
    queue, old = method.queue.clone(), method.key_encoder[1][0].weight.clone()
    views = draw(2, 6, 3, 32, 32)
    loss = method(*views)
    query_weight = method.encoder[1][0].weight
    torch.testing.assert_close(method.key_encoder[1][0].weight, 0.9 * old + 0.1 * query_weight)
    with torch.no_grad():
        queries, keys = F.normalize(method.encoder(views[0])), F.normalize(method.key_encoder(views[1]))
    terms = []
    for query, key in zip(queries, keys, strict=True):
        positive, *negatives = (math.exp(float(query @ other) / 0.2) for other in (key, *queue.T))
        terms.append(-math.log(positive / (positive + sum(negatives))))
    assert loss.item() == pytest.approx(sum(terms) / 6, rel=1e-4)
    torch.testing.assert_close(method.queue, torch.cat([keys.T, queue[:, 6:]], dim=1))


def views_of(picture, **strengths):
    none = dict(min_crop=0.3, flip_prob=0, rotation=0, jitter=0, grey_prob=0, blur_prob=0)
    augment = Augment(32, **{**none, **strengths}, generator=torch.Generator().manual_seed(0))
    return augment(picture.expand(16, -1, -1, -1))


def test_a_crop_is_a_part_of_the_picture_of_the_area_that_is_asked_for():
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing='ij')
    picture = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    views = views_of(picture) * 255
    height, width = views[:, 0, -1, 0] - views[:, 0, 0, 0], views[:, 1, 0, -1] - views[:, 1, 0, 0]
    assert bool((height > 0).all() and (width > 0).all())
    assert views[:, :2].max() < 96
    area = height * width / (96 * 31 / 32) ** 2
    assert 0.28 < area.min() < 0.5 < area.max() < 1.01
    mirrored = views_of(picture, flip_prob=1) * 255
    torch.testing.assert_close(mirrored, views.flip(3), atol=1e-3, rtol=0)
    turned = views_of(picture, rotation=30)
    assert not torch.allclose(turned[:, 0, 0, 0], turned[:, 0, 0, -1], atol=1e-3)  # rows are level no more


def test_colours_change_as_they_should():
    picture = (draw(3, 48, 48).sigmoid() * 255).to(torch.uint8)
    plain = views_of(picture)
    grey = views_of(picture, grey_prob=1)
    torch.testing.assert_close(grey, rgb_to_grayscale(plain, 3), atol=2e-3, rtol=0)
    jittered = views_of(picture, jitter=0.4)
    assert not torch.allclose(jittered, plain, atol=0.05)
    assert torch.equal(jittered, jittered.clamp(0, 1))


def test_knn_is_that_of_scikit_learn():
    bank, labels, queries = draw(60, 4), torch.arange(60) % 3, draw(90, 4)[60:]
    reference = KNeighborsClassifier(20, metric='cosine', weights=lambda distance: torch.exp(
        (1 - torch.from_numpy(distance)) / 0.07).numpy()).fit(bank, labels)  # fmt: skip
    found = torch.from_numpy(reference.predict(queries))
    assert knn_top1(bank, labels, queries, found) == 100
    assert knn_top1(bank, labels, queries, (found + 1) % 3) == 0


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """12 pictures of 2 classes to train on, 4 others, grey ones and one that is not square among them."""
    root = tmp_path_factory.mktemp('pictures')
    for i, pixels in enumerate((draw(16, 40, 40, 3).sigmoid() * 255).to(torch.uint8).numpy()):
        path = root / ('train' if i < 12 else 'test') / f'class {i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:30] if i == 3 else pixels).convert('L' if i % 3 == 0 else 'RGB').save(path)
    return root


def run(pictures, output, method, model, *further):
    main(['--method', method, '--model', model, '--data-dir', str(pictures / 'train'), '--bank',
          str(pictures / 'train'), '--queries', str(pictures / 'test'), '--unseen', str(pictures / 'test'),
          '--license', 'CC0-1.0', '--output', str(output), '--epochs', '2', '--batch-size', '4', '--queue-size', '8',
          '--device', 'cpu', *further])  # fmt: skip


@pytest.mark.parametrize(
    'method, model, further, expected',
    [
        ('simclr', 'test_efficientnet', ['--amp'], ('SimCLR of Spijkervet', 'encoder', 'encoder.')),
        ('moco', 'test_resnet', [], ('MoCo v1/v2, PCL', 'query encoder', 'module.encoder_q.')),
        ('simclr', 'test_vit', ['--opt', 'adamw', '--model-kwargs', 'img_size=32'],
         ('SimCLR of Spijkervet', 'encoder', 'encoder.')),
    ],
)  # fmt: skip
def test_a_run_writes_a_file_that_loads_by_name(method, model, further, expected, pictures, tmp_path, capsys):
    output = tmp_path / 'network.safetensors'
    run(pictures, output, method, model, *further)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    assert [line.split(' |')[0] for line in table[2:]] == [
        '| raw pixels', f'| random {model}, mean of 3 seeds',
        f'| {model}, {"SimCLR" if method == "simclr" else "MoCo v2"}, 2 epochs',
    ]  # fmt: skip
    network = timm.create_model(model, num_classes=2, **({'img_size': 32} if 'vit' in model else {}))
    report = load_checkpoint(network, output)
    assert (report.method, report.copy, report.left_over) == (*expected[:2], ())
    assert report.data_config['mean'] == tuple(network.pretrained_cfg['mean'])
    with safe_open(output, 'pt') as file:
        assert all(torch.equal(network.state_dict()[k], file.get_tensor(expected[2] + k)) for k in report.loaded)
        written = file.metadata()
    assert (written['license'], written['start'], written['architecture']) == ('CC0-1.0', 'random weights', model)
    assert written['data'].endswith('/train')
    torch.manual_seed(0)  # the seed of the run, so these are its weights at the start
    start = timm.create_model(model, num_classes=0, **({'img_size': 32} if 'vit' in model else {}))
    assert not any(
        torch.equal(p, network.get_parameter(n)) for n, p in start.named_parameters() if n.endswith('weight')
    )


def test_a_run_continues_other_weights_and_its_table_says_how_good_they_were(pictures, tmp_path, capsys):
    torch.manual_seed(5)
    start = timm.create_model('test_resnet', num_classes=0)
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    run(pictures, tmp_path / 'next.safetensors', 'simclr', 'test_resnet', '--pretrained-path',
        str(tmp_path / 'start.pth'), '--lr', '0')  # fmt: skip
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| test_resnet')]
    assert [row.split(' |')[0] for row in rows] == ['| test_resnet, start.pth', '| test_resnet, SimCLR, 2 epochs']
    network = timm.create_model('test_resnet', num_classes=0)
    load_checkpoint(network, tmp_path / 'next.safetensors')
    assert all(torch.equal(p, start.get_parameter(name)) for name, p in network.named_parameters())


def test_a_picture_that_must_not_be_seen_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match='12 pictures of --unseen are in --data-dir: train on other folders'):
        run(pictures, tmp_path / 'x.safetensors', 'simclr', 'test_resnet', '--unseen', str(pictures))
    with pytest.raises(ValueError, match='at least --batch-size 64 pictures, found 12'):
        run(pictures, tmp_path / 'x.safetensors', 'simclr', 'test_resnet', '--batch-size', '64')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='Expected pictures in .*empty'):
        run(pictures, tmp_path / 'x.safetensors', 'simclr', 'test_resnet', '--data-dir', str(tmp_path / 'empty'))
    assert not (tmp_path / 'x.safetensors').exists()
