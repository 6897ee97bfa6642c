"""Core-tuning in Lightning's Trainer

python examples/lightning_module.py
"""

import functools
from importlib import resources

import lightning
import timm
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune import load_checkpoint
from timm_coretune.integrations import CoreTuningModule

assets = resources.files('timm_coretune') / 'assets'
sample = load_file(assets / 'fashion_mnist_sample.safetensors')


def create_loader(split, count, **kwargs):
    image = sample[f'{split}.image'][:count, None].float() / 255  # (N, 1, 28, 28)
    return DataLoader(TensorDataset((image.repeat(1, 3, 1, 1) - 0.5) / 0.5, sample[f'{split}.label'][:count]), **kwargs)


lightning.seed_everything(0)
train_loader = create_loader('train', 1024, batch_size=64, shuffle=True, drop_last=True)
validation_loader = create_loader('validation', 512, batch_size=256)

model = timm.create_model('test_resnet', num_classes=10)
load_checkpoint(model, str(assets / 'test_resnet_mocov2.safetensors'))
module = CoreTuningModule(
    model,
    optimizer=functools.partial(create_optimizer_v2, opt='sgd', lr=0.05, momentum=0.9),
    contrast_weight=0.1,
)
trainer = lightning.Trainer(max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False)
trainer.fit(module, train_loader, validation_loader)
print(f'accuracy {trainer.callback_metrics["val_top1"]:.1f} %')

# a checkpoint of Lightning has the loss too, to resume from; a plain timm model takes its weights from it
trainer.save_checkpoint('lightning.ckpt')
plain = timm.create_model('test_resnet', num_classes=10)
print(load_checkpoint(plain, 'lightning.ckpt', load_classifier=True))
