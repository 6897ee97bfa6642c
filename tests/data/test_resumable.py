"""Order of training images and their draws: from seed and place alone"""

import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler

from timm_coretune.data.resumable import EpochBatchSampler


def epoch_batches(size=23, batch_size=4, seed=0, rank=0, num_processes=1, drop_last=False):
    if num_processes > 1:
        order = DistributedSampler(range(size), num_replicas=num_processes, rank=rank)
    else:
        order = RandomSampler(range(size))
    return EpochBatchSampler(BatchSampler(order, batch_size, drop_last), seed, rank, num_processes)


def one_epoch(sampler, epoch, skip=0):
    sampler.set_epoch(epoch)
    sampler.skip(skip)
    return list(sampler)


def test_order_and_draws_depend_on_seed_and_epoch_alone():
    first = one_epoch(epoch_batches(), 2)
    used = epoch_batches()
    for epoch in (0, 5, 1):
        one_epoch(used, epoch)
    torch.manual_seed(123)
    assert one_epoch(used, 2) == first
    assert sorted(index for batch in first for _, index in batch) == list(range(23))
    others = [one_epoch(epoch_batches(seed=1), 2), one_epoch(epoch_batches(), 3)]
    for other in others:
        assert [index for batch in other for _, index in batch] != [index for batch in first for _, index in batch]
        assert not {draw.key for batch in other for draw, _ in batch} & {
            draw.key for batch in first for draw, _ in batch
        }
    assert len({draw.key for batch in first for draw, _ in batch}) == 23
    assert {draw.epoch for batch in first for draw, _ in batch} == {2}


@pytest.mark.parametrize('num_processes', [1, 2])
def test_a_pass_from_any_batch_is_the_rest_of_the_whole_pass(num_processes):
    whole = one_epoch(epoch_batches(rank=num_processes - 1, num_processes=num_processes), 4)
    for start in range(len(whole) + 1):
        sampler = epoch_batches(rank=num_processes - 1, num_processes=num_processes)
        assert one_epoch(sampler, 4, skip=start) == whole[start:]
        assert one_epoch(sampler, 4) == whole  # skips once


@pytest.mark.parametrize('num_processes', [2, 3])
def test_processes_together_have_the_batch_of_one_process(num_processes):
    size = 24 * num_processes
    shared = [one_epoch(epoch_batches(size, 4, 7, rank, num_processes), 3) for rank in range(num_processes)]
    order = DistributedSampler(range(size), num_replicas=1, rank=0)
    alone = EpochBatchSampler(BatchSampler(order, 4 * num_processes, False), 7, 0, 1)
    alone = one_epoch(alone, 3)
    assert len(alone) == len(shared[0]) == 6
    for number, batch in enumerate(alone):
        # the images in the order in which a distributed sampler deals them out, each with its draw
        assert batch == [item for items in zip(*(batches[number] for batches in shared), strict=True) for item in items]


def test_one_process_and_a_distributed_sampler_of_one_give_the_same_images():
    order = DistributedSampler(range(23), num_replicas=1, rank=0)
    distributed = EpochBatchSampler(BatchSampler(order, 4, False), 0, 0, 1)
    assert one_epoch(distributed, 5) == one_epoch(epoch_batches(), 5)
