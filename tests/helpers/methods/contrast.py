"""What the references of contrastive methods share"""

import numpy as np
from reference import affine, array, layer_of, unit


def embeddings(step):
    """Unit vectors of the rows."""
    projector = step.criterion.projector
    hidden = [np.maximum(row, 0.0) for row in affine(list(array(step.features)), layer_of(projector.fc1))]
    return [unit(row) for row in affine(hidden, layer_of(projector.fc2))]
