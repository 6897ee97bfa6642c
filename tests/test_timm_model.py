"""Core-tuning works on every family of timm's classifiers.

One small model of each module of timm is trained for a step. Held here: logits of the plain model, features of the
announced width that the classifier consumes, no lost gradient, and which families repeat their head to get features.
"""

import copy
import re
from typing import Any, Dict, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_coretune import CoreTuningTask
from timm_coretune.timm_model import get_feature_dim

TIMM_VERSION = '1.0.31'  # whose modules and names the tables hold
NUM_CLASSES = 4
TARGET = torch.tensor([0, 1, 0, 2])


class Case(NamedTuple):
    name: str
    image_size: int = 64
    kwargs: Dict[str, Any] = {}


CASES = {  # module of timm: its smallest classifier, made smaller where arguments allow
    'beit': Case('beit_base_patch16_224', 64, dict(img_size=64, depth=1)),
    'byoanet': Case('botnet26t_256', 64, dict(img_size=64)),
    'byobnet': Case('test_byobnet', 64, dict(img_size=64)),
    'cait': Case('cait_xxs24_224', 64, dict(img_size=64)),
    'coat': Case('coat_tiny', 64, dict(img_size=64)),
    'convit': Case('convit_tiny', 64, dict(img_size=64)),
    'convmixer': Case('convmixer_768_32'),
    'convnext': Case('test_convnext'),
    'cpubone': Case('cpubone_nano'),
    'crossvit': Case('crossvit_tiny_240'),
    'csatv2': Case('csatv2'),
    'cspnet': Case('cs3darknet_focus_s'),
    'cspnext': Case('cspnext_tiny'),
    'davit': Case('davit_tiny'),
    'deepseek_vit': Case('deepseek_vit_412m', 126, dict(depth=1)),
    'deit': Case('deit_tiny_patch16_224', 64, dict(img_size=64)),
    'densenet': Case('densenet121'),
    'dla': Case('dla46x_c'),
    'dpn': Case('dpn48b'),
    'edgenext': Case('edgenext_xx_small'),
    'efficientformer': Case('efficientformer_l1', 224, dict(img_size=224)),
    'efficientformer_v2': Case('efficientformerv2_s0', 64, dict(img_size=64)),
    'efficientnet': Case('test_efficientnet'),
    'efficientvim': Case('efficientvim_m1'),
    'efficientvit_mit': Case('efficientvit_b0'),
    'efficientvit_msra': Case('efficientvit_m0', 64, dict(img_size=64)),
    'eva': Case('vit_tiny_patch16_dinov3_qkvb', 64, dict(img_size=64, depth=2)),
    'fasternet': Case('fasternet_t0'),
    'fastvit': Case('fastvit_t8'),
    'focalnet': Case('focalnet_tiny_srf'),
    'gcvit': Case('gcvit_xxtiny', 64, dict(img_size=64)),
    'gemma4_vit': Case('gemma4_vit_167m', 96, dict(depth=1)),
    'ghostnet': Case('ghostnet_050'),
    'hardcorenas': Case('hardcorenas_b'),
    'hgnet': Case('hgnetv2_b0'),
    'hiera': Case('hiera_tiny_224', 64, dict(img_size=64)),
    'hieradet_sam2': Case('sam2_hiera_tiny'),
    'hrnet': Case('hrnet_w18_small'),
    'iformer': Case('iformer_t'),
    'inception_next': Case('inception_next_atto'),
    'inception_resnet_v2': Case('inception_resnet_v2', 96),
    'inception_v3': Case('inception_v3', 96),
    'inception_v4': Case('inception_v4', 96),
    'lcnetv2': Case('lcnetv2_small'),
    'levit': Case('levit_128s', 64, dict(img_size=64)),
    'lowformer': Case('lowformer_b0'),
    'mambaout': Case('test_mambaout'),
    'maxxvit': Case('test_coatnet', 64, dict(img_size=64)),
    'metaformer': Case('poolformerv2_s12'),
    'mlp_mixer': Case('gmlp_ti16_224', 64, dict(img_size=64)),
    'mobilenetv3': Case('mobilenetv3_small_050'),
    'mobilenetv5': Case('mobilenetv5_base', 64, dict(channel_multiplier=0.25)),
    'mobilevit': Case('mobilevit_xxs', 64, dict(img_size=64)),
    'mvitv2': Case('mvitv2_tiny', 64, dict(img_size=64)),
    'naflexvit': Case('naflexvit_base_patch16_gap', 64, dict(img_size=64, depth=1)),
    'nasnet': Case('nasnetalarge', 32),
    'nest': Case('nest_tiny', 64, dict(img_size=64)),
    'nextvit': Case('nextvit_small'),
    'nfnet': Case('test_nfnet'),
    'pit': Case('pit_ti_224', 64, dict(img_size=64)),
    'pnasnet': Case('pnasnet5large', 32),
    'pvt_v2': Case('pvt_v2_b0'),
    'qwen3_vit': Case('qwen3_vit_88m', 96, dict(depth=1)),
    'rdnet': Case('rdnet_tiny'),
    'regnet': Case('regnetx_002'),
    'repghost': Case('repghostnet_050'),
    'repvit': Case('repvit_m1', 64, dict(img_size=64)),
    'res2net': Case('res2next50'),
    'resnest': Case('resnest14d'),
    'resnet': Case('test_resnet'),
    'resnetv2': Case('resnetv2_18'),
    'rexnet': Case('rexnet_100'),
    'selecsls': Case('selecsls42'),
    'senet': Case('legacy_seresnet18'),
    'sequencer': Case('sequencer2d_s', 64, dict(img_size=64)),
    'shvit': Case('shvit_s1'),
    'sknet': Case('skresnet18'),
    'starnet': Case('starnet_s050'),
    'swiftformer': Case('swiftformer_xs', 64, dict(img_size=64)),
    'swin_transformer': Case('swin_tiny_patch4_window7_224', 64, dict(img_size=64)),
    'swin_transformer_v2': Case('swinv2_tiny_window16_256', 64, dict(img_size=64)),
    'swin_transformer_v2_cr': Case('swinv2_cr_tiny_224', 64, dict(img_size=64)),
    'tiny_vit': Case('tiny_vit_5m_224'),
    'tnt': Case('tnt_s_legacy_patch16_224', 64, dict(img_size=64, depth=2)),
    'tresnet': Case('tresnet_m'),
    'twins': Case('twins_svt_small', 64, dict(img_size=64)),
    'vgg': Case('vgg11', 64, dict(mlp_ratio=0.02)),
    'visformer': Case('visformer_tiny', 64, dict(img_size=64)),
    'vision_transformer': Case('test_vit', 64, dict(img_size=64)),
    'vision_transformer_hybrid': Case('vit_tiny_r_s16_p8_224', 64, dict(img_size=64)),
    'vision_transformer_relpos': Case('test_vit_relpos', 64, dict(img_size=64)),
    'vision_transformer_sam': Case('samvit_base_patch16_224', 64, dict(img_size=64, depth=1)),
    'vitamin': Case('vitamin_small_224', 64, dict(img_size=64)),
    'volo': Case('volo_d1_224', 64, dict(img_size=64)),
    'vovnet': Case('ese_vovnet19b_slim_dw'),
    'xception': Case('legacy_xception'),
    'xception_aligned': Case('xception41p'),
    'xcit': Case('xcit_nano_12_p8_224', 64, dict(img_size=64)),
}
HEAD_TWICE = {
    # several classifiers, of which none sees all that makes the logits
    'crossvit': 'ModuleList',
    'efficientvim': 'ModuleList',
    'efficientformer': 'tuple',
    'efficientformer_v2': 'tuple',
    'levit': 'tuple',
    'swiftformer': 'tuple',
    # get_classifier() is the head from pooling on, whose input is a feature map
    'sequencer': 'ClassifierHead',
    'vision_transformer_sam': 'ClassifierHead',
}
NORM_AFTER_PRE_LOGITS = {'efficientvit_msra', 'shvit'}  # the classifier's input is normalised once more
MORE_THAN_CLASSIFIER = {'volo'}  # adds the maximum over the patches of an auxiliary classifier to the logits
ENCODERS = {  # towers of language models, which take no num_classes
    'deepseek_vit_412m_enc': 'DeepseekVitEncoder',
    'gemma4_vit_167m_enc': 'Gemma4VitEncoder',
    'qwen3_vit_88m_enc': 'Qwen3VitEncoder',
}


