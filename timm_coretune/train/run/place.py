"""Finds the batch to continue with when the batches of a run are others than those before it was stopped"""

import logging
from typing import Any, Dict, List, Mapping, Tuple

from ..data.batches import has_plain_order
from .resume import Continuation

_logger = logging.getLogger(__name__)

# settings that the images and their order depend on, besides the batches
_ORDER = (
    *('train_split', 'val_fraction', 'label_fraction', 'class_map', 'check_images', 'seed', 'class_balance'),
    *('aug_repeats', 'train_img_sizes', 'naflex_loader', 'epoch_repeats'),
)


def _batches_of(values: Mapping[str, Any]) -> Tuple[int, int, int]:
    """Batch size of a process, number of batches that are contrasted together, and number of batches of an update."""
    size = values['batch_size']
    together = max(1, (values.get('contrast_batch_size') or 0) // (values.get('global_batch_size') or size))
    return size, together, together * values['grad_accum_steps']


def _average_meter(processes: List[Dict[str, Any]], num_steps: int) -> Dict[str, Any]:
    """The losses of an epoch so far as if they had been summed over another number of steps or processes."""
    meters = [own['meter'] for own in processes]
    means = [[total / meter['num_steps'] for total in meter['total']] for meter in meters]
    mean = [sum(column) / len(column) for column in zip(*means, strict=True)]
    return dict(names=meters[0]['names'], total=[value * num_steps for value in mean], num_steps=num_steps)


def place_in_epoch(
    continuation: Continuation, values: Mapping[str, Any], num_processes: int, loader: Any
) -> Continuation:
    """Find the batch to continue with, if batches or processes differ from those of the run that wrote the state.

    The images of the epoch that were trained on are left out. Where the next image does not start an update, or where
    the order of images depends on the batches, the epoch is started again, and the log says so.

    Args:
        continuation: The place at which the state was saved.
        values: Settings of this run by name.
        num_processes: Processes of this run.
        loader: Training batches of this run.
    """
    state, before = continuation.loop_state, continuation.before
    if not state or not continuation.batch or loader is None:
        return continuation
    if state.get('is_trained'):  # whatever batches it had, the epoch continues with its validation
        processes, batch = state['processes'], len(loader)
        if len(processes) != num_processes:
            meter = _average_meter(processes, batch)
            processes = [{**own, 'meter': meter} for own in processes]
        return continuation._replace(batch=batch, loop_state={**state, 'batch': batch, 'processes': processes})
    names = ('batch_size', 'grad_accum_steps')
    size, together, accum = _batches_of({**{name: values[name] for name in names}, **before})
    size_now, together_now, accum_now = _batches_of(values)
    were = len(state['processes'])
    is_same_order = all(before.get(name, values[name]) == values[name] for name in _ORDER)
    num_images = continuation.batch * size * were
    batch, rest = divmod(num_images, size_now * num_processes)
    same_batches = size * were == size_now * num_processes
    fits = is_same_order and not rest and batch % accum_now == 0 and batch < len(loader)
    if fits and (same_batches or has_plain_order(loader)):
        if (size, together, accum, were) != (size_now, together_now, accum_now, num_processes):
            _logger.warning(
                f'The state was saved after {num_images} images of epoch {continuation.epoch} in batches of {size} x '
                f'{were} process(es), updated every {accum}. Now they are {size_now} x {num_processes}, updated every '
                f'{accum_now}: continuing with batch {batch}, the first of the images that are left.'
            )
            meter = _average_meter(state['processes'], batch // together_now)
            processes = [{**own, 'meter': meter} for own in state['processes']]
            state = {**state, 'batch': batch, 'processes': processes}
        return continuation._replace(batch=batch, loop_state=state)
    _logger.warning(
        f'The state was saved after {num_images} images of epoch {continuation.epoch}, in batches of {size} x {were} '
        f'process(es), updated every {accum}. With {size_now} x {num_processes}, updated every {accum_now}, no update '
        f'starts at the next image, or the order of images is another: epoch {continuation.epoch} is started again, '
        'so these images are seen once more.'
    )
    return continuation._replace(batch=0, loop_state={**state, 'batch': 0, 'restarted': True})
