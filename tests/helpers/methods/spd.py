"""Its loss. That it corrects the updates is tested in tests/loss/test_spd.py."""

from methods import clean_cross_entropy


def expected(step):
    task_loss = clean_cross_entropy(step)
    return {'loss': task_loss, 'task_loss': task_loss}
