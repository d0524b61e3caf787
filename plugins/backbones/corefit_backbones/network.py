"""A transformer and its LoRA: how they are read, set up and saved. A file that cannot be used is a ModelError."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError, near
from corefit_backbones import parts
from corefit_backbones.folder import Checkpoint, Settings

if TYPE_CHECKING:
    import torch

LORA_FILE = "pytorch_lora_weights.safetensors"
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # unqualified: SD3.5-medium has them in attn2 as well
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
"""Modules that a LoRA adapts by default: the projections of attention, for image and text."""
MASK = "attention_mask"
FORWARD_ONLY = re.compile("_?sage.*|_flash_3")
"""Attention backends of diffusers 0.39 that have no backward; sage's stop the gradient without an error."""
GRAPHS = 64
"""Graphs of a class of blocks: SD3.5-medium has 3 kinds of block, with and without a graph, of one row and of more."""
SHARD = 10**9
"""Largest weight file in bytes, and so the main memory needed to save a model whose weights are sharded."""


def lora_file(part: str) -> str:
    """File name of the LoRA for the network in folder `part`; diffusers loads Wan's second one separately."""
    return LORA_FILE if part == "transformer" else LORA_FILE.replace(".", f".{part}.", 1)


def read(kind: Any, checkpoint: Checkpoint, part: str, dtype: torch.dtype) -> Any:
    """The model of class `kind` in the folder `part`, converted to `dtype`; errors as in `parts.read`.

    If its weights are in another file, they are read from there.
    """
    if checkpoint.replaces(part):
        return _read_single(kind, checkpoint, part, dtype)
    return parts.read(kind, checkpoint.folder / part, dtype, checkpoint.variant)


def _read_single(kind: Any, checkpoint: Checkpoint, part: str, dtype: torch.dtype) -> Any:
    import torch

    from corefit_backbones import lowbit

    made = empty(kind, checkpoint.config(part), dtype)
    with stored(checkpoint, part, made) as found:
        lowbit.fill(made, found, torch.device("cpu"))
    return made.requires_grad_(True)


def read_as(
    kind: Any, checkpoint: Checkpoint, part: str, dtype: torch.dtype, bits: str | None, device: torch.device
) -> Any:
    """Do what `read` does, or read onto `device`, with the large layers in the format `bits` of the module lowbit.

    One tensor at a time is packed then, so that neither main memory nor the device holds the network as it is in the
    files.
    """
    if bits is None:
        return read(kind, checkpoint, part, dtype)
    from corefit_backbones import lowbit

    made = empty(kind, checkpoint.config(part), dtype)
    with stored(checkpoint, part, made) as found:
        lowbit.swap(made, bits)
        lowbit.fill(made, lowbit.packed(made, found, dtype), device)
    return made


def packing(network: Any, bits: str | None) -> Any:
    """Give a network without weights the layers of the format `bits`, if there is one, and return it."""
    if bits is not None:
        from corefit_backbones import lowbit

        lowbit.swap(network, bits)
    return network


def check_format(bits: str | None) -> None:
    """Raise a ModelError if the package that a format of frozen weights needs is not installed."""
    if bits == "nf4" and find_spec("bitsandbytes") is None:
        raise ModelError("frozen = 'nf4' needs the package bitsandbytes: pip install 'corefit[lowbit]'")


def blank(kind: Any, config: Settings, dtype: torch.dtype) -> Any:
    """A network of class `kind` on the meta device, its parameters in `dtype`."""
    import torch

    with torch.device("meta"):
        return _made(kind, config, dtype)


def empty(kind: Any, config: Settings, dtype: torch.dtype) -> Any:
    """A network with the dtypes that `read` gives it, its parameters on the meta device, its buffers on the CPU."""
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = _made(kind, config, dtype)
    exact = set(kind._keep_in_fp32_modules or ())
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
    return network.eval()


