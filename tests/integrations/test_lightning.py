"""CoreTuningModule takes the steps of a plain loop, resumes with its loss, and leaves a plain timm model"""

import functools
import runpy

import pytest
import timm
import torch
from paths import ROOT
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune import CoreTuningLoss, load_checkpoint

lightning = pytest.importorskip('lightning')
pytestmark = pytest.mark.slow  # its import takes longer than the tests

TARGET = torch.tensor([0, 1, 0, 2, 1, 3, 0, 0])
SGD = functools.partial(create_optimizer_v2, opt='sgd', lr=0.1, momentum=0.9, weight_decay=0.0)


def create_model():
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=4, img_size=32)


def create_criterion(model):
    torch.manual_seed(1)
    return CoreTuningLoss(model, contrast_weight=0.5, generator=torch.Generator().manual_seed(2))


def create_module(model, optimizer=SGD, **kwargs):
    from timm_coretune.integrations import CoreTuningModule

    return CoreTuningModule(model, optimizer, create_criterion(model), **kwargs)


def create_loader():
    images = torch.randn(len(TARGET), 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images, TARGET), batch_size=4)


def create_trainer(folder, max_epochs=2, **kwargs):
    return lightning.Trainer(
        max_epochs=max_epochs,
        accelerator='cpu',
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def plain_loop(num_epochs, num_accum=1):
    model = create_model()
    criterion = create_criterion(model)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(num_epochs):
        for i, (images, target) in enumerate(create_loader()):
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            (criterion(features, model.head(features), target) / num_accum).backward()
            if (i + 1) % num_accum == 0:
                optimizer.step()
                optimizer.zero_grad()
    return model, criterion


def assert_same(module, expected, **tolerance):
    state = module.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name, **tolerance)


@pytest.mark.parametrize('num_accum', [1, 2], ids=['plain', 'accumulated'])
def test_updates_and_scores_are_those_of_a_plain_loop(tmp_path, num_accum):
    module = create_module(create_model())
    trainer = create_trainer(tmp_path, accumulate_grad_batches=num_accum, enable_checkpointing=False)
    trainer.fit(module, create_loader(), create_loader())
    model, criterion = plain_loop(2, num_accum)
    assert_same(module.model, model, rtol=1e-5, atol=1e-6)
    assert_same(module.task.criterion, criterion, rtol=1e-5, atol=1e-6)
    logits = model.eval()(create_loader().dataset.tensors[0])
    loss = torch.nn.functional.cross_entropy(logits, TARGET).item()
    scores = trainer.callback_metrics
    assert scores['val_loss'].item() == pytest.approx(loss, rel=1e-4)
    assert scores['val_top1'].item() == pytest.approx(100 * (logits.argmax(1) == TARGET).float().mean().item())
    assert {'train_loss', 'train_task_loss', 'train_contrast_loss'} <= scores.keys()
    predicted = torch.cat(trainer.predict(module, create_loader()))
    torch.testing.assert_close(predicted, logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_resumes_with_the_loss_and_has_the_weights_of_timm(tmp_path):
    whole, file = create_module(create_model()), tmp_path / 'last.ckpt'
    create_trainer(tmp_path, 3, enable_checkpointing=False).fit(whole, create_loader())
    first = create_module(create_model())
    trainer = create_trainer(tmp_path, 1, enable_checkpointing=False)
    trainer.fit(first, create_loader())
    trainer.save_checkpoint(file)
    again = create_module(create_model())
    create_trainer(tmp_path, 3, enable_checkpointing=False).fit(again, create_loader(), ckpt_path=file)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.model.state_dict().keys() == create_model().state_dict().keys()

    plain = timm.create_model('test_vit', num_classes=4, img_size=32)
    load_checkpoint(plain, file, load_classifier=True)
    for name, value in first.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


def test_methods_that_need_the_optimizer_and_each_update_get_them(tmp_path):
    from timm_coretune.integrations import CoreTuningModule

    module = CoreTuningModule(create_model(), SGD, 'spd')
    create_trainer(tmp_path, enable_checkpointing=False).fit(module, create_loader())
    assert module.task.criterion.has_optimizer
    module = CoreTuningModule(create_model(), SGD, 'coin', contrast_only=0.5)
    create_trainer(tmp_path, enable_checkpointing=False, accumulate_grad_batches=2).fit(module, create_loader())
    criterion = module.task.criterion
    assert (criterion.num_done.item(), criterion.num_contrast_only) == (2, 1)  # of two updates, the first


def test_a_module_without_optimizer_is_told_so(tmp_path):
    with pytest.raises(ValueError, match=r'Expected optimizer=\.\.\. of CoreTuningModule, or a subclass'):
        create_trainer(tmp_path).fit(create_module(create_model(), None), create_loader())


@pytest.mark.parametrize('name', ['lightning_module.py', 'fabric_loop.py', 'accelerate_loop.py'])
def test_the_example_runs(monkeypatch, tmp_path, capsys, name):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / 'examples' / name))
    printed = capsys.readouterr().out
    assert float(printed.split('accuracy ')[-1].split()[0]) > 60  # chance: 10
