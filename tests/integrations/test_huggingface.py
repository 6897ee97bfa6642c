"""The Trainer of transformers with a loss of this package takes the steps of a plain loop, and is plain elsewhere"""

import runpy

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

from timm_coretune import CoreTuningLoss

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.slow  # its import takes longer than the tests

NUM_CLASSES, LEARNING_RATE = 4, 0.5


def resnet_of(transformers):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type='basic')
    return transformers.ResNetForImageClassification(config), lambda m, x: m.resnet(x).pooler_output.flatten(1)


def vit_of(transformers):
    # the width of the layers is the number of classes: the last layer with so many outputs is the classifier
    config = transformers.ViTConfig(
        hidden_size=NUM_CLASSES,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,  # so that images differ
    )
    return transformers.ViTForImageClassification(config), lambda m, x: m.vit(x).last_hidden_state[:, 0]


def timm_of(transformers):
    config = transformers.TimmWrapperConfig(architecture='test_vit', model_args={'img_size': 16})
    model = transformers.TimmWrapperForImageClassification(config)
    network = model.timm_model
    return model, lambda m, x: network.forward_head(network.forward_features(x), pre_logits=True)


def classifier_of(model):
    if hasattr(model, 'timm_model'):
        return model.timm_model.get_classifier()
    return model.classifier


MODELS = {'resnet': resnet_of, 'vit': vit_of, 'timm': timm_of}


def create_model(kind='vit'):
    torch.manual_seed(3)
    names = {i: str(i) for i in range(NUM_CLASSES)}
    originals = {name: getattr(transformers, name) for name in ('ResNetConfig', 'ViTConfig', 'TimmWrapperConfig')}

    class WithLabels:
        def __getattr__(self, name):
            found = originals.get(name)
            return getattr(transformers, name) if found is None else lambda **kw: found(id2label=names, **kw)

    return MODELS[kind](WithLabels())


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {'pixel_values': torch.randn(3, 16, 16, generator=generator), 'labels': i % NUM_CLASSES} for i in range(count)
    ]


def create_trainer(model, folder, count=10, collate=None, create=None, **kwargs):
    from timm_coretune.integrations import CoreTuningTrainer

    own = {name: kwargs.pop(name) for name in ('criterion', 'loss_kwargs', 'classifier') if name in kwargs}
    settings = {
        'max_steps': 2,
        'per_device_train_batch_size': 4,
        'learning_rate': LEARNING_RATE,
        'lr_scheduler_type': 'constant',
        'optim': 'sgd',
        'max_grad_norm': 0.0,
        'logging_steps': 1,
        'save_strategy': 'no',
        'report_to': 'none',
        'use_cpu': True,
        'disable_tqdm': True,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **kwargs})
    return (create or CoreTuningTrainer)(
        model,
        arguments,
        data_collator=collate,
        train_dataset=images(count),
        eval_dataset=images(6, seed=1),
        **own,
    )


def create_criterion(width, **kwargs):
    torch.manual_seed(4)
    return CoreTuningLoss(width, contrast_weight=0.5, generator=torch.Generator().manual_seed(5), **kwargs)