def _made(kind: Any, config: Settings, dtype: torch.dtype) -> Any:
    """A network of class `kind`, made while `dtype` is torch's default, as from_pretrained does."""
    import torch

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parts.described(kind, config.file):
            return kind.from_config(dict(config))
    finally:
        torch.set_default_dtype(usual)


@contextmanager
def stored(checkpoint: Checkpoint, part: str, network: Any) -> Generator[Mapping[str, Any]]:
    """A context with the tensors in the weight files of `part`, by name; a slice is read when indexed.

    ModelError for damaged files, and unless they hold exactly the tensors of `network`, in their shapes.
    """
    with _opened(checkpoint, part, network) as found:
        check_stored(network, found, checkpoint.weights(part))
        yield found


@contextmanager
def _opened(checkpoint: Checkpoint, part: str, network: Any) -> Generator[Mapping[str, Any]]:
    """A context with the tensors in the weight files of `part`, by the names of `network`."""
    from safetensors import safe_open

    from corefit_backbones import lowbit

    if checkpoint.single and checkpoint.replaces(part):
        layers = checkpoint.config(part)["num_layers"]
        with checkpoint.single.stored(layers, lowbit.original_shapes(network)) as found:
            yield found
        return
    folder = checkpoint.folder / part
    with ExitStack() as opened:
        with parts.reading(folder):
            files = [opened.enter_context(safe_open(file, "pt")) for file in _weight_files(folder, checkpoint.variant)]
        yield {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118


def _weight_files(folder: Path, variant: str | None) -> Sequence[Path]:
    """The files that diffusers reads a model's weights from: a single file, or those named in an index."""
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

    index, one = (folder / _of_variant(name, variant) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME))
    if not index.is_file():
        return [one]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _of_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def check_stored(network: Any, found: Mapping[str, Any], files: Path) -> None:
    """Raise a ModelError unless `files` hold exactly the tensors of `network`, in their shapes."""
    from corefit_backbones import lowbit

    wanted = lowbit.original_shapes(network)
    ignored = network._keys_to_ignore_on_load_unexpected or ()
    wrong = [
        *(f"lack {name}" for name in wanted if name not in found),
        *(f"have {name} too" for name in found if name not in wanted and not any(re.search(i, name) for i in ignored)),
        *(
            f"have {name} as {found[name].get_shape()}, not {wanted[name]}"
            for name in wanted
            if name in found and found[name].get_shape() != wanted[name]
        ),
    ]
    if wrong:
        what = "folder" if files.is_dir() else "file"
        raise ModelError(f"{files}: the weights {', '.join(wrong[:5])}; the {what} is damaged, or of another model")