def create_model(name, **kwargs):
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} has no {name}')
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)


def record_calls(module, name):
    """pre_logits of every call of module.forward_head from now on."""
    calls, method = [], getattr(module, name)

    def wrapper(*args, pre_logits=False, **kwargs):
        calls.append(pre_logits)
        return method(*args, pre_logits=pre_logits, **kwargs)

    setattr(module, name, wrapper)
    return calls


@pytest.mark.parametrize('module', CASES)
def test_a_step_trains_the_whole_model_on_the_features_of_its_classifier(module, caplog):
    case = CASES[module]
    model = create_model(case.name, **case.kwargs)
    plain = copy.deepcopy(model).train()
    width = get_feature_dim(model)
    task = CoreTuningTask(model, verbose=False)
    assert task.criterion.num_features == width
    assert task.criterion.requires == ()  # those that are not affine are in tests/loss/test_classifier.py
    assert [r.message for r in caplog.records if r.levelname == 'WARNING' and 'affine' in r.message] == []
    input = torch.randn(len(TARGET), 3, case.image_size, case.image_size)

    trainable = task.trainable_module.eval()
    with torch.no_grad():
        feature_map = model.forward_features(input)
        pre_logits = model.forward_head(feature_map, pre_logits=True).flatten(1)
        features, logits = trainable.forward_features_and_logits(input, feature_map)
        assert torch.equal(logits, model(input))
        assert features.shape == (len(TARGET), width)
        assert torch.equal(features, pre_logits) == (module not in NORM_AFTER_PRE_LOGITS)
        if isinstance(model.get_classifier(), torch.nn.Linear):
            assert torch.equal(model.get_classifier()(features), logits) == (module not in MORE_THAN_CLASSIFIER)

    trainable.train()
    calls = record_calls(model, 'forward_head')
    seen = []
    # mixtures are embedded from the outputs of its first layer, which come by name
    task.criterion.projector.register_forward_pre_hook(lambda _, args: seen.extend(args))
    torch.manual_seed(1)
    result = task(input, TARGET)
    torch.manual_seed(1)
    output = plain(input)
    assert torch.equal(result['output'], output)
    assert [tuple(features.shape) for features in seen] == [(len(TARGET), width)]
    assert calls == ([False, True] if module in HEAD_TWICE else [False])
    if module in HEAD_TWICE:
        assert type(model.get_classifier()).__name__ == HEAD_TWICE[module]

    result['loss'].backward()
    F.cross_entropy(output, TARGET).backward()
    assert all(value.isfinite().all() for value in result.values())
    has_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, p in plain.named_parameters() if p.grad is not None} - has_gradient == set()
    assert has_gradient
    assert all(p.grad is not None for p in task.criterion.parameters())


