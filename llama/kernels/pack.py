"""Packing weights into blocks, in bfloat16, 8 or 4 bit, by csrc/pack.c."""

import ctypes
import functools
from ctypes import c_long, c_void_p

from .c_extension import CExtension, ExtensionStatus, load_extension, struct_fields


class PackArgs(ctypes.Structure):
    """pack.c explains it."""

    _fields_ = struct_fields((c_long, "kind numbers"), (c_void_p, "rows weight scales"), (c_long, "group in_ width out next"))


@functools.cache
def status() -> ExtensionStatus:
    """Load the extension once."""
    return load_extension("pack", [PackArgs], {"pack": [PackArgs]})


def extension() -> CExtension | None:
    return status().extension
