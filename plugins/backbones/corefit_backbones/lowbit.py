"""A frozen network whose large linear layers are held in fewer bits, for a LoRA to train on.

Which layers: every nn.Linear of the repeated blocks that diffusers' layerwise casting would cast, so no norm and no
modulation; embeddings and the last projection are outside of the blocks. Everything else stays as it was read, biases
included.

The formats are those of diffusers' backends, and a weight of a row depends on its row alone:

bf16  bfloat16
fp8   float8_e4m3fn without a scale, as diffusers' layerwise casting stores it
int8  a float32 scale for each row, as torchao's int8 weight-only quantization
nf4   4 bits by bitsandbytes, with a float32 scale for each 64 numbers (QLoRA, arXiv 2305.14314)

The layers are not those of the libraries, for three reasons. The layers of bitsandbytes multiply with another kernel
where no gradient is needed, so that a policy would not be the one that has made its rollouts. Layerwise casting keeps
every weight in bfloat16 from the forward to the backward. And these are plain tensors whose rows can be sharded, read
one at a time, and counted on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn

from corefit.errors import ModelError

MISSING = "frozen = 'nf4' needs the package bitsandbytes: pip install 'corefit[lowbit]'"
BLOCK = 64
"""Numbers of a row that share a scale in nf4."""
HALF_RANGE = 127.5
"""Half the distance from -128 to 127 that the numbers of a row are scaled to, as torchao does."""
SMALLEST = 1e-30
"""A scale that is never divided by less: a row of zeros has the scale 0."""
Packed = Mapping[str, Tensor]
"""The tensors of a weight in fewer bits: "weight", and "scale" where the format has one."""


class LowBitLinear(nn.Linear):
    """A linear layer that never trains. Its weight is unpacked for each product, in the forward and in the backward.

    weight  the packed weight [out_features, ...], in bfloat16 for any format: see `shapes`; text encoders' are in int8
    scale   float32 [out_features, ...], None for fp8 and bf16
    """

    scale: nn.Parameter | None

    def __init__(self, linear: nn.Linear, bits: str) -> None:
        """Take the shape, the bias and the device of `linear`; the packed weight has no values yet."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        made = {
            name: nn.Parameter(torch.empty(shape, dtype=dtype, device=linear.weight.device), requires_grad=False)
            for name, (shape, dtype) in shapes(linear.out_features, linear.in_features, bits).items()
        }
        self.weight = made["weight"]
        self.register_parameter("scale", made.get("scale"))
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        """The product in the dtype of autocast, or else in that of `input` [..., in_features]."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        bias = self.bias.to(dtype) if isinstance(self.bias, Tensor) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        return _Product.apply(input.to(dtype), self.weight, self.scale, bias, self.in_features, self.bits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """x W^T + bias with a packed W, which is all that is kept for the backward; only x has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, columns: int, bits: str
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.columns, ctx.bits = columns, bits
        return nn.functional.linear(x, unpack(weight, scale, columns, bits, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ unpack(weight, scale, ctx.columns, ctx.bits, grad.dtype), None, None, None, None, None


def shapes(rows: int, columns: int, bits: str) -> Mapping[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of the packed tensors of a weight [rows, columns]; a row of bytes is held as bfloat16.

    FSDP2 shards floating point only, and gloo sends no float8; bfloat16 both know, and nothing computes with it.
    """
    if bits == "bf16":
        return {"weight": ((rows, columns), torch.bfloat16)}
    if bits == "nf4":
        blocks = -(-columns // BLOCK)
        return {"weight": ((rows, blocks * BLOCK // 4), torch.bfloat16), "scale": ((rows, blocks), torch.float32)}
    weight = (rows, -(-columns // 2)), torch.bfloat16
    return {"weight": weight} if bits == "fp8" else {"weight": weight, "scale": ((rows, 1), torch.float32)}


def pack(weight: Tensor, bits: str) -> Packed:
    """Round a weight [rows, columns] to the format `bits`."""
    if bits == "bf16":
        return {"weight": weight.to(torch.bfloat16)}
    if bits == "fp8":
        return {"weight": _held(weight.to(torch.float8_e4m3fn).view(torch.uint8))}
    if bits == "int8":
        exact = weight.float()
        scale = exact.abs().amax(1, keepdim=True) / HALF_RANGE
        whole = (exact * (1 / scale.clamp(min=SMALLEST))).round().clamp(-128, 127).to(torch.int8)
        return {"weight": _held(whole.view(torch.uint8)), "scale": scale}
    return _pack_nf4(weight)


def _held(data: Tensor) -> Tensor:
    """Bytes [rows, columns] as bfloat16, with one more byte where their number is odd."""
    return nn.functional.pad(data, (0, data.shape[1] % 2)).view(torch.bfloat16)


def _pack_nf4(weight: Tensor) -> Packed:
    """Quantize each row by itself, filled up with zeros to whole blocks."""
    functional = _bitsandbytes()
    rows, columns = weight.shape
    wanted = shapes(rows, columns, "nf4")
    if not rows:
        return {name: weight.new_empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    filled = nn.functional.pad(weight, (0, -columns % BLOCK)).contiguous()
    packed, state = functional.quantize_4bit(filled, blocksize=BLOCK, quant_type="nf4")
    return {
        "weight": packed.view(rows, -1).view(torch.bfloat16),
        "scale": state.absmax.float().view(wanted["scale"][0]),
    }


def _bitsandbytes() -> Any:
    """The functions of bitsandbytes, which also defines its ops; ModelError if it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as e:
        raise ModelError(MISSING) from e
    return functional


def unpack(weight: Tensor, scale: Tensor | None, columns: int, bits: str, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in `dtype`, of what `pack` has made."""
    if bits == "bf16":
        return weight.to(dtype)
    if bits == "fp8":
        return weight.view(torch.float8_e4m3fn)[:, :columns].to(dtype)
    assert scale is not None
    if bits == "int8":
        return (weight.view(torch.int8)[:, :columns].float() * scale).to(dtype)
    data = weight.view(torch.uint8)
    # the op and not bitsandbytes' function of the same name: torch.compile and fake tensors know it
    made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        data.reshape(-1, 1), scale.reshape(-1), BLOCK, "nf4", (len(data), 2 * data.shape[1]), dtype
    )
    return made[:, :columns]


def swap(network: Any, bits: str) -> None:
    """Replace the large linear layers by those that hold fewer bits, without values; ModelError if there are none."""
    if bits == "nf4":
        _bitsandbytes()
    found = list(_chosen(network))
    if not found:
        raise ModelError(f"frozen = {bits!r}: {type(network).__name__} has no blocks whose layers are known; remove it")
    for name, linear in found:
        owner, _, own = name.rpartition(".")
        setattr(network.get_submodule(owner), own, LowBitLinear(linear, bits))


def _chosen(network: Any) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the linear layers of the blocks that diffusers' layerwise casting does not leave out."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    left_out = (*DEFAULT_SKIP_MODULES_PATTERN, *(network._skip_layerwise_casting_patterns or ()))
    blocks = [name for name, m in network.named_modules() if type(m).__name__ in (network._no_split_modules or ())]
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if inside and type(module) is nn.Linear and not any(re.search(each, name) for each in left_out):
            yield name, module


def layers(network: Any) -> Iterator[tuple[str, LowBitLinear]]:
    """(name, layer) of the layers that `swap` has made; a LoRA may be on them."""
    for name, module in network.named_modules():
        if isinstance(module, LowBitLinear):
            yield name.removesuffix(".base_layer"), module


def original_shapes(network: Any) -> dict[str, list[int]]:
    """Name -> shape of the tensors that the files of `network` must hold, without a LoRA's."""
    held = {name: list(t.shape) for name, t in network.state_dict().items() if ".lora_" not in name}
    held = {name.replace(".base_layer.", "."): shape for name, shape in held.items()}
    for name, layer in layers(network):
        held.pop(f"{name}.scale", None)
        held[f"{name}.weight"] = [layer.out_features, layer.in_features]
    return held


@define(eq=False)
class _Layer:
    """A weight in the files, and its packed tensors for the rows that were asked for last.

    source  what reads rows of the weight
    dtype   the dtype that the weight is read in before it is packed
    device  where it is packed
    """

    source: Any
    bits: str
    dtype: torch.dtype
    device: torch.device
    _last: tuple[Any, dict[str, Tensor]] | None = field(init=False, default=None)

    def take(self, part: str, rows: Any) -> Tensor:
        """Rows of a packed tensor. Weight and scale are packed together, and each is handed out once."""
        if self._last is None or self._last[0] != rows or part not in self._last[1]:
            read = self.source[rows].to(self.device).to(self.dtype)
            self._last = rows, dict(pack(read, self.bits))
        return self._last[1].pop(part)


@define(eq=False)
class _Part:
    """A packed tensor, read as those of the files are: `part[rows]`."""

    layer: _Layer
    part: str

    def __getitem__(self, rows: Any) -> Tensor:
        return self.layer.take(self.part, rows)


def packed(network: Any, stored: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """The tensors of the files as `network`, whose layers `swap` has replaced, holds them: packed when they are read.

    A row of a packed tensor is made of that row of the weight alone, so that shards can be read. A GPU packs what will
    wait in main memory, too: nf4 of a billion numbers takes a CPU core four minutes.
    """
    found, device = dict(stored), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, layer in layers(network):
        source = _Layer(stored[f"{name}.weight"], layer.bits, dtype, device)
        found |= {f"{name}.{part}": _Part(source, part) for part in shapes(1, 1, layer.bits)}
    return found


def fill(network: nn.Module, stored: Mapping[str, Any], device: torch.device) -> None:
    """Read every tensor of a network on the meta device to `device`, one at a time."""
    for prefix, module in network.named_modules():
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{prefix}.{own}".strip(".")
            if name in stored:  # not a buffer that the network computes itself
                value = stored[name][...].to(device, tensor.dtype)
                setattr(module, own, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)
