"""COIN changes its loss within the run, and needs to know how long that is"""

import pytest
import torch
from method_runs import NUM_UPDATES, batches, create_model, create_run

from timm_coretune import CoreTuningTask
from timm_coretune.loss import COINLoss, L2SPLoss


def test_the_classifier_begins_to_train_after_the_first_part():
    run = create_run('coin', contrast_only=0.6)
    head = run.task.get_eval_model().head.weight
    moved = []
    for batch in batches():
        before = head.detach().clone()
        run.update(batch)
        moved.append(not torch.equal(head, before))
    assert moved == [False, False, False, True, True]
    assert NUM_UPDATES * 0.6 == 3


def test_without_the_length_of_the_run_the_first_step_says_what_to_do():
    task = CoreTuningTask(create_model(), 'coin', verbose=False)
    with pytest.raises(RuntimeError, match=r'Call start\(num_updates\) of the task or the loss before the first step'):
        task(*batches()[0])
    with pytest.raises(ValueError, match='num_updates >= 1.*got 0'):
        task.start(0)


@pytest.mark.parametrize('share', [-0.1, 1.0])
def test_a_share_without_a_second_part_is_refused(share):
    with pytest.raises(ValueError, match=f'contrast_only in .0, 1.*got {share}'):
        COINLoss(4, contrast_only=share)


def test_l2_sp_without_pretrained_weights_says_what_to_do():
    criterion, model = L2SPLoss(16), create_model()
    batch = torch.randn(2, 16), torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match='Pass model=model'):
        criterion(*batch)
    with pytest.raises(RuntimeError, match=r'Expected criterion.attach\(model\) before the first step of L2SPLoss'):
        criterion(*batch, model=model)
    with pytest.raises(ValueError, match='weight and head_weight >= 0, got 0.1 and -1'):
        L2SPLoss(16, head_weight=-1.0)
