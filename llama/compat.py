"""Wrap the private interfaces of PyTorch that this library uses, and hide differences between PyTorch's versions.

Tested with torch 2.6 to 2.15. If a new version of PyTorch changes one of these interfaces, adapt its function here.
"""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module

# --- what CPU operators do --------------------------------------------------------------------------------------------------

# PyTorch divides products of more complex numbers than this among threads. The last few values of each thread's part are
# rounded differently from the others, and a part may end inside a head: a row's result would depend on the number of rows.
MAX_SERIAL_COMPLEX = 32767


@functools.cache
def rms_norm_rounds_eps() -> bool:
    """Return True if F.rms_norm rounds eps to the input's dtype. PyTorch 2.6 does: in float16, eps=1e-9 becomes 0."""
    return bool(F.rms_norm(torch.zeros(1, dtype=torch.float16, device="cpu"), (1,), None, 1e-9).isnan())


def onednn_supports(dtype: torch.dtype) -> bool:
    """Return True if oneDNN can multiply matrices of `dtype`, float16 or bfloat16, on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cpu_has_slow_bf16() -> bool:
    """Return True for an x86 CPU without bfloat16 instructions. If oneDNN supports bfloat16 on such a CPU, it is slow."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_avx2_supported() and not fast


# --- products that no public function offers --------------------------------------------------------------------------------


def onednn_pack(weight: torch.Tensor) -> torch.Tensor:
    """Pack a weight (out, in) in oneDNN's internal layout. Call `to_dense` on the result to unpack it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def onednn_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Multiply x (N, in) by a weight that `onednn_pack` packed, and return (N, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply int8 matrices (n, k) and (k, m) on CUDA, and return int32 (n, m). n must be at least 17."""
    return torch._int_mm(a, b)


def int4_pack_cpu(values: torch.Tensor) -> torch.Tensor:
    """Pack a weight for `int4_linear_cpu`. values: int32 (out, in), each from 0 to 15."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)


def int4_linear_cpu(x: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """Multiply x (N, in) by a weight that `int4_pack_cpu` packed, and return (N, out).

    group: number of adjacent inputs that share a scale. scales_and_zeros: (groups, out, 2).
    """
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)


def int4_pack_cuda(pairs: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """Pack a weight for `int4_linear_cuda`. pairs: uint8 (out, in / 2), two 4-bit values in each byte."""
    return torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles)


def int4_linear_cuda(x: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """Multiply x (N, in) by a weight that `int4_pack_cuda` packed, and return (N, out).

    group: number of adjacent inputs that share a scale. scales_and_zeros: (groups, out, 2).
    """
    return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)


# --- tensors of a class of their own (kernels/packed_weight.py) -------------------------------------------------------------


def make_wrapper_tensor(cls: type, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tensor of the subclass `cls`, with a shape, dtype and device, but without memory."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)  # type: ignore[attr-defined]


def without_torch_function() -> Any:
    """Return a context in which functions of torch treat subclasses of Tensor as plain tensors."""
    return torch._C.DisableTorchFunctionSubclass()


# The function with which `Module.to` tests whether a parameter can be given another tensor's data.
may_take_data = torch._has_compatible_shallow_copy_type


def is_transformed(tensor: torch.Tensor) -> bool:
    """Return True for a tensor that a transform of torch.func, such as vmap or grad, passes to a function.

    Such a tensor has no memory that a kernel could read.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_intercepted() -> bool:
    """Return True while operations are traced, handled by a dispatch mode, or differentiated in forward mode."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.jit.is_tracing() or bool(torch._C._len_torch_dispatch_stack()) or forward_mode


# --- modules ----------------------------------------------------------------------------------------------------------------


def has_global_forward_hooks() -> bool:
    """Return True if a forward hook or forward pre-hook is registered for all modules."""
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def forward_hooks(module: Any) -> tuple[Any, Any]:
    """Return the dicts, not copies, in which a module keeps its forward hooks and its forward pre-hooks."""
    return module._forward_hooks, module._forward_pre_hooks


def has_hooks(module: Any) -> bool:
    """Return True if a module has a forward or backward hook, or a pre-hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_compiled(module: Any) -> bool:
    """Return True if `module.compile()` has been called."""
    return module._compiled_call_impl is not None


