"""Make hostile shards: pickles that would run code or never end, inconsistent zip files, decompression bombs."""

import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .hostile import FIRST, BrokenPromise, Edit, answer, build, edited, sound, temporary_folder, write_case


def resealed(data: bytes, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a shard with each zip record replaced by `change(name, record)`, or left out if `change` returns None.

    The checksums of the new records are correct.
    """
    path = temporary_folder() / "resealed.zip"
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            record = change(name, old.read(name))
            if record is not None:
                new.writestr(name, record)
    return path.read_bytes()


def canary() -> Path:
    """Return the path that hostile pickles create if their code runs."""
    return temporary_folder() / "canary"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode("utf-8", "surrogatepass"))) + text.encode("utf-8", "surrogatepass")


FRAGMENTS: dict[str, Callable[[], bytes]] = {
    "system": lambda: b"cos\nsystem\n" + _text(f"mkdir {canary()}") + b"\x85R",
    "mkdir": lambda: b"cposix\nmkdir\n" + _text(str(canary())) + b"\x85R",
    "eval": lambda: b"cbuiltins\neval\n" + _text(f"__import__('os').mkdir({str(canary())!r})") + b"\x85R",
    "exec": lambda: b"(" + _text(f"import os; os.mkdir({str(canary())!r})") + b"ibuiltins\nexec\n",
    "obj": lambda: b"(cos\nmkdir\n" + _text(str(canary())) + b"o",
    "newobj": lambda: b"cos\nmkdir\n" + _text(str(canary())) + b"\x85\x81",
    "stack global": lambda: _text("os") + _text("mkdir") + b"\x93" + _text(str(canary())) + b"\x85R",
    "attribute": lambda: b"ctorch.utils.data\nos.mkdir\n" + _text(str(canary())) + b"\x85R",
    "torch os": lambda: b"ctorch.serialization\nos\n" + _text(str(canary())) + b"\x85R",
    "torch load": lambda: b"ctorch\nload\n" + _text(str(canary())) + b"\x85R",
    "torch hub": lambda: b"ctorch.hub\nload_state_dict_from_file\n" + _text(str(canary())) + b"\x85R",
    "extension": lambda: b"\x82\x01",
    "bytearray": lambda: b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "bytearray8": lambda: b"\x96" + struct.pack("<Q", 1 << 40),
    "bytes8": lambda: b"\x8e" + struct.pack("<Q", 1 << 40),
    "unicode": lambda: b"X\xff\xff\xff\x7f",
    "memo bomb": lambda: b"r\xff\xff\xff\x7f",
    "long4": lambda: b"\x8b\xff\xff\xff\x7f",
    "digits": lambda: b"I" + b"9" * 100_000 + b"\n",
    "frame": lambda: b"\x95" + struct.pack("<Q", 1 << 62),
    "laughs": lambda: b")" + b"q\x00h\x00h\x00\x87" * 200,
    "laughs hashed": lambda: b"})" + b"q\x00h\x00h\x00\x87" * 200 + b"Ns",
    "laughs called": lambda: b")" + b"q\x00h\x00h\x00\x87" * 17 + b"NR",  # the repr of this nested tuple takes 390 MB
    "long pid": lambda: b"(" + b"N" * 240_000 + b"tq\x00" + b"h\x00Q" * 90_000,
    "long arguments": lambda: b"(" + b"N" * 240_000 + b"tq\x00ctorch\nx\nq\x01" + b"h\x01h\x00R" * 50_000,
    "colliding keys": lambda: (
        b"}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 20_000))
        + b"\x8a\x0a" + (20_000 * (2**61 - 1)).to_bytes(10, "little") + b"q\x00N" + b"h\x00N" * 80_000 + b"u"
    ),
    "keys on one probe sequence": lambda: (  # a lookup of the last key visits 43,600 of the dict's 65,536 slots
        b"}(" + b"".join(b"M" + k.to_bytes(2, "little") + b"N" for k in itertools.islice(_probe_sequence(), 43_600))
        + b"J" + (13_369_344).to_bytes(4, "little") + b"q\x00N" + b"h\x00N" * 110_000 + b"u"
    ),
    "laughs in a storage": lambda: b")" + b"q\x00h\x00h\x00\x87" * 200 + b"Q",
    "laughs in a tensor": lambda: b"ctorch._utils\n_rebuild_tensor_v2\n)" + b"q\x00h\x00h\x00\x87" * 200 + b"\x85R",
    "deep": lambda: b"]" * 50_000 + b"a" * 49_999,
    "tuples": lambda: b")" + b"\x85" * 200_000,
    "marks": lambda: b"(" * 100_000,
    "dicts": lambda: b"}" * 100_000,
    "self": lambda: b"]q\x00h\x00a",
    "self key": lambda: b"}q\x00h\x00h\x00s",
    "huge tensor": lambda: _tensor_of(4, (1 << 40, 1 << 40), (1 << 40, 1)),
    "stride 0": lambda: _tensor_of(4, (1 << 40, 1 << 40), (0, 0)),
    "negative": lambda: _tensor_of(4, (2, 2), (-1, 1)),
    "beyond": lambda: _tensor_of(1 << 40, (1 << 40,), (1,)),
    "other record": lambda: _tensor_of(4, (4,), (1,), "../data.pkl"),
    "dimensions": lambda: _tensor_of(4, (1,) * 200, (1,) * 200),
    "build": lambda: b"ctorch._utils\n_rebuild_tensor_v2\n" + b"}" + _text("__code__") + b"Nsb",
    "dtype": lambda: b"ctorch\nfloat32\n", "print": lambda: b"ctorch._utils\nprint\n)R",
    "none": lambda: b"N", "dict": lambda: b"}", "name": lambda: _text("tok_embeddings.weight"), "set": lambda: b"s",
    "pop": lambda: b"0", "dup": lambda: b"2", "tuple": lambda: b"\x86", "reduce": lambda: b"R", "mark": lambda: b"(",
    "items": lambda: b"u", "surrogate": lambda: b"}X\x03\x00\x00\x00\xed\xa0\x80Ns",
    "long name": lambda: b"}" + _text("x" * 500_000) + b"Ns",
}  # fmt: skip


def _probe_sequence() -> Iterator[int]:
    """Yield the slots of a dict with 65,536 slots in the order in which a lookup that starts at slot 0 probes them."""
    slot = 0
    while True:
        yield slot
        slot = (5 * slot + 1) % 65536


def _tensor_of(numel: int, size: tuple[int, ...], stride: tuple[int, ...], record: str = "0") -> bytes:
    """Return the pickle opcodes that make a tensor of this size and stride, without a pickle's header and final opcode."""

    def number(n: int) -> bytes:
        return b"\x8a\x08" + n.to_bytes(8, "little", signed=True)

    storage = b"(" + _text("storage") + b"ctorch\nBFloat16Storage\n" + _text(record) + _text("cpu") + number(numel) + b"tQ"
    sizes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + b"".join(sizes) + b"\x89NtR"


def play_pickle(parts: Sequence[str], edits: Sequence[Edit], inside: bool) -> None:
    """Build a model from a shard whose data.pkl consists of the named FRAGMENTS and has a correct checksum.

    If `inside` is true, the fragments are inserted at the start of a sound data.pkl. Then the edits are applied.
    """
    program = b"".join(FRAGMENTS[part]() for part in parts)

    def change(name: str, record: bytes) -> bytes:
        if not name.endswith("/data.pkl"):
            return record
        return edited(record[:2] + program + record[2:] if inside else b"\x80\x02" + program + b"." if parts else record, edits)

    _build_and_answer(resealed(sound("one")[FIRST], change))


ZIPS = ["deflated", "stored", "bomb", "pickle bomb", "missing", "longer", "shorter", "sizes", "overlap", "zip64", "twice",
        "before", "members"]  # fmt: skip


def play_zip(form: str, n: int, edits: Sequence[Edit]) -> None:
    """Build a model from a shard that is an unusual, inconsistent or bomb-like zip file."""
    data = sound("one")[FIRST]
    zeros = bytes(1 << 25)
    if form == "deflated":
        data = resealed(data, lambda _, record: record, zipfile.ZIP_DEFLATED)
    elif form == "stored":
        data = resealed(data, lambda _, record: record)
    elif form == "bomb":
        data = resealed(data, lambda name, record: zeros if name.endswith(f"data/{n % 8}") else record, zipfile.ZIP_DEFLATED)
    elif form == "pickle bomb":
        data = resealed(data, lambda name, record: zeros if name.endswith("data.pkl") else record, zipfile.ZIP_DEFLATED)
    elif form == "missing":
        data = resealed(data, lambda name, record: None if zlib.crc32(name.encode()) % 7 == n % 7 else record)
    elif form in ("longer", "shorter"):
        data = resealed(data, lambda name, record: _resized(record, form, n) if name.endswith(f"data/{n % 8}") else record)
    elif form == "sizes":  # wrong sizes in every third entry of the zip file's directory
        data = bytearray(data)
        for position in _find_all(bytes(data), b"PK\x01\x02")[n % 3 :: 3]:
            struct.pack_into("<II", data, position + 20, *([0xFFFFFFF0 - n % 9] * 2))
    elif form == "overlap":  # all entries of the zip file's directory point to one record
        data = bytearray(data)
        for position in _find_all(bytes(data), b"PK\x01\x02")[n % 5 :]:
            struct.pack_into("<I", data, position + 42, 0)
    elif form == "zip64":
        data = bytearray(data)
        position = bytes(data).rindex(b"PK\x05\x06")
        data[position:position] = (
            b"PK\x06\x06"
            + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1 << n % 64, 1 << n % 64, 1 << n % 60, n)
            + (b"PK\x06\x07" + struct.pack("<IQI", 0, position, 1))
        )
    elif form == "twice":
        data = bytes(data) + bytes(data)
    elif form == "before":
        data = b"PK\x03\x04" + bytes(n % 4096) + bytes(data)
    elif form == "members":
        path = temporary_folder() / "members.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(n % 3000):
                archive.writestr(f"archive/data/{i}", b"")
        data = path.read_bytes()
    _build_and_answer(edited(bytes(data), edits))


def _resized(record: bytes, form: str, n: int) -> bytes:
    return record + bytes(n % 999) if form == "longer" else record[: max(len(record) - 1 - n % 99, 0)]


def _find_all(data: bytes, pattern: bytes) -> list[int]:
    return [i for i in range(len(data)) if data.startswith(pattern, i)]


def _build_and_answer(shard: bytes) -> None:
    folder = write_case("one", sound("one") | {FIRST: shard})
    llama = build(folder)
    if not all(weight.isfinite().all() for weight in llama.model.state_dict().values()):
        raise BrokenPromise("values that are not finite were loaded")
    answer(llama)
