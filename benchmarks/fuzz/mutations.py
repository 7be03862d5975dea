"""Ways to damage a file: its bytes, and what it says in JSON, TOML, safetensors, zip and gzip."""

from __future__ import annotations

import copy
import gzip
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

#: Written into the text afterwards: ``json`` cannot nest so deep, and writes no half characters.
_DEEP, _HALF = "@deep@", "@half@"

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63), 10**30, 10**400, 0.0, -0.5,
    0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "0", "1", "head", "trady", "\0", "a" * 5000,
    "[/bold]", "../../etc/passwd", "$x$<y>", "🜁", _HALF, _DEEP, [], {}, [None], [0], [1, 2, 3], [-1], [[1]], [1 << 40],
    ["x"], {"x": 1}, {"": None}, [0] * 3000, {"channels": [0], "outputs": [0]},
)  # fmt: skip

_NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)

Mutation = Callable[[bytes, Random], bytes]


def bytes_of(content: bytes, random: Random) -> bytes:
    """Damage a file as a disk, a cable or an editor does."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(data) + 1)
        length = random.choice((1, 2, 4, 8, random.randrange(1, 64), random.randrange(1, len(data) + 2)))
        match random.randrange(10):
            case 0 if data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            case 1 if data:
                data[at % len(data)] = random.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = random.randbytes(length % 256)
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                data[at : at + length] = bytes(min(length, 256))
            case 7:
                size = random.choice((1, 2, 4, 8))
                number = random.choice(_NUMBERS) & ((1 << 8 * size) - 1)
                data[at : at + size] = number.to_bytes(size, random.choice(("little", "big")))
            case 8:
                other = random.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case _:
                data += random.randbytes(length % 256)
    return bytes(data)


def any_file(content: bytes, random: Random) -> bytes:
    """Put something else in its place."""
    return random.choice((b"", b"\0" * 64, b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"\xff\xfe", random.randbytes(99)))


def json_of(content: bytes, random: Random) -> bytes:
    """Change what a JSON file says, or, of JSON lines, one of the lines."""
    lines = content.splitlines()
    try:
        if len(lines) > 1 and lines[0].rstrip().endswith(b"}") and lines[0].lstrip().startswith(b"{"):
            at = random.randrange(len(lines))
            lines[at] = _text(changed(json.loads(lines[at]), random))
            if random.random() < 0.1:
                lines.insert(at, lines[random.randrange(len(lines))])
            return b"\n".join(lines) + b"\n"
        return _text(changed(json.loads(content), random))
    except ValueError:
        return bytes_of(content, random)


def changed(value: Any, random: Random) -> Any:
    """Return JSON values with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holder: Any = {"": value}
        at: Any = ""
        places = list(_places(value))
        if places and random.random() < 0.97:
            holder, at = random.choice(places)
        match random.randrange(9):
            case 0 if isinstance(holder, dict) and holder.get("") is not value:
                del holder[at]
            case 1 if isinstance(holder, dict):
                holder[at + random.choice(("s", " ", "\0"))] = holder.pop(at)
            case 2:
                other, there = random.choice(places or [(holder, at)])
                holder[at] = copy.deepcopy(other[there])
            case 3 if isinstance(holder[at], int | float):
                holder[at] = random.choice(
                    (-holder[at], holder[at] + 1, holder[at] * 10**6, str(holder[at]), [holder[at]])
                )
            case 4 if isinstance(holder[at], list) and holder[at]:
                holder[at] = random.choice((holder[at][1:], holder[at] * 2, holder[at][::-1], [*holder[at], None]))
            case 5 if isinstance(holder, list):
                holder.insert(at, copy.deepcopy(random.choice(_VALUES)))
            case _:
                holder[at] = copy.deepcopy(random.choice(_VALUES))
        if isinstance(holder, dict) and "" in holder and holder.keys() == {""}:
            value = holder[""]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    open_ = [value]
    while open_:
        holder = open_.pop()
        if isinstance(holder, dict):
            found += [(holder, key) for key in holder]
            open_ += holder.values()
        elif isinstance(holder, list):
            found += [(holder, at) for at in range(min(len(holder), 40))]
            open_ += holder[:40]
    return found


