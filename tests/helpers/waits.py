"""Finds where the host waits for a device, on a machine that has only a CPU"""

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device('cuda')
ATEN = torch.ops.aten
# a value, or the number of rows of a result, has to be known on the host
READING = (
    *(ATEN._local_scalar_dense, ATEN.is_nonzero, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN.bincount),
    *(ATEN._unique, ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive, ATEN.repeat_interleave),
)


def _reads_mask(packet, args):
    if packet not in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._unsafe_index):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


class Waits(TorchDispatchMode):
    """Notes in `found` the operations for which the host would wait if the tensors were on a GPU.

    `unwaited` has the source and the target of each copy between host and device that it does not wait for.
    """

    def __init__(self):
        super().__init__()
        self.found = []
        self.unwaited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in READING or _reads_mask(packet, args):
            self.found.append(str(func))
        result = func(*args, **kwargs)
        if packet in (ATEN._to_copy, ATEN.copy_):
            self._note_copy(func, args[packet is ATEN.copy_].device.type, args[2:], kwargs, result)
        return result

    def _note_copy(self, func, source, flags, kwargs, result):
        target = result.device.type
        if source == target:
            return
        if not kwargs.get('non_blocking', bool(flags) and flags[0]):
            self.found.append(f'{func} of {tuple(result.shape)} from {source} to {target}')
        else:
            self.unwaited.append((source, target))


class _Fakes(FakeTensorMode):
    def __deepcopy__(self, memo):  # a copy of a model stays in the same mode
        return self


def skip_without_fake_cuda():
    """Skip the test where torch cannot make CUDA tensors without data, as older versions cannot without a driver."""
    try:
        with FakeTensorMode():
            torch.zeros(1).to(CUDA)
            torch.nn.functional.linear(*(torch.zeros(2, 2, device=CUDA) for _ in range(2)))
    except (RuntimeError, AssertionError) as e:
        pytest.skip(f'no CUDA tensors without data in this torch: {str(e).splitlines()[0]}')


@contextlib.contextmanager
def fake_cuda():
    """In the context all new tensors are torch's fakes, which have a shape and a device but no values.

    Reading a value of one raises an error of torch. Yields `Waits`, which also sees copies between devices here. A
    backward pass on a fake device needs a real one.
    """
    skip_without_fake_cuda()
    with (
        # modules are created on their device, as torch cannot move fake parameters
        mock.patch.object(torch.nn.Module, 'to', lambda self, *args, **kwargs: self),
        mock.patch.object(torch.Tensor, 'pin_memory', lambda self: self),  # torch has no fakes of pinned memory
        _Fakes(),
        Waits() as waits,
    ):
        yield waits
