"""Launching a kernel again without what Triton does on every call to find out that nothing has changed.

A training step at small sizes is a dozen launches of a tenth of a millisecond; Triton's own look-up takes about half
of that for as many arguments as these kernels have. The compiled kernel is kept by what it was compiled for.
"""

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

_SCALARS = (int, float, type(None))
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel, programs: int, args: tuple, constants: dict[str, Any], options: dict[str, int | None]) -> None:
    """kernel[(programs,)](*args, **constants, **options) on the current stream of the device that args are on; nothing
    when there are no programs.

    args are the kernel's first parameters and constants all that follow. Integers among args are never specialised
    on: kernels list them in do_not_specialize.
    """
    if programs == 0:
        return
    if triton.knobs.runtime.interpret:
        kernel[(programs,)](*args, **constants, **options)
        return
    device = _device(args)
    if device != torch.cuda.current_device():  # a layer of a model that is spread over several
        with torch.cuda.device(device):
            return launch(kernel, programs, args, constants, options)
    # id: Triton hashes a kernel by its source. The kernels are module-level, so an id stays theirs.
    key = (id(kernel), device, *map(_kind, args), *constants.values(), *options.values())
    known = _compiled.get(key)
    if known is not None:
        compiled, tail = known
        compiled[(programs, 1, 1)](*args, *tail)
        return
    compiled = kernel[(programs,)](*args, **constants, **options)
    _compiled[key] = compiled, tuple({**constants, **options}[name] for name in kernel.arg_names[len(args) :])


def _device(args: tuple) -> int:
    for x in args:
        if type(x) is TensorDescriptor:
            return x.base.get_device()
        if type(x) not in _SCALARS:
            return x.get_device()
    raise TypeError("a kernel needs a tensor")


def _kind(x: Any) -> Any:
    """What of an argument its kernel is compiled for."""
    kind = type(x)  # isinstance of a Tensor is slow, and this is done for every argument of every launch
    if kind is TensorDescriptor:
        return x.base.dtype, *x.block_shape
    if kind in _SCALARS:
        return kind
    return x.dtype, x.data_ptr() % 16 == 0