def packed(network: Any, found: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """The tensors of the files as the network holds them, which is in fewer bits where it has such layers."""
    from corefit_backbones import lowbit

    return lowbit.packed(network, found, dtype)


def save_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors as diffusers reads them: one file, or several with an index if they exceed SHARD bytes.

    At most SHARD bytes are in main memory at a time, or one tensor if that is larger.
    """
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME

    folder.mkdir(parents=True, exist_ok=True)
    sizes = [_write(folder / f"{n}.part", piece) for n, piece in enumerate(_pieces(tensors, SHARD))]
    if len(sizes) == 1:
        (folder / "0.part").rename(folder / SAFETENSORS_WEIGHTS_NAME)
        return
    where: dict[str, str] = {}
    for n, piece in enumerate(sizes):
        name = SAFETENSORS_WEIGHTS_NAME.replace(".", f"-{n + 1:05d}-of-{len(sizes):05d}.")
        (folder / f"{n}.part").rename(folder / name)
        where |= dict.fromkeys(piece, name)
    index = {"metadata": {"total_size": sum(sum(piece.values()) for piece in sizes)}, "weight_map": where}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _pieces(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors on the CPU, in groups of at most `limit` bytes, or of one larger tensor."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > limit:
            yield held
            held = {}
        held[name] = tensor.detach().cpu().contiguous()
    yield held


def _write(file: Path, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, int]:
    """Write one safetensors file, and return the size of each tensor in bytes."""
    from safetensors.torch import save_file

    save_file(dict(tensors), file, {"format": "pt"})
    return {name: t.nbytes for name, t in tensors.items()}


def compile_blocks(transformer: Any) -> None:
    """Compile each block of the outermost ModuleLists in place, so that names and wrappers stay as they are.

    Shapes are dynamic from the start, so another bucket or another number of rows compiles nothing; one row, and a
    forward without a graph, do. All blocks of a class share torch's limit, beyond which it no longer compiles and says
    so in a warning alone.
    """
    from torch import _dynamo, nn

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, GRAPHS)
    lists = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.ModuleList)}
    for name, blocks in lists.items():
        if not any(name.startswith(f"{other}.") for other in lists):
            for block in blocks:
                block.compile(dynamic=True)


def recompute(transformer: Any) -> None:
    """Turn on gradient checkpointing for the blocks that diffusers supports it for.

    With checkpointing, diffusers 0.39 calls Chroma's single blocks without the attention mask, so the network that is
    trained would differ from the one that samples. Blocks that take a mask and get none are given the forward's mask.
    """
    from torch.utils.checkpoint import checkpoint

    masks: dict[str, Any] = {}

    def remember(_: Any, args: tuple[Any, ...], keys: Mapping[str, Any]) -> None:
        masks[MASK] = keys.get(MASK)

    def call(block: Any, *args: Any) -> Any:
        unfilled = list(signature(block.forward).parameters)[len(args) :]
        # the mask is an argument of checkpoint: by the time of backward, `masks` may hold another forward's
        return checkpoint(block, *args, use_reentrant=False, **(masks if MASK in unfilled else {}))

    transformer.register_forward_pre_hook(remember, with_kwargs=True)
    transformer.enable_gradient_checkpointing(call)


def set_attention(transformer: Any, backend: str) -> None:
    """Let diffusers compute attention with `backend` in this network only.

    ModelError for an unknown name, a backend whose package is missing or that has no backward, and a network whose
    attention does not go through diffusers' dispatcher, where the key would have no effect.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    setting, known = f"attention = {backend!r}", sorted(name.value for name in AttentionBackendName)
    if backend not in known:
        raise ModelError(f"{setting} is not one of {', '.join(known)}{near(backend, known)}")
    if FORWARD_ONLY.fullmatch(backend):
        raise ModelError(f"{setting} cannot train: it has no backward, so the layers before it would get no gradient")
    if not dispatches(transformer):
        raise ModelError(f"{setting} would have no effect: diffusers computes this family's attention with torch only")
    try:
        with attention_backend():  # without it, other networks of this process would change as well
            transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as e:
        raise ModelError(f"{setting} cannot be used here: {e}") from e


def dispatches(transformer: Any) -> bool:
    """Whether the network's attention goes through diffusers' dispatcher of backends."""
    return any(hasattr(getattr(m, "processor", None), "_attention_backend") for m in transformer.modules())


def unwrapped(transformer: Any) -> Any:
    """The model inside the wrappers of DDP and torch.compile."""
    while (inner := getattr(transformer, "module", getattr(transformer, "_orig_mod", None))) is not None:
        transformer = inner
    return transformer


def exact_time(transformer: Any) -> Any:
    """Make `transformer` embed its timestep and guidance in float32, and return it.

    diffusers' networks of FLUX and Chroma round both to their own dtype before they multiply them by 1000: in bfloat16
    the timestep 997.1 becomes 996, and the sample is denoised as if it had another noise level. Hooks replace the
    rounded values, which are the first arguments of `time_text_embed`.

    This is only for networks that take sigma in [0, 1] and multiply it by 1000. SD3 and Wan take 1000 sigma, and would
    embed a level 1000 times too large.
    """
    given, rounded = list[Any](), list[Any]()

    def remember(_: Any, args: tuple[Any, ...], keys: Mapping[str, Any]) -> None:
        given[:] = [1000 * keys[name].float() for name in ("timestep", "guidance") if keys.get(name) is not None]

    def replace(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rounded[:] = args[: len(given)]
        return (*given, *args[len(given) :])

    def cast(_: Any, args: tuple[Any, ...], embedded: Any) -> Any:
        return embedded.to(rounded[0].dtype)  # Chroma's embedding has its input's dtype, which is now float32

    transformer.register_forward_pre_hook(remember, with_kwargs=True)
    transformer.time_text_embed.register_forward_pre_hook(replace)
    transformer.time_text_embed.register_forward_hook(cast)
    return transformer


def has_lora(transformer: Any) -> bool:
    """Whether the (unwrapped) transformer has adapters."""
    return bool(getattr(transformer, "peft_config", None))


def save_lora(
    pipeline: Any,
    transformer: Any,
    weights: Mapping[str, Any],
    folder: Path,
    name: str = LORA_FILE,
    named: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> None:
    """Write the adapter "default", with rank and alpha, so that `pipeline.load_lora_weights(folder)` reads it.

    weights  the adapter's tensors, by their names in `transformer.state_dict()`
    named    renames weights from diffusers' names to those in the file
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = {f"transformer.{k}": v for k, v in _settings(transformer.peft_config["default"]).items()}
    # one entry only: safetensors writes several in random order, and equal adapters should be equal files
    metadata = {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, dict(weights), adapter_name="default"),
        weight_name=name,
        save_function=lambda weights, file: save_file(dict(named(weights)), file, metadata),
    )


def _settings(config: Any) -> Mapping[str, Any]:
    """What peft needs to rebuild `config`, as JSON. Defaults are left out: other versions may not know them."""
    from peft import LoraConfig

    needed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    default = LoraConfig().to_dict()
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name in needed or value != default.get(name)
    }


def load_lora(pipeline: Any, transformer: Any, folder: Path, name: str = LORA_FILE) -> None:
    """Add what `save_lora` wrote as the adapter "default": trainable, in float32, all else frozen.

    ModelError if the file is missing, damaged, without rank and alpha, or made for another model.
    """
    file = folder / name
    if not file.is_file():
        raise ModelError(f"{folder}: no {name}")
    with parts.reading(folder):
        weights, settings = pipeline.lora_state_dict(
            folder, weight_name=name, use_safetensors=True, return_lora_metadata=True
        )
    if not settings:
        raise ModelError(f"{file}: its metadata has no rank and alpha; save it again with diffusers >= 0.35")
    try:
        unused = _attach(transformer, _within(weights), _within(settings))
    except (ValueError, RuntimeError) as e:
        raise ModelError(f"{file}: made for another model: {e}") from e
    if unused:
        raise ModelError(f"{file}: made for another model: {', '.join(unused[:5])}")


def _attach(transformer: Any, weights: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Add the adapter, and return the names that only the file or only the model has."""
    import torch
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    transformer.add_adapter(LoraConfig(**settings), adapter_name="default")
    for parameter in transformer.parameters():
        if parameter.requires_grad:  # the adapter, which peft made in the model's dtype: that would round its weights
            parameter.data = parameter.data.float()
    adapter = {name: p for name, p in transformer.named_parameters() if p.requires_grad and p.is_meta}
    # peft made the adapter on the device of the model's weights, which may be meta
    room = {name: torch.zeros_like(p, device="cpu") for name, p in adapter.items()}
    transformer.load_state_dict(room, strict=False, assign=True)
    result = set_peft_model_state_dict(transformer, dict(weights), adapter_name="default")
    return [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]


def _within(mapping: Mapping[str, Any], prefix: str = "transformer.") -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in mapping.items() if name.startswith(prefix)}
