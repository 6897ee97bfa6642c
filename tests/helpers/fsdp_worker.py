"""train.py sharded by FSDP2 on the CPU, which torch does and accelerate leaves to accelerators: it is told otherwise"""

import importlib

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from timm_coretune.train import main


class ShardingAccelerator(Accelerator):
    """Shards on the CPU."""

    def __init__(self, **kwargs):
        kwargs.pop('kwargs_handlers')
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy='no_wrap',
            state_dict_type='FULL_STATE_DICT',
            cpu_ram_efficient_loading=False,
        )
        super().__init__(fsdp_plugin=plugin, **kwargs)
        PartialState._shared_state['distributed_type'] = DistributedType.FSDP
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = plugin


if __name__ == '__main__':
    importlib.import_module('timm_coretune.train.processes').Accelerator = ShardingAccelerator
    main()
