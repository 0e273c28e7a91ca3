"""PyTorch's private interfaces and version differences that this library depends on, each with its reason.

Tested with torch 2.6 to 2.15. A new version of PyTorch that breaks one of these is mended here.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.modules import module as nn_module

# --- what CPU operators do --------------------------------------------------------------------------------------------------

# PyTorch splits products of more complex numbers than this among threads. A split may fall inside a head, and the last numbers
# before it are rounded differently, so that a row's result would depend on the number of rows.
MAX_SERIAL_COMPLEX = 32767


@functools.cache
def rms_norm_rounds_eps() -> bool:
    """Return True if F.rms_norm rounds eps to a 16-bit dtype: PyTorch 2.6 makes 0 of 1e-9 in float16."""
    return bool(F.rms_norm(torch.zeros(1, dtype=torch.float16, device="cpu"), (1,), None, 1e-9).isnan())


def onednn_supports(dtype: torch.dtype) -> bool:
    """Return True if oneDNN multiplies matrices of float16 or bfloat16 on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cpu_has_slow_bf16() -> bool:
    """Return True for an x86 CPU without instructions for bfloat16. oneDNN accepts bfloat16 on any with AVX-512, slowly."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_avx2_supported() and not fast


# --- products that no public function offers --------------------------------------------------------------------------------


def onednn_pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight (out, in) in oneDNN's own layout, opaque; `to_dense` undoes it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def onednn_linear(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Multiply x (N, in) by a weight from `onednn_pack`: (N, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply int8 matrices (n, k) and (k, m) on CUDA: int32 (n, m), n at least 17."""
    return torch._int_mm(a, b)


def int4_pack_cpu(values: torch.Tensor) -> torch.Tensor:
    """Pack int32 values 0..15 (out, in) for `int4_linear_cpu`."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)


def int4_linear_cpu(x: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """Multiply x (N, in) by a weight from `int4_pack_cpu`, with scales and zeros (groups, out, 2)."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)


def int4_pack_cuda(pairs: torch.Tensor, inner_tiles: int) -> torch.Tensor:
    """Pack two 4-bit values in each uint8 (out, in / 2) for `int4_linear_cuda`."""
    return torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles)


def int4_linear_cuda(x: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """Multiply x (N, in) by a weight from `int4_pack_cuda`, with scales and zeros (groups, out, 2)."""
    return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)


# --- tensors of a class of their own (kernels/packed_weight.py) -------------------------------------------------------------


def make_wrapper_tensor(cls: type, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a tensor of a subclass that has a shape, and no memory."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)  # type: ignore[attr-defined]


def without_torch_function() -> Any:
    """Return a context in which functions of torch treat subclasses of Tensor as plain tensors."""
    return torch._C.DisableTorchFunctionSubclass()


# The question of `Module.to` whether a parameter can be given another tensor's data.
may_take_data = torch._has_compatible_shallow_copy_type


def is_transformed(tensor: torch.Tensor) -> bool:
    """Return True within torch.func's transforms, such as vmap and grad, whose tensors have no memory to look at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_intercepted() -> bool:
    """Return True while something watches or replaces each operation: tracing, a dispatch mode, or forward-mode autograd."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.jit.is_tracing() or bool(torch._C._len_torch_dispatch_stack()) or forward_mode


# --- modules ----------------------------------------------------------------------------------------------------------------


def has_global_forward_hooks() -> bool:
    """Return True if `register_module_forward_hook`, or its pre-hook, has been used."""
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def forward_hooks(module: Any) -> tuple[Any, Any]:
    """Return the live dicts of a module's forward hooks and forward pre-hooks."""
    return module._forward_hooks, module._forward_pre_hooks


def has_hooks(module: Any) -> bool:
    """Return True if a module has a hook of any kind."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_compiled(module: Any) -> bool:
    """Return True if `module.compile()` has been called."""
    return module._compiled_call_impl is not None


def version_of(tensor: torch.Tensor) -> int:
    """Return the number of in-place edits of a tensor and its views so far; edits through `.data` are not counted."""
    return tensor._version


# --- process groups ---------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """Return the key/value store of the default process group, where a failed rank leaves its reason."""
    return dist.distributed_c10d._get_default_store()


def abort_process_groups() -> None:
    """End collectives that run on the GPU and would wait for a failed rank for ever."""
    dist.distributed_c10d._abort_process_group()


# --- torch.compile ----------------------------------------------------------------------------------------------------------


def inductor_options() -> dict[str, Any]:
    """Return options of torch.compile for decode steps.

    Products of a single row are compiled and tuned when first met: on an H100 such kernels read weights at 2.6 to 3.1 TB/s,
    cuBLAS's at 2.0 to 2.8. If GPU and PyTorch can, a kernel is launched before the last one has ended and waits for it by
    itself, which saves 4% of a 7B step.
    """
    from torch._inductor import config

    early_launch = {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}
    return {"options": {"coordinate_descent_tuning": True} | early_launch}


def unlimited_recompiles() -> Any:
    """Return a context in which torch.compile accepts any number of shapes; by itself it gives up after eight."""
    config = torch._dynamo.config
    limits = ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit")
    return config.patch({name: 1 << 14 for name in limits if hasattr(config, name)})
