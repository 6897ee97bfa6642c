"""A state that an earlier version wrote goes on as it would have there

tests/assets/state_of_0.1.0.dev0 was written by the version of that name, on one thread of an x86-64 CPU with torch
2.14.1 and timm 1.0.31. It holds the state of a run of FLAGS that was stopped in its second epoch, and the summary and
the averaged weights of the same run without a stop.
"""

import shutil

import pytest
import torch
from paths import SAMPLE, TESTS
from safetensors.torch import load_file

from timm_coretune.train import main

STATE = TESTS / 'assets' / 'state_of_0.1.0.dev0'
FLAGS = (
    '--data-dir sample.safetensors --coretune --model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 '
    'embed_dim=16 depth=2 num_heads=2 --img-size 32 --label-fraction 0.1 --epochs 3 --batch-size 64 --opt adamw '
    '--lr 0.005 --warmup-epochs 0 --sched-on-updates --contrast-weight 1 --model-ema --model-ema-decay 0.8 '
    '--recovery-interval 2 --smoothing 0.1 --reprob 0.3 --drop 0.1 --device cpu --workers 0 --eval-metric loss '
    '--output output '
    '--model-ema-publish ema'  # as that version did, which had no such flag
)


@pytest.mark.slow
def test_it_continues_to_the_figures_and_weights_of_the_unbroken_run(
    tmp_path, monkeypatch, one_thread, messages, read_csv
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'output' / 'run'
    folder.mkdir(parents=True)
    (tmp_path / 'sample.safetensors').symlink_to(SAMPLE)
    for name in ('recovery-1-3.pth.tar', 'summary.csv'):
        shutil.copy(STATE / name, folder)
    main([*FLAGS.split(), '--experiment', 'run', '--resume', 'auto'])
    assert any('recovery-1-3.pth.tar' in m and 'with epoch 1, batch 4.' in m for m in messages())
    assert [m for m in messages('WARNING') if 'other arguments' in m] == []
    rows, expected = read_csv(folder / 'summary.csv'), read_csv(STATE / 'expected_summary.csv')
    assert len(rows) == len(expected) == 3
    for row, values in zip(rows, expected, strict=True):
        assert row.keys() == values.keys()
        # other processors and versions of torch sum in another order
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in values.items()}, rel=1e-4
        )  # fmt: skip
    weights = load_file(folder / 'model_best.safetensors')
    assert weights.keys() == load_file(STATE / 'expected_weights.safetensors').keys()
    for name, value in load_file(STATE / 'expected_weights.safetensors').items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=name)
