"""Makes files.safetensors with the reference implementation: python files.py (numpy, safetensors)."""
import pathlib

import numpy as np
from safetensors.numpy import save_file

tensors = {
    "decoder.weight": np.arange(-6, 6, dtype=np.float32).reshape(3, 4) / 4,
    "encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 1, 3) * 0.5,
    "scalar": np.array(-1.5, dtype=np.float64),
    "steps": np.array([-1, 2**62, 7], dtype=np.int64),
    "empty": np.zeros((2, 0), dtype=np.float64),
    "bytes": np.arange(250, 255, dtype=np.uint8),
    "gr\u00fc\u00dfe \"quoted\" \\ \U0001f600": np.array([1.25], dtype=np.float32),
}
path = pathlib.Path(__file__).with_name("files.safetensors")
save_file(tensors, path, metadata={"format": "pt"})
