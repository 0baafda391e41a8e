"""A launcher that caches compiled kernels, with less overhead than Triton's own.

On every call Triton inspects all arguments to find the compiled kernel, which takes about 0.05 ms for as many arguments
as these kernels have. A training step at small sizes is a dozen launches of 0.1 ms each.
"""

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

_SCALARS = (int, float, type(None))
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel, programs: int, args: tuple, constants: dict[str, Any], options: dict[str, int | None]) -> None:
    """Run kernel[(programs,)](*args, **constants, **options) on the current stream of the arguments' device.

    `args` are the kernel's first parameters and `constants` all that follow. Kernels list their integer arguments in
    do_not_specialize, because the cache does not distinguish integers by value. With no programs nothing is launched.
    """
    if programs == 0:
        return
    if triton.knobs.runtime.interpret:
        kernel[(programs,)](*args, **constants, **options)
        return
    device = _device_of_arguments(args)
    if device != torch.cuda.current_device():  # The model is spread over several GPUs.
        with torch.cuda.device(device):
            return launch(kernel, programs, args, constants, options)
    # Triton hashes a kernel by its source, which is slow. The kernels are module-level, so their ids are stable.
    key = (id(kernel), device, *map(_specialization_key, args), *constants.values(), *options.values())
    cached = _compiled.get(key)
    if cached is not None:
        compiled, constant_values = cached
        compiled[(programs, 1, 1)](*args, *constant_values)
        return
    compiled = kernel[(programs,)](*args, **constants, **options)
    constant_names = kernel.arg_names[len(args) :]
    named_values = {**constants, **options}
    _compiled[key] = compiled, tuple(named_values[name] for name in constant_names)


def _device_of_arguments(args: tuple) -> int:
    for x in args:
        if type(x) is TensorDescriptor:
            return x.base.get_device()
        if type(x) not in _SCALARS:
            return x.get_device()
    raise TypeError("a kernel needs at least one tensor argument")


def _specialization_key(x: Any) -> Any:
    """Return the properties of an argument that its kernel was compiled for."""
    kind = type(x)  # isinstance is slow on tensors, and this runs for every argument of every launch.
    if kind is TensorDescriptor:
        return x.base.dtype, *x.block_shape
    if kind in _SCALARS:
        return kind
    return x.dtype, x.data_ptr() % 16 == 0
