"""Core-tuning in the Trainer of transformers"""

import os
from pathlib import Path
from typing import Any, Dict, Optional, Union, cast

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from ..loss import TaskLoss, create_method
from ..mixup import protect_draws
from .loss_in_forward import LossInForward, find_classifier

try:
    from transformers import Trainer
except ImportError as e:
    raise ImportError(f"CoreTuningTrainer needs transformers ({e}): pip install 'timm-coretune[transformers]'") from e

STATE_NAME = 'coretune.safetensors'  # in the folder of a checkpoint, beside the optimizer's state


class CoreTuningTrainer(Trainer):
    """The Trainer of transformers, with a loss on the features and logits of a model for image classification.

    All of transformers' image classifiers whose logits are the output of one layer train, and so do models of timm in
    TimmWrapperForImageClassification. The loss is a part of the model only while it trains. Evaluation, prediction and
    saved models are those of the plain Trainer. Checkpoints have the state of the loss in a file of its own, from which
    `resume_from_checkpoint` continues.

    With gradient accumulation, each batch counts as many times as it has labels, as in the plain Trainer. Several
    processes need DistributedDataParallel, that is, `torchrun` or `accelerate launch` without FSDP and DeepSpeed.

    Args:
        *args: Arguments of Trainer.
        criterion: The loss, or its name in timm_coretune.loss.METHODS, such as 'scl'. When None, a CoreTuningLoss.
        loss_kwargs: Arguments of the loss except num_features, which follows from the model. `label_smoothing_factor`
            of the TrainingArguments is its label_smoothing, and `problem_type` of the model tells multi_label.
        classifier: Name of the last layer in the model, if it is not found.
        **kwargs: Further arguments of Trainer.

    Raises:
        ValueError: The model, the loss, or an argument of Trainer does not go together with the others.

    Examples:

        ```python
        trainer = CoreTuningTrainer(model, training_args, train_dataset=train_dataset)
        trainer.train()
        trainer.save_model('tuned')  # loads with from_pretrained('tuned')
        ```
    """

    def __init__(
        self,
        *args: Any,
        criterion: Union[TaskLoss, str, None] = None,
        loss_kwargs: Optional[Dict[str, Any]] = None,
        classifier: Optional[str] = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._check_arguments()
        layer, num_features = find_classifier(self.model, classifier)
        if isinstance(criterion, TaskLoss):
            self._check_criterion(criterion, loss_kwargs)
        else:
            multi_label = self.model.config.problem_type == 'multi_label_classification'
            defaults = {'label_smoothing': self.args.label_smoothing_factor, 'multi_label': multi_label}
            criterion = create_method(criterion or 'core', num_features, **{**defaults, **(loss_kwargs or {})})
        criterion.attach(cast(nn.Module, getattr(self.model, 'timm_model', self.model)))
        _check_loss(criterion)
        self.criterion = criterion.to(self.args.device)
        self._step = LossInForward(self.model, criterion, layer)
        self._parts: Dict[str, torch.Tensor] = {}  # sums since the last line of the log
        self._num_batches = 0

    def _check_arguments(self) -> None:
        if self.model_init is not None or self.compute_loss_func is not None:
            raise ValueError('Expected model and no model_init or compute_loss_func. Pass model=, and criterion=.')
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f'Expected one process for each GPU in DistributedDataParallel, got {self.args.parallel_mode}. Start '
                'the script with torchrun or accelerate launch, without FSDP and DeepSpeed.'
            )
        if self.model.config.problem_type == 'regression':
            raise ValueError("Expected a model that classifies, got config.problem_type='regression'.")

    def _check_criterion(self, criterion: TaskLoss, loss_kwargs: Optional[Dict[str, Any]]) -> None:
        if loss_kwargs:
            raise ValueError(f'Pass either a criterion or its arguments, not both: {sorted(loss_kwargs)}.')
        if self.args.label_smoothing_factor not in (0.0, criterion.label_smoothing):
            raise ValueError(
                f'Expected label_smoothing_factor={criterion.label_smoothing}, as the criterion has it, got '
                f'{self.args.label_smoothing_factor}. Give label_smoothing to the criterion.'
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._step.attached():
            return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(p) for group in optimizer.param_groups for p in group['params']}
        if any(p.requires_grad and id(p) not in known for p in self.criterion.parameters()):
            raise ValueError(
                'Expected an optimizer that has the parameters of the loss, got one without. Pass criterion= and give '
                'the optimizer criterion.parameters() too, or pass optimizer_cls_and_kwargs= in place of optimizers=.'
            )
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get('labels') is None:
            raise ValueError(f"Expected a batch with 'labels', got {', '.join(inputs)}. Name the column 'labels'.")
        inputs = dict(inputs)
        target = inputs.pop('labels')
        self.criterion.check_target(target, len(target), self.model.config.num_labels)
        prepared = protect_draws(self.criterion.prepare(len(target), target.device))
        outputs = self._step(model, inputs, target, *prepared)
        loss = outputs['loss']
        self._num_batches += 1
        losses, self._step.losses = self._step.losses, {}
        for name in losses.keys() - {'loss'}:
            self._parts[name] = self._parts.get(name, 0.0) + losses[name].detach()
        if num_items_in_batch is not None:  # otherwise Trainer divides by the number of accumulated batches
            batch, num_processes = prepared[0], self.args.world_size
            if not self.args.average_tokens_across_devices:
                num_rows = len(target)
            else:
                num_rows = batch.num_rows if batch.world_size > 1 else len(target) * num_processes
            loss = loss * (num_rows * target[0].numel() / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: Dict[str, float], *args: Any, **kwargs: Any) -> None:
        if 'loss' in logs and self._num_batches:
            logs = {**logs, **{name: round(float(x) / self._num_batches, 6) for name, x in self._parts.items()}}
            self._parts, self._num_batches = {}, 0
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_file(self.criterion.state_dict(), os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / STATE_NAME
        if not file.exists():
            raise FileNotFoundError(
                f'Expected {file}, the state of the loss, found none. Continue a run of CoreTuningTrainer, or load '
                'the model by from_pretrained() and start anew.'
            )
        self.criterion.load_state_dict(load_file(file))


def _check_loss(criterion: TaskLoss) -> None:
    methods = ('attach_optimizer', 'start', 'after_update')
    own = [name for name in methods if getattr(type(criterion), name) is not getattr(TaskLoss, name)]
    needs = [name for name in criterion.requires if name != 'classifier'] + own
    if needs:
        raise ValueError(
            f'Expected a loss that follows from features and logits, got {type(criterion).__name__}, which needs '
            f'{", ".join(needs)}. Use it in a loop with CoreTuningTask.'
        )