class Recorder:
    """A collator that keeps the batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append((torch.stack([r['pixel_values'] for r in rows]), torch.tensor([r['labels'] for r in rows])))
        return dict(zip(('pixel_values', 'labels'), self.batches[-1], strict=True))


def plain_loop(model, criterion, features_of, batches, num_accum):
    """Updates by hand. A batch counts as many times as it has images, unless the model takes no such number."""
    model.train()
    classifier = classifier_of(model)
    for start in range(0, len(batches), num_accum):
        own = batches[start : start + num_accum]
        is_weighted = getattr(model, 'accepts_loss_kwargs', True)
        num_images = sum(len(target) for _, target in own)
        for input, target in own:
            features = features_of(model, input)
            share = len(target) / num_images if is_weighted else 1 / len(own)
            (criterion(features, classifier(features), target) * share).backward()
        with torch.no_grad():
            for p in [*model.parameters(), *criterion.parameters()]:
                p -= LEARNING_RATE * p.grad
                p.grad = None


@pytest.mark.parametrize('num_accum', [1, 3], ids=['plain', 'accumulated'])
@pytest.mark.parametrize('kind', MODELS)
def test_updates_are_those_of_a_plain_loop(tmp_path, kind, num_accum):
    model, _ = create_model(kind)
    again, features_of = create_model(kind)
    width = [p for p in classifier_of(again).parameters() if p.ndim == 2][0].shape[1]
    recorder = Recorder()
    trainer = create_trainer(
        model,
        tmp_path,
        collate=recorder,
        criterion=create_criterion(width),
        gradient_accumulation_steps=num_accum,  # 4, 4 and 2 images of the 10
    )
    trainer.train()
    batches = recorder.batches[: 2 * num_accum]
    assert [len(target) for _, target in batches] == [4, 4, 2, 4, 4, 2][: len(batches)]
    expected = create_criterion(width)
    plain_loop(again, expected, features_of, batches, num_accum)
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=name)
    for (name, p), q in zip(expected.named_parameters(), trainer.criterion.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=name)
    first = create_criterion(width).projector.fc1.weight
    assert (expected.projector.fc1.weight - first).abs().max() > 1e-4  # it has moved


def test_evaluation_and_prediction_are_those_of_the_plain_trainer(tmp_path):
    model, _ = create_model('resnet')
    ours = create_trainer(model, tmp_path, loss_kwargs={'contrast_weight': 0.3})
    theirs = create_trainer(model, tmp_path, create=transformers.Trainer)
    ours.train()
    assert ours.evaluate()['eval_loss'] == theirs.evaluate()['eval_loss']
    first, second = (trainer.predict(images(6, seed=2)) for trainer in (ours, theirs))
    assert (first.predictions == second.predictions).all()
    assert (first.label_ids == second.label_ids).all()
    assert first.metrics['test_loss'] == second.metrics['test_loss']


def test_saved_models_are_plain_and_a_resumed_run_continues(tmp_path):
    kwargs = dict(max_steps=4, save_strategy='steps', save_steps=2, optim='adamw_torch', learning_rate=0.01)
    model, _ = create_model('resnet')  # those of ViT have other names in files, which no Trainer of 5.24 reads again
    plain = set(model.state_dict())
    trainer = create_trainer(model, tmp_path / 'whole', loss_kwargs={'contrast_weight': 0.5}, **kwargs)
    trainer.train()
    assert set(model.state_dict()) == plain
    assert {'task_loss', 'contrast_loss', 'loss'} <= trainer.state.log_history[0].keys()
    for folder in (tmp_path / 'whole' / 'checkpoint-2', tmp_path / 'whole' / 'checkpoint-4'):
        assert set(load_file(folder / 'model.safetensors')) == plain
    loaded = type(model).from_pretrained(tmp_path / 'whole' / 'checkpoint-4')
    for name, p in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p), name

    again, _ = create_model('resnet')
    resumed = create_trainer(again, tmp_path / 'resumed', loss_kwargs={'contrast_weight': 0.5}, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / 'whole' / 'checkpoint-2'))
    for one, other in ((model, again), (trainer.criterion, resumed.criterion)):
        for name, p in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], p), name

    (tmp_path / 'whole' / 'checkpoint-2' / 'coretune.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='coretune.safetensors, the state of the loss, found none'):
        resumed.train(resume_from_checkpoint=str(tmp_path / 'whole' / 'checkpoint-2'))


def test_the_best_model_is_loaded_at_the_end(tmp_path, caplog):
    model, _ = create_model('timm')
    kwargs = dict(eval_strategy='steps', eval_steps=1, save_strategy='steps', save_steps=1, learning_rate=1e-3)
    trainer = create_trainer(model, tmp_path, load_best_model_at_end=True, **kwargs)
    trainer.train()
    best = load_file(f'{trainer.state.best_model_checkpoint}/model.safetensors')
    assert all(torch.equal(p, best[name]) for name, p in model.state_dict().items())
    assert 'missing keys' not in caplog.text


def test_settings_of_the_model_and_the_arguments_reach_the_loss(tmp_path):
    model, _ = create_model()
    assert create_trainer(model, tmp_path, label_smoothing_factor=0.2).criterion.label_smoothing == 0.2
    model.config.problem_type = 'multi_label_classification'
    assert create_trainer(model, tmp_path, criterion='scl').criterion.multi_label


def test_what_does_not_fit_is_answered_with_the_remedy(tmp_path):
    model, _ = create_model()
    criterion = create_criterion(NUM_CLASSES)
    for message, kwargs in {
        'Expected a loss that follows from features and logits, got L2SPLoss': {'criterion': 'l2-sp'},
        r"not both: \['temperature'\]": {'criterion': criterion, 'loss_kwargs': {'temperature': 1.0}},
        'Expected label_smoothing_factor=0.0, as the criterion has it, got 0.1': {
            'criterion': criterion,
            'label_smoothing_factor': 0.1,
        },
        "got ViTForImageClassification without the layer 'head'. Pass classifier=.*classifier": {'classifier': 'head'},
    }.items():
        with pytest.raises(ValueError, match=message):
            create_trainer(model, tmp_path, **kwargs)
    with pytest.raises(RuntimeError, match="got others. Pass classifier='<name of the layer"):
        create_trainer(model, tmp_path, classifier='vit.layers.0.mlp.fc2').train()
    assert not hasattr(model, 'coretune')
    from timm_coretune.integrations import CoreTuningTrainer

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to='none')
    trainer = CoreTuningTrainer(model, arguments, train_dataset=images(8), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match='an optimizer that has the parameters of the loss, got one without'):
        trainer.train()


def test_the_example_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / 'examples' / 'transformers_trainer.py'))
    printed = capsys.readouterr().out
    assert float(printed.split('accuracy ')[-1].split()[0]) > 60  # chance: 10
    saved = load_file('output/transformers/tuned/model.safetensors')
    assert not [name for name in saved if 'projector' in name]
