"""What contradicts is named with its flags"""

import ast
import shlex

import pytest
from train_flags import PARSER, TREES

from timm_coretune.train.cli.arguments import parse_args
from timm_coretune.train.cli.conflicts import find_contradictions
from timm_coretune.train.cli.settings import Settings

CONTRADICTIONS = [
    ('--report --eval-only', '--report is of a run that trains: not with --eval-only'),
    ('--coretune --torchscript', '--torchscript: the step of a --method cannot be scripted'),
    ('--coretune --jsd-loss --aug-splits 2', '--loss jsd and --jsd-loss compare augmentation splits'),
    ('--coretune --loss asl', '--loss asl: with --coretune or a --method a row may have shares of several classes'),
    ('--method scl --loss asl', '--loss asl: with --coretune or a --method a row may have shares of several classes'),
    ('--method dr-tune --loss bce', '--loss: this --method takes the cross-entropy of rows that it remembers too'),
    ('--coretune --bce-sum', '--bce-sum and --bce-target-thresh need --loss bce'),
    ('--bce-loss --loss poly', '--loss, --bce-loss and --jsd-loss each name the loss on the labels; choose one'),
    ('--loss bce --bce-pos-weight 2 --loss-pos-weight 2', '--bce-pos-weight is --loss-pos-weight; give one'),
    ('--coretune --loss-pos-weight 2', '--loss-pos-weight: cross-entropy has no positives and negatives'),
    ('--loss coretune --method scl', '--loss coretune is --coretune: not with another --method'),
    ('--poly-epsilon 1', '--poly-epsilon and --poly-gamma need --loss poly'),
    ('--loss-weight-power 0.5 --loss-class-weight 1,2', '--loss-weight-power needs --loss-class-weight inv_freq'),
    ('--class-stats counts.json', '--class-stats is read for --loss db and for weights by a method'),
    ('--segmentation --loss-class-weight inv_freq', '--segmentation: pixels are not counted'),
    ('--segmentation --data-dir a.csv', '--segmentation: a table has labels of whole images'),
    ('--segmentation --loss bce', '--segmentation: not with --jsd-loss, --bce-loss, --loss'),
    ('--coretune --kd-model-name resnet18', '--kd-model-name: distillation and --coretune'),
    ('--coretune --method scl', '--coretune is --method core: not with another method'),
    ('--segmentation --method ldifs', '--segmentation: this --method compares whole images'),
    ('--method plain --method-kwargs weight=1', '--method-kwargs needs a --method other than plain'),
    ('--coretune --coretune-smooth none --coretune-smooth-weight 1', '--coretune-smooth-weight: not with'),
    ('--lora-alpha 2', '--lora-alpha needs --lora-rank'),
    ('--lora-rank 2 --torchscript', '--lora-rank: not with --torchscript or --split-bn'),
    ('--coretune --lora-rank 2 --aug-splits 2 --split-bn', '--lora-rank: not with --torchscript or --split-bn'),
    ('--method spd --lora-rank 2', '--lora-rank: --method l2-sp and spd hold weights near those'),
    ('--drop-connect 0.1', "--drop-connect: timm's own script reads it nowhere; use --drop-path"),
    ('--local_rank 1', '--local_rank: processes are started by accelerate launch'),
    ('--local-rank 1', '--local_rank: processes are started by accelerate launch'),
    ('--device cuda:1', '--device: cpu or cuda'),
    ('--device gpu', '--device: cpu or cuda'),
    ('--watch-features 1 --eval-only', '--watch-features measures what training changes, in classification'),
    ('--watch-features 1 --segmentation', '--watch-features measures what training changes, in classification'),
    ('--watch-features 1 --task multilabel --data-dir x', '--watch-features measures what training changes'),
    ('--watch-features 1 --torchscript', '--watch-features measures what training changes, in classification'),
    ("--watch-features 1 --val-split ''", '--watch-features needs a --val-split'),
    ('--watch-features 3 --val-interval 2', '--watch-features: measures weights that are validated'),
    ('--amp --model-dtype bfloat16', '--amp needs --model-dtype float32'),
    ('--torchscript --torchcompile', '--torchscript: not with --torchcompile'),
    ('--torchscript --sync-bn', '--torchscript: not with --torchcompile, --sync-bn'),
    ('--torchscript --freeze-epochs 1', '--torchscript: not with --torchcompile'),
    ('--torchscript --head-lr-scale 2', '--torchscript: not with --torchcompile'),
    ('--aug-splits 1', '--aug-splits: a split of 1 makes no sense'),
    ('--jsd-loss', '--jsd-loss needs --aug-splits'),
    ('--split-bn', '--split-bn needs --aug-splits of 2 or more, or --resplit'),
    ('--split-bn --resplit --sync-bn', '--split-bn and --sync-bn exclude each other'),
    ('--aug-splits 2 --mixup 0.2', '--aug-splits: not with pixel mixup or --no-prefetcher'),
    ('--aug-splits 2 --no-prefetcher', '--aug-splits: not with pixel mixup or --no-prefetcher'),
    ('--aug-splits 2 --cutmix-minmax 0.2 0.8', '--aug-splits: not with pixel mixup or --no-prefetcher'),
    ('--naflex-loader --train-img-sizes 32', '--naflex-loader and --train-img-sizes are alternatives'),
    ('--naflex-loader --use-multi-epochs-loader', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--gpu-augment-size 32', '--gpu-augment-size needs --gpu-augment'),
    ('--gpu-augment --aa rand-m5', '--gpu-augment: the policies of --aa and --aug-splits choose other operations'),
    ('--gpu-augment --aug-splits 2', '--gpu-augment: the policies of --aa and --aug-splits choose other operations'),
    ('--gpu-augment --no-aug', '--gpu-augment takes random resized crops'),
    ('--gpu-augment --train-crop-mode rkrc', '--gpu-augment takes random resized crops'),
    ('--gpu-augment --train-interpolation lanczos', '--gpu-augment: --train-interpolation is bilinear, bicubic or'),
    ('--gpu-augment --no-prefetcher', '--gpu-augment makes batches of one size in the prefetching loader'),
    ('--gpu-augment --train-img-sizes 32', '--gpu-augment makes batches of one size in the prefetching loader'),
    ('--gpu-augment --naflex-loader', '--gpu-augment makes batches of one size in the prefetching loader'),
    ('--gpu-augment --segmentation', '--gpu-augment knows no masks'),
    ('--naflex-loader --aug-splits 2', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-loader --aug-repeats 3', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-loader --class-balance', '--naflex-loader: not with --use-multi-epochs-loader'),
    ('--naflex-patch-size-probs 0.5 0.5', '--naflex-patch-size-probs must be as many'),
    ('--naflex-patch-sizes 8 16 --naflex-patch-size-probs 1', '--naflex-patch-size-probs must be as many'),
    ('--train-img-sizes 32 48 --train-batch-sizes 8', '--train-batch-sizes and --train-size-probs must be as many'),
    ('--train-size-probs 0.5', '--train-batch-sizes and --train-size-probs must be as many'),
    ('--train-img-sizes 32 --use-multi-epochs-loader', '--train-img-sizes: not with'),
    ('--train-img-sizes 32 --aug-splits 2', '--train-img-sizes: not with'),
    ('--train-img-sizes 32 --class-balance', '--train-img-sizes: not with'),
    ('--global-batch-size 8 --train-img-sizes 32', '--global-batch-size: one size for all batches'),
    ('--contrast-batch-size 16 -b 8', '--contrast-batch-size: with --coretune or a --method that compares'),
    ('--contrast-batch-size 16 -b 8 --method bi-tuning', '--contrast-batch-size: with --coretune or a --method that'),
    ('--contrast-batch-size 16 -b 8 --method l2-sp', '--contrast-batch-size: with --coretune or a --method that'),
    ('--contrast-batch-size 12 -b 8 --coretune', '--contrast-batch-size: a multiple of the --batch-size, or of the'),
    ('--contrast-batch-size 4 -b 8 --coretune', '--contrast-batch-size: a multiple of the --batch-size, or of the'),
    ('--contrast-batch-size 12 --global-batch-size 8 --coretune', '--contrast-batch-size: a multiple of the'),
    ('--contrast-batch-size 16 -b 8 --coretune --segmentation', '--contrast-batch-size: not with --segmentation'),
    ('--contrast-batch-size 16 -b 8 --coretune --naflex-loader', '--contrast-batch-size: not with --segmentation'),
    ('--contrast-batch-size 16 -b 8 --coretune --train-img-sizes 32', '--contrast-batch-size: not with'),
    ('--class-balance --aug-repeats 3', '--class-balance and --aug-repeats both order the images'),
    ('--class-balance -b 3', '--class-balance needs a --batch-size of 4 or more'),
    ('--mixup 0.2 -b 5', '--mixup, --cutmix and --cutmix-minmax mix pairs of images: the --batch-size'),
    ('--cutmix 1 -b 1', '--mixup, --cutmix and --cutmix-minmax mix pairs of images: the --batch-size'),
    ('--cutmix-minmax 0.2 0.8 -b 7 --coretune', '--mixup, --cutmix and --cutmix-minmax mix pairs of images'),
    ('--mixup 0.2 --mixup-prob 0 -b 3 --no-prefetcher', '--mixup, --cutmix and --cutmix-minmax mix pairs of images'),
    ('--mixup 0.2 --train-img-sizes 32 48 -b 3', '--mixup, --cutmix and --cutmix-minmax mix pairs of images'),
    (
        '--mixup 0.2 -b 4 --train-img-sizes 32 48 --train-batch-sizes 4 3',
        '--mixup, --cutmix and --cutmix-minmax mix pairs of images',
    ),
    ('--segmentation --mixup 0.2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --cutmix 1', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --cutmix-minmax 0.2 0.8', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --aug-splits 2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --aug-repeats 3', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --epoch-repeats 2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --class-balance', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --naflex-loader', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --train-img-sizes 32', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --use-multi-epochs-loader', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --tta 2', '--segmentation: not with --mixup, --cutmix, --cutmix-minmax'),
    ('--segmentation --aa rand-m5', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --reprob 0.2', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --grayscale-prob 0.1', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --gaussian-blur-prob 0.1', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --color-jitter-prob 0', '--segmentation: --aa, --reprob, --grayscale-prob'),
    ('--segmentation --bce-loss', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --kd-model-name resnet18', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --torchscript', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --split-bn --resplit', '--segmentation: not with --jsd-loss, --bce-loss'),
    ('--segmentation --gp avg', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --drop 0.1', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --head-init-scale 0', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --head-init-bias 0', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --crop-pct 0.9', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --train-crop-mode rkrc', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --train-num-samples 0', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --val-num-samples 9', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --dataset-trust-remote-code', '--segmentation: no part in it have --gp, --drop'),
    ('--segmentation --interpolation lanczos', '--segmentation: --interpolation and --train-interpolation'),
    ('--segmentation --train-interpolation hamming', '--segmentation: --interpolation and --train-interpolation'),
    ('--segmentation --skip-unreadable', '--segmentation: an image that cannot be read is always an error'),
    ('--segmentation --check-images pixels', '--segmentation: an image that cannot be read is always an error'),
    ('--skip-unreadable --val-split=', '--skip-unreadable needs a --val-split'),
    ('--segmentation --metrics per-class', '--segmentation: --metrics are those of images'),
    ('--segmentation-head fcn', '--segmentation-head, --reduce-zero-label, --mask-colors and --remap-masks need'),
    ('--reduce-zero-label', '--segmentation-head, --reduce-zero-label, --mask-colors and --remap-masks need'),
    ('--mask-colors index', '--segmentation-head, --reduce-zero-label, --mask-colors and --remap-masks need'),
    ('--remap-masks', '--segmentation-head, --reduce-zero-label, --mask-colors and --remap-masks need'),
    ('--segmentation --mask-colors c.txt --remap-masks', '--mask-colors FILE: the file says'),
    ('--segmentation --mask-colors c.txt --reduce-zero-label', '--mask-colors FILE: the file says'),
    ('--segmentation --mask-colors c.txt --class-map n.txt', '--mask-colors FILE: the file says'),
    ('--ignore-index 254', '--ignore-index needs --segmentation'),
    ('--segmentation --mask-colors c.txt --ignore-index 0', '--ignore-index: --mask-colors FILE ignores the colours'),
    ('--segmentation --reduce-zero-label --ignore-index 0', '--ignore-index: --mask-colors FILE ignores the colours'),
    ('--segmentation --anchors-per-image 0', '--anchors-per-image: 1 or more'),
    ('--wandb-resume-id x', '--wandb-resume-id needs --resume'),
    ('--label-fraction 0', '--label-fraction: above 0, at most 1'),
    ('--label-fraction 1.1', '--label-fraction: above 0, at most 1'),
    ('--model-ema-publish ema', '--model-ema-publish ema needs --model-ema'),
    ('--model-ema --model-ema-force-cpu --model-ema-publish ema', '--model-ema-publish ema needs --model-ema'),
    ('--val-fraction 0', '--val-fraction: above 0 and below 1'),
    ('--val-fraction 1', '--val-fraction: above 0 and below 1'),
    ('--val-fraction 0.1 --val-split val', '--val-fraction holds out training images: not with a --val-split'),
    ('--val-fraction 0.1 --val-split=', '--val-fraction holds out training images: not with a --val-split'),
    ('--val-fraction 0.1 --segmentation', '--val-fraction holds out training images: not with a --val-split'),
    ('--head-lr-scale 0', '--head-lr-scale: above 0'),
    ('--freeze-epochs -1', '--freeze-epochs: 0 or more'),
    ('--patience 0', '--patience: 1 or more'),
    ('--push-to-hub name', '--push-to-hub: OWNER/NAME'),
    ("--push-to-hub 'me/a b'", '--push-to-hub: OWNER/NAME'),
    ('--checkpoint-frames 4 --data-dir x', '--checkpoint-frames: 1 or more, of a --pretrained-path'),
    ('--checkpoint-frames 0 --pretrained-path moco.pth', '--checkpoint-frames: 1 or more'),
    ('--push-to-hub me/name --eval-only', '--push-to-hub pushes what was trained: not with --eval-only'),
    ('--hub-revision b', '--hub-private and --hub-revision need --push-to-hub'),
    ('--hub-private', '--hub-private and --hub-revision need --push-to-hub'),
    ('--eval-only --val-split=', '--eval-only needs a --val-split'),
    ('--eval-output x', '--eval-output is for --eval-only'),
    ('--epochs 0 --val-split=', '--eval-only needs a --val-split'),
    ('--metrics confusion,f1', '--metrics: choose from confusion, per-class, ece'),
    ('--eval-metric accuracy', '--eval-metric: choose from loss, top1, top5\n'),
    ('--eval-metric ece', '--eval-metric: choose from loss, top1, top5\n'),
    ('--eval-metric f1 --metrics ece,per-class', '--eval-metric: choose from loss, top1, top5, macro_f1, ece'),
    ('--segmentation --eval-metric top1', '--eval-metric: choose from loss, miou, pa, mpa, fwiou\n'),
    ('--resume auto', '--resume auto needs --experiment NAME'),
    ('--task multilabel', '--task multilabel needs --data-dir or --dataset: the images of the bundled sample'),
    ('--task multilabel --data-dir x --segmentation', '--task multilabel: not with --segmentation'),
    ('--task multilabel --data-dir x --class-balance', '--task multilabel: not with --segmentation, --class-balance'),
    ('--task multilabel --data-dir x --jsd-loss --aug-splits 2', '--task multilabel: not with --segmentation'),
    ('--task multilabel --data-dir x --kd-model-name resnet18', '--task multilabel: not with --segmentation'),
    ('--task multilabel --data-dir x --method bcl', '--task multilabel: --method bcl compares images by their one'),
    ('--task multilabel --data-dir x --metrics ece', '--metrics: choose from per-class, predictions'),
    ('--task multilabel --data-dir x --eval-metric top1', '--eval-metric: choose from loss, map, micro_f1'),
    ('--task multilabel --data-dir x --multilabel-threshold 1', '--multilabel-threshold: above 0, below 1, got 1'),
    ('--task multilabel --data-dir x --multilabel-threshold 0', '--multilabel-threshold: above 0, below 1, got 0'),
    ('--task multilabel --data-dir x --coretune --loss zlpr', '--loss twoway and --loss zlpr take no soft targets'),
    ('--target-format multihot', '--target-format multihot and --target-key with several fields need --task'),
    ('--target-key a,b', '--target-format multihot and --target-key with several fields need --task multilabel'),
    (
        '--task multilabel --dataset hfds/x --target-key a,b --target-format multihot',
        '--target-key with several fields has a class for each',
    ),
]


@pytest.fixture
def no_launcher(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)


@pytest.mark.parametrize('line, message', CONTRADICTIONS, ids=[line for line, _ in CONTRADICTIONS])
def test_a_contradiction_is_named_with_its_flags(capsys, no_launcher, line, message):
    with pytest.raises(SystemExit) as stopped:
        parse_args(shlex.split(line))
    assert stopped.value.code == 2
    assert f'train.py: error: {message}' in capsys.readouterr().err


def test_every_contradiction_has_a_command_line_above(no_launcher):
    found = set()
    for line, _ in CONTRADICTIONS:
        args = PARSER.parse_args(shlex.split(line))
        args.eval_only = args.eval_only or args.epochs == 0
        settings = Settings.from_flat(vars(args))
        found |= {sentence.partition(' from ')[0] for sentence in find_contradictions(settings)}
    tables = [n for n in ast.walk(TREES['cli/conflicts.py']) if isinstance(n, ast.Dict)]
    sentences = [ast.unparse(key) for table in tables for key in table.keys if key is not None]
    assert len(found) == len(sentences)
    assert len(sentences) > 30


@pytest.mark.parametrize(
    'line',
    [
        '--data-dir d --model resnet50 --sched cosine --epochs 150 --warmup-epochs 5 --lr 0.4 --reprob 0.5 '
        '--remode pixel --batch-size 256 --amp -j 4 --opt lamb --weight-decay 0.02 --aa rand-m7-mstd0.5-inc1 --mixup '
        '0.1 --cutmix 1.0 --smoothing 0 --bce-loss --drop-path 0.05 --model-ema --clip-grad 1 --train-interpolation '
        'random --crop-pct 0.95 --channels-last --pin-mem',
        '--gpu-augment --gpu-augment-size 256 --train-crop-mode rrc --mixup 0.2 --reprob 0.2 --aug-repeats 3',
        '--mixup 0.2 -b 5 --eval-only',
        '--mixup 0.2 -b 5 --naflex-loader',
        '-b 5 --mixup 0 --train-img-sizes 32 --train-batch-sizes 3',
        '-b 5 --mixup 0.2 --train-img-sizes 32 48 --train-batch-sizes 4 2',
        '--aug-splits 3 --aa rand-m9-mstd0.5-inc1 --resplit --split-bn --jsd-loss --dist-bn reduce',
        '--coretune --mixup 0.2 --no-prefetcher --class-balance --metrics ece,per-class --eval-metric '
        'ece --resume auto --experiment x --torchcompile',
        '--device cpu --amp --amp-dtype bfloat16 --model-dtype float32 --torchscript --val-split=',
        '--segmentation --coretune --segmentation-head fpn --eval-metric fwiou --scale 0.5 1 --ratio 1 1 --vflip 0.5 '
        '--color-jitter 0.2 --train-interpolation bilinear --interpolation bicubic --model-ema --class-map names.txt '
        '--freeze-epochs 1 --label-fraction 0.5 --torchcompile --no-aug --reduce-zero-label',
    ],
    ids=[
        'resnet50',
        'gpu-augment',
        'odd',
        'odd-naflex',
        'odd-unmixed',
        'even-sizes',
        'augmix',
        'coretune',
        'torchscript',
        'segmentation',
    ],
)
def test_flags_that_go_together_are_taken(line):
    parse_args(shlex.split(line))


def test_a_launched_process_may_have_a_local_rank(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert parse_args(['--local_rank', '1']).settings.loop.local_rank == 1
