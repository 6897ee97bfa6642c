"""Core-tuning in a plain PyTorch loop, with the bundled sample of Fashion-MNIST"""

from importlib import resources

import timm
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune import CoreTuningLoss, load_checkpoint

assets = resources.files('timm_coretune') / 'assets'
sample = load_file(assets / 'fashion_mnist_sample.safetensors')


def create_loader(split, count, **kwargs):
    image = sample[f'{split}.image'][:count, None].float() / 255  # (N, 1, 28, 28)
    return DataLoader(TensorDataset((image.repeat(1, 3, 1, 1) - 0.5) / 0.5, sample[f'{split}.label'][:count]), **kwargs)


torch.manual_seed(0)
train_loader = create_loader('train', 1024, batch_size=64, shuffle=True, drop_last=True)
validation_loader = create_loader('validation', 512, batch_size=256)

model = timm.create_model('test_resnet', num_classes=10)
load_checkpoint(model, str(assets / 'test_resnet_mocov2.safetensors'))
criterion = CoreTuningLoss(model)
optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.05, momentum=0.9)

for epoch in range(2):
    model.train()
    for images, target in train_loader:
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model.get_classifier()(features)
        loss = criterion(features, logits, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        correct = sum((model(images).argmax(dim=1) == target).sum().item() for images, target in validation_loader)
    print(f'epoch {epoch}: loss of the last batch {loss.item():.3f}, accuracy {100 * correct / 512:.1f} %')
