#!/usr/bin/env python3
"""Makes layers.safetensors: torch.nn.MultiheadAttention in float64, its parameters, an input, the output y, and the gradients
of sum(y * upstream). usage: python make_layers.py (torch, safetensors)"""
import pathlib

import torch
from safetensors.torch import save_file

SIZE, HEADS, SHAPE = 12, 3, (2, 7, 12)


def drawn(generator, shape):
    """Exact in float32."""
    return torch.rand(shape, generator=generator, dtype=torch.float32).double() * 2 - 1


generator = torch.Generator().manual_seed(3)
layer = torch.nn.MultiheadAttention(SIZE, HEADS, batch_first=True, dtype=torch.float64)
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.copy_(drawn(generator, parameter.shape))
x, upstream = drawn(generator, SHAPE).requires_grad_(), drawn(generator, SHAPE)
y = layer(x, x, x, need_weights=False)[0]
(y * upstream).sum().backward()
tensors = {"x": x, "upstream": upstream, "y": y, "gradient.x": x.grad}
for name, parameter in layer.named_parameters():
    tensors[name] = parameter
    tensors["gradient." + name] = parameter.grad
path = pathlib.Path(__file__).with_name("layers.safetensors")
save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
path.chmod(0o644)
