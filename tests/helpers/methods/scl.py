from reference import classes, focal_contrast

from methods import clean_cross_entropy
from methods.contrast import embeddings


def expected(step):
    criterion, task_loss = step.criterion, clean_cross_entropy(step)
    contrast_loss = focal_contrast(
        embeddings(step), classes(step.target), temperature=criterion.temperature, focal=False
    )  # fmt: skip
    loss = task_loss + criterion.contrast_weight * contrast_loss
    return {'loss': loss, 'task_loss': task_loss, 'contrast_loss': contrast_loss}