@pytest.mark.skipif(timm.__version__ != TIMM_VERSION, reason=f'the table is that of timm {TIMM_VERSION}')
def test_every_module_of_timm_with_classifiers_has_a_case():
    assert set(CASES) == set(timm.list_modules())
    assert {module for module, case in CASES.items() if case.name not in timm.list_models(module=module)} == set()


@pytest.mark.parametrize('name', ENCODERS)
def test_an_encoder_without_classifier_is_refused_with_the_remedy(name):
    model = create_model(name, depth=1)
    message = (
        'Expected a timm classifier with forward_features, forward_head and num_classes > 0, got '
        f'{ENCODERS[name]} with num_classes=0. Create the model with num_classes=<your classes>.'
    )
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        CoreTuningTask(model, verbose=False)


@pytest.mark.parametrize(
    'name',
    ['deit_tiny_distilled_patch16_224', 'pit_ti_distilled_224', 'levit_128s', 'efficientformerv2_s0'],
)
def test_distilled_models_train_on_the_mean_of_their_two_classifiers(name):
    model = create_model(name, img_size=64)
    task = CoreTuningTask(model, verbose=False)
    result = task(torch.randn(4, 3, 64, 64), TARGET)
    result['loss'].backward()
    assert result['output'].shape == (len(TARGET), NUM_CLASSES)
    heads = [p for classifier in model.get_classifier() for p in classifier.parameters()]
    assert len(heads) >= 4
    assert all(p.grad is not None and p.grad.any() for p in heads)
    kept = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert kept.isdisjoint(map(id, heads))


@pytest.mark.parametrize('name', ['deit_tiny_distilled_patch16_224', 'levit_128s'])
def test_two_separate_outputs_for_a_teacher_are_refused(name):
    model = create_model(name, img_size=64)
    model.set_distilled_training(True)
    task = CoreTuningTask(model, verbose=False)
    with pytest.raises(ValueError, match='logits'):
        task(torch.randn(4, 3, 64, 64), TARGET)
