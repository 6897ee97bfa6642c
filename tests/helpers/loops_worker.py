"""One process of tests/integrations/test_processes.py: an update in each library's loop, in DistributedDataParallel

Run as `loops_worker.py RANK DIRECTORY` for each rank; what it found is written to DIRECTORY.
"""

import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import timm
import torch
import torch.distributed as dist
from ranks import join_ranks, save_found
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from timm_coretune import CoreTuningLoss, CoreTuningTask

NUM_CLASSES, NUM_PROCESSES, BATCH_SIZE, LEARNING_RATE = 4, 2, 4, 0.5
TARGET = torch.tensor([0, 1, 0, 2, 1, 3, 0, 0])


def create_timm_model() -> Any:
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=NUM_CLASSES, img_size=32)


def create_transformers_model() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
        id2label={i: str(i) for i in range(NUM_CLASSES)},
    )
    return transformers.ViTForImageClassification(config)


def create_criterion(model_or_width: Any) -> CoreTuningLoss:
    torch.manual_seed(1)
    return CoreTuningLoss(model_or_width, contrast_weight=0.5, generator=torch.Generator().manual_seed(2))


def images() -> torch.Tensor:
    return torch.randn(len(TARGET), 3, 32, 32, generator=torch.Generator().manual_seed(3))


def create_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)


def create_task() -> CoreTuningTask:
    model = create_timm_model()
    return CoreTuningTask(model, create_criterion(model), verbose=False)


def state_of(model: Any, criterion: CoreTuningLoss) -> Dict[str, torch.Tensor]:
    named = {**dict(model.named_parameters()), **dict(criterion.named_parameters())}
    return {name: p.detach().clone() for name, p in named.items()}


def by_accelerate(rank: int, directory: Path) -> Dict[str, torch.Tensor]:
    from accelerate import Accelerator

    accelerator, task = Accelerator(cpu=True), create_task()
    optimizer: Any = create_optimizer(task.get_trainable_module())
    task.trainable_module, optimizer = accelerator.prepare(task.trainable_module, optimizer)
    accelerator.backward(task(images()[rank::NUM_PROCESSES], TARGET[rank::NUM_PROCESSES])['loss'])
    optimizer.step()
    return state_of(task.get_eval_model(), task.criterion)


def by_fabric(rank: int, directory: Path) -> Dict[str, torch.Tensor]:
    from lightning.fabric import Fabric

    fabric, task = Fabric(accelerator='cpu', devices=NUM_PROCESSES, strategy='ddp'), create_task()
    fabric.launch()
    optimizer: Any = create_optimizer(task.get_trainable_module())
    task.trainable_module, optimizer = fabric.setup(task.trainable_module, optimizer)
    fabric.backward(task(images()[rank::NUM_PROCESSES], TARGET[rank::NUM_PROCESSES])['loss'])
    optimizer.step()
    return state_of(task.get_eval_model(), task.criterion)


def by_lightning(rank: int, directory: Path) -> Dict[str, torch.Tensor]:
    import lightning

    from timm_coretune.integrations import CoreTuningModule

    model = create_timm_model()
    module = CoreTuningModule(model, create_optimizer, create_criterion(model))
    trainer = lightning.Trainer(
        accelerator='cpu',
        devices=NUM_PROCESSES,
        strategy='ddp',
        use_distributed_sampler=False,  # which would shuffle
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(images(), TARGET)
    sampler = DistributedSampler(data, NUM_PROCESSES, rank, shuffle=False)  # deals images out in turn
    loader = DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)
    trainer.fit(module, loader, loader)
    found = state_of(module.model, module.task.criterion)
    return {**found, 'val_loss': trainer.callback_metrics['val_loss']}


def by_transformers(rank: int, directory: Path) -> Dict[str, torch.Tensor]:
    import transformers

    from timm_coretune.integrations import CoreTuningTrainer

    seen: List[int] = []

    def collate(rows: Any) -> Dict[str, torch.Tensor]:
        seen.extend(row['labels'][1] for row in rows)
        labels = torch.tensor([row['labels'][0] for row in rows])
        return {'pixel_values': torch.stack([row['pixel_values'] for row in rows]), 'labels': labels}

    arguments = transformers.TrainingArguments(
        str(directory / 'trainer'),
        max_steps=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type='constant',
        optim='sgd',
        max_grad_norm=0.0,
        report_to='none',
        save_strategy='no',
        use_cpu=True,
        disable_tqdm=True,
    )
    model = create_transformers_model()
    data = [
        {'pixel_values': x, 'labels': (y, i)} for i, (x, y) in enumerate(zip(images(), TARGET.tolist(), strict=True))
    ]
    trainer = CoreTuningTrainer(
        model, arguments, data_collator=collate, train_dataset=data, criterion=create_criterion(8)
    )
    trainer.train()
    assert arguments.world_size == NUM_PROCESSES
    return {**state_of(model, trainer.criterion), 'seen': torch.tensor(seen[:BATCH_SIZE])}


LOOPS: Dict[str, Callable[[int, Path], Dict[str, torch.Tensor]]] = {
    'accelerate': by_accelerate,
    'transformers': by_transformers,
    'fabric': by_fabric,
    'lightning': by_lightning,
}


def main(arguments: List[str]) -> None:
    rank, directory = int(arguments[0]), Path(arguments[1])
    torch.set_num_threads(1)
    # as torchrun sets them; the group of processes exists already, so nobody listens at the port
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_PROCESSES), NODE_RANK='0')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    join_ranks(rank, NUM_PROCESSES, directory)
    found = {}
    for name, loop in LOOPS.items():
        found[name] = loop(rank, directory)
        dist.barrier()
    save_found(found, rank, directory)


if __name__ == '__main__':
    main(sys.argv[1:])
