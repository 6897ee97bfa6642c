"""How processes share the images of a validation"""

import argparse

import pytest
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler

from timm_coretune.train.data.batches import num_own_samples


@pytest.mark.parametrize('num_images, num_processes', [(33, 2), (32, 2), (7, 3), (2, 4), (5, 1)])
def test_processes_share_the_images_of_a_validation_without_those_that_even_out(num_images, num_processes):
    dataset = torch.utils.data.TensorDataset(torch.arange(num_images))
    seen = []
    for rank in range(num_processes):
        accelerator = argparse.Namespace(num_processes=num_processes, process_index=rank)
        order = OrderedDistributedSampler(dataset, num_processes, rank) if num_processes > 1 else None
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=order)
        seen += torch.cat([batch for (batch,) in loader]).tolist()[: num_own_samples(loader, accelerator)]
    assert sorted(seen) == list(range(num_images))
