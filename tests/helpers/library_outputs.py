"""Compare the outputs of a timm model with those of the library that wrote a file"""

import torch

TOLERANCE = 1e-5


def randomize(module):
    """Values around the usual ones for all tensors, for a default initialisation hides whether norms were loaded."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not name.endswith('relative_coords_table'):  # a constant of Swin V2
            spread = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(spread.abs() + 0.5 if 'running_var' in name else tensor + 0.05 * spread)
    return module.eval()


def largest_difference(model, image, expected, pooled=False):
    model.eval()
    with torch.no_grad():
        features = model.forward_features(image)
        output = model.forward_head(features, pre_logits=True) if pooled else features
        return (output - expected).abs().max().item()


def image(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
