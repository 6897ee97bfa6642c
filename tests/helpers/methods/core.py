import copy

from losses import drawn_numbers, settings_of
from reference import layer_of, objective

from timm_coretune.mining import hard_label


def expected(step):
    criterion = step.criterion
    draws = copy.deepcopy(criterion.mixup).draw(len(step.features))
    drawn = drawn_numbers(criterion, step.features, hard_label(step.target), draws)
    projector = layer_of(criterion.projector.fc1), layer_of(criterion.projector.fc2)
    classifier = layer_of(step.model.get_classifier())
    return objective(step.features, step.target, classifier, projector, **drawn, **settings_of(criterion))
