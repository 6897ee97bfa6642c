"""Core-tune on the bundled sample and export the model to a folder that plain timm loads

python examples/tune_and_export.py [FOLDER]
"""

import sys
from importlib import resources

import timm
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from timm_coretune import load_checkpoint
from timm_coretune.train import fine_tune

NAMES = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']
DATA_CONFIG = dict(
    input_size=(3, 28, 28),
    interpolation='bilinear',
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    crop_pct=1.0,
    crop_mode='center',
)


def main(folder: str) -> None:
    assets = resources.files('timm_coretune') / 'assets'
    sample = load_file(assets / 'fashion_mnist_sample.safetensors')
    loaders = []
    for split, count in (('train', 1024), ('validation', 512)):
        image = sample[f'{split}.image'][:count, None].float().repeat(1, 3, 1, 1) / 255
        dataset = TensorDataset((image - 0.5) / 0.5, sample[f'{split}.label'][:count])
        loaders.append(DataLoader(dataset, batch_size=64, shuffle=split == 'train'))

    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10)
    load_checkpoint(model, str(assets / 'test_resnet_mocov2.safetensors'))
    tuned = fine_tune(model, *loaders, epochs=2, lr=0.05, class_names=NAMES, data_config=DATA_CONFIG)
    print(f'accuracy {tuned[-1]["validation"]["top1"]:.1f} %')

    tuned.save(folder)  # tuned.push('owner/name') uploads the same files to the Hub

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images, target = next(iter(loaders[1]))
    with torch.inference_mode():
        predicted = loaded(images).argmax(dim=1)
    names = loaded.pretrained_cfg['label_names']
    print(f'{folder}: {names[predicted[0]]}, in truth {names[target[0]]}')


if __name__ == '__main__':
    main(sys.argv[1] if len(sys.argv) > 1 else 'output/exported')
