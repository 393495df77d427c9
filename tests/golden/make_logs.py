"""Makes logs.safetensors: NPY files written by numpy.save, histograms by numpy.histogram, SHA-256 by hashlib.

python make_logs.py; ran with Python 3.11, numpy 2.4.6, safetensors 0.8.0.

npy/NAME          the bytes of the file                    (U8)
npy/NAME/values   its elements, in row-major order         (F64)
npy/NAME/info     size of an element, Fortran order, shape (I64)
written/NAME      what numpy.save makes of a plain array   (U8); its values and info likewise
histogram/N       values; /edges and /counts               (F64), N the number of bins before the slash
png/K             PNG files of rising length; png/K/sha256 (U8)
"""
import hashlib
import io
import pathlib
import struct
import zlib

import numpy as np
from numpy.lib import format as npy_format
from safetensors.numpy import save_file

random = np.random.default_rng(20261122)
out = {}


def put(name, array, data):
    shape = np.array([array.dtype.itemsize, np.isfortran(array), *array.shape], dtype=np.int64)
    out[name] = np.frombuffer(data, dtype=np.uint8)
    out[name + "/values"] = np.ascontiguousarray(array).reshape(-1).astype(np.float64)
    out[name + "/info"] = shape


def npy(array, version=None):
    file = io.BytesIO()
    if version:
        npy_format.write_array(file, array, version=version)
    else:
        np.save(file, array)
    return file.getvalue()


def values(dtype, *shape):
    if dtype[-2] == "f":
        return random.standard_normal(shape).astype(dtype)
    if dtype[-2] == "b":
        return random.integers(0, 2, shape).astype(dtype)
    limits = np.iinfo(dtype)
    native = np.dtype(dtype).newbyteorder("=")
    return random.integers(limits.min, limits.max, shape, dtype=native, endpoint=True).astype(dtype)


for dtype in ("<f4", "<f8", "<i8", "|u1", "|b1", "|i1", "<i2", "<i4", "<u2", "<u4", "<u8",
              ">f4", ">f8", ">i8", ">i2", ">u4"):
    array = values(dtype, 2, 3)
    put("npy/" + dtype, array, npy(array))
for rank, shape in enumerate([(), (5,), (3, 4), (2, 3, 4), (2, 2, 2, 2), (1, 2, 3, 1, 2, 1, 2, 1)]):
    put(f"npy/rank{rank}", values("<f4", *shape), b"")
    array = out[f"npy/rank{rank}/values"].astype("<f4").reshape(shape)
    put(f"npy/rank{rank}", array, npy(array))
    if len(shape) > 1:
        array = np.asfortranarray(values(">i2", *shape))
        put(f"npy/fortran{rank}", array, npy(array))
array = np.asfortranarray(values("<f8", 30, 20))
put("npy/fortran_long", array, npy(array))
for version in ((1, 0), (2, 0), (3, 0)):
    array = values("<i4", 3, 2)
    put(f"npy/version{version[0]}", array, npy(array, version))
put("npy/empty", np.zeros((0, 3), "<f8"), npy(np.zeros((0, 3), "<f8")))
extremes = np.array([np.iinfo("<i8").min, np.iinfo("<i8").max, -1, 0, 1, 2**53 + 1], "<i8")
put("npy/extremes", extremes, npy(extremes))
extremes = np.array([2**64 - 1, 2**63, 0, 1], "<u8")
put("npy/unsigned", extremes, npy(extremes))
special = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1.7976931348623157e308], "<f8")
put("npy/special", special, npy(special))

for dtype in ("<f4", "<f8", "<i8", "|u1"):
    for shape in ((), (7,), (12, 3), (2, 1, 2, 1, 2, 1, 2, 1), (0,), (123456 if dtype == "|u1" else 1234, 1)):
        if np.prod(shape) > 2000:
            continue
        array = values(dtype, *shape)
        put(f"written/{dtype}{len(shape)}_{int(np.prod(shape))}", array, npy(array))

samples = {
    "64/normal": random.standard_normal(1000), "64/whole": np.arange(65.0).repeat(3),
    "10/integers": random.integers(-5, 6, 500) * 1.0, "1/one": random.standard_normal(50),
    "512/many": random.exponential(size=1500), "7/small": random.standard_normal(100) * 1e-300,
    "30/equal": np.full(9, 3.25), "5/single": np.array([0.0]), "12/wide": np.array([-1e300, 1e300, 3.0, -2.0]),
    "100/tenths": np.arange(1000) / 10,
}
for name, sample in samples.items():
    counts, edges = np.histogram(sample, bins=int(name.split("/")[0]))
    out["histogram/" + name] = sample.astype(np.float64)
    out[f"histogram/{name}/edges"] = edges.astype(np.float64)
    out[f"histogram/{name}/counts"] = counts.astype(np.float64)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


for k in range(66):                     # all the places where the last block of SHA-256 may end
    colour = (0, 2, 3, 4, 6)[k % 5]
    width, height = 1 + k % 7, 1 + k % 3
    row = b"\0" + bytes(width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    png += chunk(b"PLTE", b"\1\2\3") if colour == 3 else b""
    png += chunk(b"IDAT", zlib.compress(row * height))
    want = 128 + k
    png += chunk(b"tEXt", b"k\0" + b"x" * (want - len(png) - 26)) + chunk(b"IEND", b"")
    assert len(png) == want
    out[f"png/{k}"] = np.frombuffer(png, np.uint8)
    out[f"png/{k}/sha256"] = np.frombuffer(hashlib.sha256(png).hexdigest().encode(), np.uint8)
    out[f"png/{k}/info"] = np.array([width, height, {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}[colour]], np.int64)

save_file(out, pathlib.Path(__file__).with_name("logs.safetensors"))
