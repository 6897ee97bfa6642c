"""Core-tuning in the Trainer of transformers

python examples/transformers_trainer.py
torchrun --standalone --nproc-per-node 2 examples/transformers_trainer.py
"""

from importlib import resources

from safetensors.torch import load_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TrainingArguments

from timm_coretune import load_checkpoint
from timm_coretune.integrations import CoreTuningTrainer

assets = resources.files('timm_coretune') / 'assets'
sample = load_file(assets / 'fashion_mnist_sample.safetensors')


def create_dataset(split, count):
    image = sample[f'{split}.image'][:count, None].float() / 255  # (N, 1, 28, 28)
    pixels = (image.repeat(1, 3, 1, 1) - 0.5) / 0.5
    labels = sample[f'{split}.label'][:count]
    return [{'pixel_values': x, 'labels': label} for x, label in zip(pixels, labels.tolist(), strict=True)]


def compute_metrics(predictions):
    return {'accuracy': (predictions.predictions.argmax(axis=1) == predictions.label_ids).mean()}


# from_pretrained of any image classifier of transformers does as well
config = TimmWrapperConfig(architecture='test_resnet', do_pooling=True, id2label={i: str(i) for i in range(10)})
model = TimmWrapperForImageClassification(config)
load_checkpoint(model.timm_model, str(assets / 'test_resnet_mocov2.safetensors'))

training_args = TrainingArguments(
    'output/transformers',
    num_train_epochs=2,
    per_device_train_batch_size=64,
    per_device_eval_batch_size=256,
    dataloader_drop_last=True,
    learning_rate=0.05,
    optim='sgd',
    optim_args='momentum=0.9',
    eval_strategy='epoch',
    logging_strategy='epoch',
    save_strategy='epoch',
    report_to='none',
    use_cpu=True,  # leave it out to take the devices that there are
)
trainer = CoreTuningTrainer(
    model,
    training_args,
    train_dataset=create_dataset('train', 1024),
    eval_dataset=create_dataset('validation', 512),
    compute_metrics=compute_metrics,
    loss_kwargs={'contrast_weight': 0.1},
)
trainer.train()
accuracy = trainer.evaluate()['eval_accuracy']
trainer.save_model('output/transformers/tuned')  # the projection head is not in it
if trainer.is_world_process_zero():
    plain = TimmWrapperForImageClassification.from_pretrained('output/transformers/tuned')
    print(f'accuracy {100 * accuracy:.1f} %, {sum(p.numel() for p in plain.parameters())} parameters')