def _text(value: Any) -> bytes:
    text = json.dumps(value).replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000).replace(_DEEP, "").replace(_HALF, "\\ud800")
    return text.encode()


def toml_of(content: bytes, random: Random) -> bytes:
    """Change values, keys or lines of a TOML file."""
    lines = content.decode().splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(lines))
        match random.randrange(6):
            case 0:
                del lines[at : at + 1]
            case 1:
                lines.insert(at, random.choice(lines))
            case 2:
                lines[at] = lines[at].partition("=")[0] + "= " + _toml_value(random)
            case 3:
                key = random.choice(("x", '""', '"a.b"', "models", "seeds", "override"))
                lines[at] = re.sub(r"^\s*[\w-]+", key, lines[at])
            case 4:
                value = _toml_value(random)
                lines[at] = re.sub(r'"[^"]*"|\d+', value.replace("\\", r"\\"), lines[at], count=1)
            case _:
                lines.insert(at, f"{random.choice(('x', 'seeds', 'imports', 'policies'))} = {_toml_value(random)}")
        if not lines:
            lines = [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _toml_value(random: Random) -> str:
    return random.choice((
        "1", "-1", "0", "1e400", "nan", "inf", "9" * 400, "true", '""', '"x"', '"trady"', '"head"', '"peak:1 MiB"',
        '"elements:-1"', '"elements:1e99"', '"elements:' + "9" * 300 + '"', '"${HOME}"', '"${NO_SUCH_NAME}"', "[]",
        "[1]",
        '["x"]', "{}", "{x = 1}", '{x = "trady"}', "1979-05-27", "9999-99-99", "[" * 3000 + "]" * 3000, '"\\u0000"',
        '"' + "a" * 9999 + '"', '"a$b<c>"', '["trady", "trady"]', "[9223372036854775808]", "0x7fffffffffffffffffff",
    ))  # fmt: skip


def safetensors_of(content: bytes, random: Random) -> bytes:
    """Change the header of a safetensors file; its length is put right most of the time."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if random.random() < 0.3:
        data = bytes_of(data, random) if random.random() < 0.5 else random.randbytes(len(data))
    if random.random() < 0.85:
        header = _tensor_header(header, random)
    text = _text(header)
    said = len(text) if random.random() < 0.95 else random.choice(_NUMBERS)
    return struct.pack("<Q", said & ((1 << 64) - 1)) + text + data


def _tensor_header(header: dict[str, Any], random: Random) -> Any:
    names = [name for name in header if name != "__metadata__"]
    if not names or random.random() < 0.3:
        return changed(header, random)
    header, name = copy.deepcopy(header), random.choice(names)
    entry = header[name]
    match random.randrange(5):
        case 0:
            entry["dtype"] = random.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "C64", "F8_E4M3")
            )
        case 1:
            entry["shape"] = random.choice(
                ([], [1], [*entry["shape"], 1], entry["shape"][::-1], [0, *entry["shape"]], [1 << 40])
            )
        case 2:
            header[
                random.choice((name.replace("::", ":"), name + "::whole", name.partition("::")[0] + "::outputs"))
            ] = entry
            if random.random() < 0.8:
                del header[name]
        case 3:
            other = random.choice(names)
            header[name], header[other] = header[other], header[name]
        case _:
            del header[name]
    return header


def npz_of(content: bytes, random: Random) -> bytes:
    """Change arrays of an ``.npz`` file: their headers, their bytes, their names, and what the zip file says."""
    out = io.BytesIO()
    method = random.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", method) as target:
        parts = source.infolist()
        chosen = random.randrange(len(parts))
        for number, part in enumerate(parts):
            name, data = part.filename, source.read(part)
            if number == chosen and random.random() < 0.9:
                data = _npy(data, random)
            if number == chosen and random.random() < 0.1:
                name = random.choice(("x_train.npy", "y_train.npy", "classes.npy", "images", "../x.npy", "labels.npy"))
            if random.random() > 0.03:
                target.writestr(name, data)
    data = out.getvalue()
    if random.random() < 0.2:  # sizes in the directory
        at = data.find(b"PK\x01\x02")
        if at >= 0:
            place = at + random.choice((8, 10, 16, 20, 24, 28, 42))
            number = random.choice(_NUMBERS) & 0xFFFFFFFF
            data = data[:place] + struct.pack("<I", number) + data[place + 4 :]
    return data


def _npy(data: bytes, random: Random) -> bytes:
    length = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    match random.randrange(5):
        case 0:
            header = re.sub(r"\([^)]*\)", random.choice(_SHAPES), header)
        case 1:
            header = re.sub(r"'descr': '[^']*'", f"'descr': '{random.choice(_DTYPES)}'", header)
        case 2:
            return bytes_of(data, random)
        case 3:
            size = random.choice((1, 8, 1000, 1 << 16))
            body = random.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\xc8B")) * size
            if random.random() < 0.7:
                header = re.sub(r"\([^)]*\)", f"({len(body)},)", header)
                header = re.sub(r"'descr': '[^']*'", "'descr': '|u1'", header)
        case _:
            body = bytes_of(body, random)[: len(body)].ljust(len(body), b"\xff")
    header = header.rstrip() + " " * 8 + "\n"
    return data[:8] + struct.pack("<H", len(header)) + header.encode("latin1") + body


_SHAPES = (
    "()", "(0,)", "(1,)", "(12, 8, 8)", "(-1,)", "(1000000000000,)", "(12, 8, 8, 3)", "(4294967296, 4294967296)",
    "(12, 0, 8)",
    "(True,)", "(12, 1, 8, 8)", "(" * 99 + ")" * 99, "(1.5,)", "(12, 3, 4, 8, 2)",
)  # fmt: skip

_DTYPES = (
    "|u1", "|i1", "<i8", ">i8", "<u8", "<f4", "<f8", "<f2", "|b1", "<c16", "|O", "<U3", "|S3", "<M8[s]", "<m8[D]",
    "|V8", "<f16",
    "<U99999999", "x", "",
)  # fmt: skip


def gzip_of(content: bytes, random: Random) -> bytes:
    """Change what a gzipped file holds."""
    data = gzip.decompress(content)
    return gzip.compress(bytes_of(data, random) if random.random() < 0.9 else bytes(1 << 20), 1)


def image_of(content: bytes, random: Random) -> bytes:
    """Change the first bytes of an image, where its sizes and tables are; checksums of PNG are put right."""
    head = random.choice((32, 64, 200))
    data = bytes_of(content[:head], random) + content[head:]
    return _with_checksums(data) if data[:4] == b"\x89PNG" else data


def _with_checksums(data: bytes) -> bytes:
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out + data[at:])


#: By the ending of a file's name.
BY_ENDING: dict[str, tuple[Mutation, ...]] = {
    ".json": (json_of, json_of, json_of, json_of, bytes_of, any_file),
    ".jsonl": (json_of, json_of, json_of, bytes_of, any_file),
    ".toml": (toml_of, toml_of, toml_of, bytes_of, any_file),
    ".safetensors": (safetensors_of, safetensors_of, safetensors_of, bytes_of, any_file),
    ".npz": (npz_of, npz_of, npz_of, bytes_of, any_file),
    ".gz": (gzip_of, gzip_of, bytes_of, any_file),
}


def mutated(name: str, content: bytes, random: Random) -> bytes:
    """Damage a file in a way that its kind has."""
    ending = name[name.rfind(".") :]
    if ending in (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".ppm"):
        return random.choice((image_of, image_of, bytes_of, any_file))(content, random)
    mutation = random.choice(BY_ENDING.get(ending, (bytes_of, bytes_of, bytes_of, any_file)))
    try:
        return mutation(content, random)
    except (ValueError, struct.error):
        return bytes_of(content, random)
