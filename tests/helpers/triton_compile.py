"""Kernels as machine code for a device that is not here: what the interpreter takes, the compiler may reject"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_coretune.loss import streaming_triton

NAMES = {torch.bfloat16: 'bf16', torch.float16: 'fp16', torch.float32: 'fp32', torch.float64: 'fp64'}


def compiled(kernel, capability, width, dtype, **words):
    """The kernel with the blocks that streaming_triton chooses for embeddings of a width and a dtype."""
    rows = torch.empty(1, width, dtype=dtype, device='meta')
    words = {**streaming_triton._words(rows, rows, 1.0), **words}
    options = {name: words.pop(name) for name in ('num_warps', 'num_stages')}
    signature = {name: type_of(name, dtype, words) for name in kernel.arg_names}
    words = {name: value for name, value in words.items() if signature[name] == 'constexpr'}
    aligned = [(index,) for index, name in enumerate(kernel.arg_names) if signature[name].startswith('*')]
    source = ASTSource(kernel, signature, words, {index: [['tt.divisibility', 16]] for index in aligned})
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def type_of(name, dtype, words):
    if name in ('rows', 'columns'):
        return f'*{NAMES[dtype]}'
    if name in ('R', 'C'):
        return 'i32'
    if name.startswith('scale'):
        return 'fp32'
    if name in words:
        return 'constexpr'
    if name.endswith(('place', 'label', 'run')):
        return '*i64'
    return '*fp64' if dtype == torch.float64 else '*fp32'
