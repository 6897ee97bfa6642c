"""What a training task asks of a loss on the features and logits of labelled rows

`CoreTuningTask` and `SegmentationTask` work with any loss of this kind. A row is an image, or an anchor pixel of one.
"""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn

from ..distributed import GlobalBatch, process_index_and_count


class TaskLoss(nn.Module):
    """Base of the losses. A subclass writes `compute`; everything else has a default.

    Parameters and buffers of the loss train and travel with it. Its random generator is part of its `state_dict`, so
    any loop that saves the loss continues with the draws of an uninterrupted run.

    Args:
        gather: Compare rows with those of all processes. Otherwise each process is on its own.
        uneven_batches: Processes may hold batches of different size. Their sizes are exchanged in every step, which
            synchronises with the device. Without it sizes must agree, as they do when the loader drops the last batch.
        label_smoothing: Share of a class index target that goes to all classes evenly, in [0, 1).
        generator: Source of all random draws. A new one on the CPU, seeded from torch's global seed, when None. With
            several processes, seed it alike on all: each takes its share of the same draws.

    Attributes:
        num_features: Width D of the features, None where any width will do.
        is_global_mean: Whether the average of the loss over processes is the mean over all their rows, also where
            batches differ in size. The training loop scales the losses of other tasks to make it so.

    Raises:
        ValueError: label_smoothing is out of its range.
    """

    num_features: Optional[int] = None
    is_global_mean: bool = True

    def __init__(
        self,
        gather: bool = True,
        uneven_batches: bool = False,
        label_smoothing: float = 0.0,
        generator: Optional[torch.Generator] = None,
    ):
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f'Expected label_smoothing in [0, 1), got {label_smoothing}.')
        self.gather = gather
        self.uneven_batches = uneven_batches
        self.label_smoothing = label_smoothing
        self.generator = generator if generator is not None else torch.Generator().manual_seed(torch.initial_seed())

    def attach(self, model: nn.Module) -> None:
        """Meet the model, once, before anything is wrapped, compiled or given to the optimizer.

        A loss that needs a copy of the model, such as a moving encoder, makes it here.
        """

    def check_shapes(self, features: torch.Tensor, logits: torch.Tensor) -> None:
        """Raise a ValueError unless features (B, D) and logits (B, C) belong together. It must compile."""

    def prepare(self, batch_size: int, device: torch.device, rows_per_image: int = 1) -> Tuple[Any, ...]:
        """What a step needs from outside a compiled region, such as random draws.

        Args:
            batch_size: Images of this process.
            device: Device of the features.
            rows_per_image: Rows that each image gives.

        Returns:
            Further arguments of `compute`. The first is the GlobalBatch: where the rows of this process lie among
            those of all.
        """
        return (GlobalBatch.create(batch_size, self.gather, self.uneven_batches, device, rows_per_image),)

    def compute(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        target: torch.Tensor,
        *prepared: Any,
        clean_loss: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        """The losses of a step. It runs inside the compiled, distributed region: no checks, no synchronisation.

        Args:
            features: Pre-logits features, any floating dtype (B, D).
            logits: What the classifier made of them, any floating dtype (B, C).
            target: Class indices int64 (B,), negative for rows that take no part, or soft targets (B, C).
            *prepared: What `prepare` returned.
            clean_loss: Cross-entropy of the batch, where the task knows more of it than these rows tell: that of all
                pixels, where the rows are a few of them. A scalar.

        Returns:
            Scalars in float32 or better: 'loss', which is minimised, and its parts, whose names end in '_loss'.
        """
        raise NotImplementedError(f'{type(self).__name__} must define compute().')

    def after_update(self, model: nn.Module) -> None:
        """Follow an update of the weights, outside any graph. A moving encoder takes its step here."""

    def draw_image_seeds(self, batch: GlobalBatch, device: torch.device) -> torch.Tensor:
        """A random integer in [0, 2**32) for each image of this process (B,) int64.

        Image b of process r takes the draw of image b * num_processes + r, the place it has in a single process that
        reads the same data. All processes draw equally many numbers, so their generators stay in step.
        """
        rank, num_processes = process_index_and_count()
        most_images = max(batch.sizes) // batch.rows_per_image
        own_images = batch.sizes[batch.rank] // batch.rows_per_image
        shape, generator = (num_processes * most_images,), self.generator
        seeds = torch.randint(2**32, shape, generator=generator, device=generator.device)
        return seeds[rank::num_processes][:own_images].to(device, non_blocking=True)

    def task_state(self) -> Dict[str, Any]:
        """What a checkpoint of the task holds of the loss."""
        return {'criterion': self.state_dict()}

    def load_task_state(self, state: Dict[str, Any], strict: bool = True) -> None:
        """Load what `task_state` returned.

        Raises:
            RuntimeError: The state does not fit this loss, and strict is set.
        """
        if strict and 'criterion' not in state:
            raise RuntimeError(
                f'Expected the state of a {type(self).__name__}, got one with {sorted(state)}. Resume with the loss '
                'that the checkpoint was trained with.'
            )
        self.load_state_dict(state.get('criterion', {}), strict=strict)

    def get_extra_state(self) -> torch.Tensor:
        """State of the generator as a tensor, so that also safetensors can hold the `state_dict`."""
        return self.generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        # a state of before the generator was in it still loads; the generator goes on from where it is
        state_dict.setdefault(f'{prefix}_extra_state', self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)
