"""Python binding of csrc/pack.c, which packs weights into blocks and quantizes them to int8 or int4."""

import ctypes
import functools
from ctypes import c_long, c_void_p

from .c_extension import CExtension, ExtensionStatus, load_extension, struct_fields


class PackArgs(ctypes.Structure):
    """The arguments of the C function `pack_weight`; csrc/pack.c describes the fields."""

    _fields_ = struct_fields((c_long, "format dtype"), (c_void_p, "rows weight scales"), (c_long, "group in_ width out next"))


@functools.cache
def status() -> ExtensionStatus:
    """Load the packing extension on the first call, and return it or the reason why it cannot be used."""
    return load_extension("pack", [PackArgs], {"pack_weight": [PackArgs]})


def extension() -> CExtension | None:
    """Return the packing extension, or None if this machine cannot use it."""
    return status().extension
