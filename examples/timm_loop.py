"""Core-tuning in a loop over timm's tasks, with layer decay, clipping and a moving average of the weights"""

import timm
import torch
import torchvision
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_coretune import CoreTuningTask

torch.manual_seed(0)
# random images; put your own data set here
data = torchvision.datasets.FakeData(256, (3, 64, 64), 4, torchvision.transforms.ToTensor())
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
model = timm.create_model('test_vit', num_classes=4, img_size=64)

# for plain fine-tuning use timm.task.ClassificationTask here; the rest of the loop stays the same
task = CoreTuningTask(model, contrast_weight=0.1)
optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=1e-3, layer_decay=0.75)
scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=len(loader))
task.setup_ema(decay=0.9)

for epoch in range(num_epochs):
    task.get_trainable_module().train()
    for images, target in loader:
        result = task(images, target)
        result['loss'].backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    scheduler.step(epoch + 1)
    parts = {name: round(result[name].item(), 3) for name in ('loss', 'task_loss', 'contrast_loss')}
    print(f'epoch {epoch}: {parts}')

averaged = task.get_eval_model(ema=True).eval()
print(f'averaged weights answer with {tuple(averaged(images).shape)}')