def version_of(tensor: torch.Tensor) -> int:
    """Return the number of in-place edits of a tensor and its views so far; edits through `.data` are not counted."""
    return tensor._version


class ObservedTensor(torch.Tensor):
    """A tensor that records whether a caller has taken its memory in a way that lets edits escape `version_of`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # operations return plain tensors
    aliases: "set[str]"  # names of the ways in which a caller has taken the memory; shared with what `detach` returns
    is_alias = False  # True for what `detach` returns

    def detach(self) -> Any:  # type: ignore[override]
        """Return an alias of the same type, which `nn.Parameter(tensor)` needs; it is observed, too."""
        alias = detach(self)
        alias.__class__, alias.aliases, alias.is_alias = type(self), self.aliases, True  # type: ignore[attr-defined]
        return alias

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        self.aliases.add("data")
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        self.aliases.add("data")
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]

    def numpy(self, **options: Any) -> Any:
        self.aliases.add("numpy")
        return super().numpy(**options)

    def __array__(self, *args: Any, **options: Any) -> Any:
        self.aliases.add("numpy")
        return super().__array__(*args, **options)

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        self.aliases.add("dlpack")
        return super().__dlpack__(*args, **options)

    def plain(self) -> torch.Tensor:
        """Return a plain tensor with the same memory. Copies, pickles and `repr` are those of the plain tensor."""
        return detach(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = copy.deepcopy(self.plain(), memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.plain())


class ObservedParameter(ObservedTensor, nn.Parameter):
    """An `ObservedTensor` that is a parameter, or an alias of one."""

    def plain(self) -> torch.Tensor:
        is_parameter = not self.is_alias or "_is_param" in self.__dict__  # `nn.Parameter` sets _is_param
        return nn.Parameter(detach(self), self.requires_grad) if is_parameter else detach(self)


PLAIN_TYPES = (torch.Tensor, nn.Parameter, ObservedTensor, ObservedParameter)  # tensors whose memory C code may read


def detach(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain alias of a plain or observed tensor, without a gradient."""
    return torch.Tensor.detach(tensor)


def observe(tensor: torch.Tensor) -> torch.Tensor:
    """Make a plain tensor or parameter an `ObservedTensor` from now on, and return it. Leave tensors of other types alone."""
    observed: dict[type, type] = {torch.Tensor: ObservedTensor, nn.Parameter: ObservedParameter}
    if type(tensor) in observed:
        tensor.__class__ = observed[type(tensor)]
        tensor.aliases = set()  # type: ignore[attr-defined]
    return tensor


def is_observed(tensor: torch.Tensor) -> bool:
    """Return True if no edit of a tensor can have escaped `version_of` since it was observed."""
    return isinstance(tensor, ObservedTensor) and not tensor.aliases


# --- process groups ---------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """Return the key/value store of the default process group, in which a failed rank stores why it failed."""
    return dist.distributed_c10d._get_default_store()


def abort_process_groups() -> None:
    """Abort collectives that are running on the GPU and would wait for a failed rank for ever."""
    dist.distributed_c10d._abort_process_group()


# --- torch.compile ----------------------------------------------------------------------------------------------------------


def inductor_options() -> dict[str, Any]:
    """Return options of torch.compile for decode steps.

    The kernels that multiply a single row are tuned on their first use. On an H100 they read weights at 2.6 to 3.1 TB/s, those
    of cuBLAS at 2.0 to 2.8. If the GPU and PyTorch support it, a kernel is launched before the previous kernel has ended, and
    then waits for its results. This saves 4% of the time of a 7B decode step.
    """
    from torch._inductor import config

    early_launch = {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}
    return {"options": {"coordinate_descent_tuning": True} | early_launch}


def unlimited_recompiles() -> Any:
    """Return a context in which torch.compile compiles for any number of shapes. PyTorch's default limit is eight."""
    config = torch._dynamo.config
    limits = ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit")
    return config.patch({name: 1 << 14 for name in limits if hasattr(config, name)})
