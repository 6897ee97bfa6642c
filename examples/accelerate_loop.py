"""Core-tuning in a loop of your own on accelerate, on any number of processes

python examples/accelerate_loop.py
accelerate launch --config_file configs/cpu_2.yaml examples/accelerate_loop.py
"""

from importlib import resources

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune import CoreTuningTask, load_checkpoint

assets = resources.files('timm_coretune') / 'assets'
sample = load_file(assets / 'fashion_mnist_sample.safetensors')


def create_loader(split, count, **kwargs):
    image = sample[f'{split}.image'][:count, None].float() / 255  # (N, 1, 28, 28)
    return DataLoader(TensorDataset((image.repeat(1, 3, 1, 1) - 0.5) / 0.5, sample[f'{split}.label'][:count]), **kwargs)


accelerator = Accelerator(cpu=not torch.cuda.is_available())
set_seed(0)  # the same on all processes, as the loss draws from it
train_loader = create_loader('train', 1024, batch_size=64, shuffle=True, drop_last=True)
validation_loader = create_loader('validation', 512, batch_size=256)

model = timm.create_model('test_resnet', num_classes=10)
load_checkpoint(model, str(assets / 'test_resnet_mocov2.safetensors'))
task = CoreTuningTask(model, contrast_weight=0.1, device=accelerator.device)
optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
# the module of the task holds model and loss, and is what accelerate wraps
task.trainable_module, optimizer, train_loader, validation_loader = accelerator.prepare(
    task.trainable_module, optimizer, train_loader, validation_loader
)

for epoch in range(2):
    task.train()
    for images, target in train_loader:
        loss = task(images, target)['loss']
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    evaluated, correct = task.get_eval_model().eval(), 0
    with torch.inference_mode():
        for images, target in validation_loader:
            predicted, target = accelerator.gather_for_metrics((evaluated(images).argmax(dim=1), target))
            correct += (predicted == target).sum().item()
    accelerator.print(f'epoch {epoch}: accuracy {100 * correct / 512:.1f} %')
