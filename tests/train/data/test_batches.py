"""How processes share the images of a validation"""

import argparse

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from timm.data import create_loader
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from timm_coretune.train.data.batches import num_own_samples


def numbers(num_images):
    return TensorDataset(torch.arange(num_images))


def process(rank, num_processes):
    return argparse.Namespace(num_processes=num_processes, process_index=rank)


def ordered(dataset, num_processes, rank):
    order = OrderedDistributedSampler(dataset, num_processes, rank) if num_processes > 1 else None
    return DataLoader(dataset, batch_size=2, sampler=order)


def distributed(dataset, num_processes, rank):
    return DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, num_processes, rank))


def plain(dataset, num_processes, rank):
    return DataLoader(dataset, batch_size=2)


def shuffled(dataset, num_processes, rank):
    torch.manual_seed(rank)
    return DataLoader(dataset, batch_size=2, shuffle=True)


def leaving_out(dataset, num_processes, rank):
    return DataLoader(dataset, batch_size=1, drop_last=True)


def prepared(dataset, num_processes, rank, batch_size=2, **kwargs):
    PartialState()
    loader = DataLoader(dataset, batch_size=batch_size)
    return prepare_data_loader(loader, num_processes=num_processes, process_index=rank, **kwargs)


def prepared_and_split(dataset, num_processes, rank):
    return prepared(dataset, num_processes, rank, batch_size=2 * num_processes, split_batches=True)


def prepared_and_uneven(dataset, num_processes, rank):
    return prepared(dataset, num_processes, rank, even_batches=False)


@pytest.mark.parametrize('num_images, num_processes', [(33, 2), (32, 2), (7, 3), (2, 4), (5, 1), (9, 4)])
@pytest.mark.parametrize(
    'create',
    [ordered, distributed, plain, shuffled, leaving_out, prepared, prepared_and_split, prepared_and_uneven],
)
def test_processes_count_each_image_of_a_validation_once(num_images, num_processes, create):
    seen = []
    for rank in range(num_processes):
        loader = create(numbers(num_images), num_processes, rank)
        own = num_own_samples(loader, process(rank, num_processes))
        read = torch.cat([torch.zeros(0), *(batch for (batch,) in loader)]).tolist()
        assert own is None or 0 <= own <= len(read)
        seen += read[:own]
    assert sorted(seen) == list(range(num_images))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Half(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(4))

    def __len__(self):
        return 4


def prepared_for_two(loader, **kwargs):
    PartialState()
    return prepare_data_loader(loader, num_processes=2, process_index=0, **kwargs)


NINE = numbers(9)
REFUSED = {
    'without-a-data-set': (lambda: [(torch.zeros(2), torch.zeros(2))], 'Got list with NoneType'),
    'unknown-order': (lambda: DataLoader(NINE, sampler=Half()), 'with Half'),
    'repeats': (lambda: DataLoader(NINE, sampler=RepeatAugSampler(NINE, 2, 0)), 'with RepeatAugSampler'),
    'shared-twice': (lambda: prepared_for_two(distributed(NINE, 2, 0)), 'prepared on top'),
    'other-processes': (lambda: distributed(NINE, 3, 0), 'process 0 of 3'),
    'sampler-leaves-out': (
        lambda: DataLoader(NINE, sampler=DistributedSampler(NINE, 2, 0, drop_last=True)),
        'drop_last=False',
    ),
    'loader-leaves-out': (
        lambda: DataLoader(NINE, 2, sampler=DistributedSampler(NINE, 2, 0), drop_last=True),
        'drop_last=False',
    ),
    'prepared-leaves-out': (lambda: prepared_for_two(DataLoader(NINE, 2, drop_last=True)), 'drop_last=False'),
    'prepared-stream': (
        lambda: prepared_for_two(DataLoader(Stream(), 2), dispatch_batches=False),
        'a stream as it is',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_loader_whose_images_cannot_be_told_apart_is_refused(case):
    create, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        num_own_samples(create(), process(0, 2))


def test_the_images_of_a_stream_are_all_counted():
    assert num_own_samples(DataLoader(Stream(), 2), process(0, 2)) is None


def test_a_loader_of_timm_is_seen_through():
    images = torch.utils.data.TensorDataset(torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.long))
    images.transform = None
    loader = create_loader(images, (3, 8, 8), 2, num_workers=0, device=torch.device('cpu'), persistent_workers=False)
    assert [num_own_samples(loader, process(rank, 2)) for rank in (0, 1)] == [None, 0]
