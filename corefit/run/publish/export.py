"""`corefit export`: the model of a stage as other programs load it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from corefit.errors import ConfigError, CorefitError
from corefit.run.publish import labels, metadata, single_file
from corefit.run.publish.difference import Difference, Factors, difference
from corefit.run.publish.output import Output
from corefit.run.publish.single_file import Described
from corefit.run.publish.whole import (
    Whole,
    adapted,
    adapted_layers,
    lora_names,
    modules_of,
    of_base,
    read_empty,
    torch_dtype,
)
from corefit.system import files
from corefit.system.display import Advance, Display
from corefit.train import weights
from corefit.types import Backbone, Original, OriginalTensor, Streamed
from corefit.types.stage import Lora

if TYPE_CHECKING:
    from torch import Tensor

Files = Mapping[str, Mapping[str, OriginalTensor]]
"""What each file with the original names holds (Original.original)."""
SUFFIX = ".safetensors"


@frozen(kw_only=True)
class Export:
    """What to write.

    what    the whole model, or a LoRA: the stage's own, or the difference from the base
    layout  as diffusers reads it, or as ComfyUI does
    dtype   bf16, fp16 or fp32; None to leave weights in what they are stored in
    rank    rank of the LoRA that approximates the difference from the base
    """

    what: Literal["model", "lora"] = "model"
    layout: Literal["diffusers", "comfyui"] = "diffusers"
    dtype: str | None = None
    rank: int | None = None

    def check(self, output: Output) -> None:
        """Raise ConfigError for options that do not go together, or not with what the stage trained."""
        if self.rank is not None and self.what == "model":
            raise ConfigError("--rank is the rank of a LoRA; add --as lora, or leave it out")
        if self.what == "lora" and self.rank is None and output.lora is None:
            raise ConfigError(
                f"the stage {output.stage!r} trained all weights; with --rank N, such as --rank 64, their difference "
                "from the base is exported as a LoRA"
            )


def export(run: Path, stage: str, out: Path, wanted: Export, display: Display) -> None:
    """Write the model of a stage to `out`, whole or not at all. Raises ConfigError for what cannot be exported."""
    output = Output.of(run, stage)
    wanted.check(output)
    if out.exists():
        raise ConfigError(f"{out} exists already; name another place to write to")
    {"model": _model, "lora": _lora}[wanted.what](output, out, wanted, display)


# a whole model


def _model(output: Output, out: Path, wanted: Export, display: Display) -> None:
    with Whole.opened(output, torch_dtype(wanted.dtype)) as whole, ExitStack() as stack:
        arranged = _arranged(whole.backbone, out) if wanted.layout == "comfyui" else None
        start, unknown = {}, ""
        if whole.rounds:
            try:
                start = stack.enter_context(of_base(output, whole))
            except CorefitError as error:
                unknown = str(error)
        advance = stack.enter_context(stack.enter_context(display).task("export"))
        saved = weights.Saved(_told(whole, advance), start, whole.rounded)
        if arranged is None:
            with _new_folder(out) as partial:
                weights.write(whole.backbone, partial, saved)
        else:
            _write_original(out, arranged, whole, saved, advance, labels.of_model(output, whole.backbone))
    merged = ", with the LoRA merged into them" if output.lora else ""
    display.print(f"{out}: the whole weights of {output.stage}{merged}, {_in(whole)}; {_use(out, wanted, arranged)}")
    if saved.survived is not None:
        share = f"{saved.survived:.1%}"
        display.print(f"of the numbers that training has changed, {share} still differ from the base's, rounded alike")
    if unknown:
        display.print(f"how much of training the rounding has left is not known, as the base cannot be read: {unknown}")


def _told(whole: Whole, advance: Advance) -> Iterable[tuple[str, Tensor]]:
    """Yield all tensors, and tell the display how many have been taken."""
    for done, each in enumerate(whole, 1):
        yield each
        advance(done, len(whole.names))


def _in(whole: Whole) -> str:
    found = sorted({str(whole.dtype_of(name)).removeprefix("torch.") for name in whole.names})
    return f"in {' and '.join(found)}"


def _arranged(backbone: Backbone, out: Path) -> Files:
    """Return what the files with the original names hold. Raises ConfigError if the backbone has no such names."""
    if not isinstance(backbone, Original) or not isinstance(backbone, Streamed):
        raise ConfigError(
            f"the backbone {type(backbone).__name__} does not say how its tensors are called in ComfyUI "
            "(corefit.types.Original); --format diffusers works"
        )
    arranged = backbone.original()
    if len(arranged) == 1 and out.suffix != SUFFIX:
        raise ConfigError(f"{out}: ComfyUI reads a file here; name one that ends in {SUFFIX}")
    if len(arranged) > 1 and out.suffix == SUFFIX:
        names = " and ".join(arranged)
        raise ConfigError(f"{out}: this model is {len(arranged)} files, {names}; name a folder for them")
    return arranged


def _write_original(
    out: Path, arranged: Files, whole: Whole, saved: weights.Saved, advance: Advance, label: Mapping[str, str]
) -> None:
    """Write each file of a model in the original names."""
    done = 0

    def part(name: str) -> Tensor:
        nonlocal done
        done += 1
        advance(done, len(whole.names))
        return saved.take(name, whole[name])

    for file, tensors in _each(out, arranged):
        described = {name: _described(whole, made) for name, made in tensors.items()}
        single_file.write(file, described, lambda name, made=tensors: put_together(made[name], part), label)


def put_together(made: OriginalTensor, part: Callable[[str], Tensor]) -> Tensor:
    """Return an original tensor, made of those that `part(name)` reads."""
    import torch

    joined = torch.cat([part(name) for name in made.parts])
    return torch.cat(joined.chunk(2)[::-1]) if made.swapped else joined


def _described(whole: Whole, made: OriginalTensor) -> Described:
    import torch

    shapes, dtypes = zip(*((whole.shape(name), whole.dtype_of(name)) for name in made.parts), strict=True)
    return Described(reduce(torch.promote_types, dtypes), (sum(shape[0] for shape in shapes), *shapes[0][1:]))


def _each(out: Path, arranged: Files) -> Iterable[tuple[Path, Mapping[str, OriginalTensor]]]:
    """Yield each file to write, and what it holds; all of them appear at `out` once all are written."""
    if len(arranged) == 1:
        with _new_file(out) as partial:
            yield partial, next(iter(arranged.values()))
    else:
        with _new_folder(out) as folder:
            for name, tensors in arranged.items():
                yield folder / f"{out.name}-{name}{SUFFIX}", tensors


# a LoRA


def _lora(output: Output, out: Path, wanted: Export, display: Display) -> None:
    found = None if wanted.rank is None else _difference(output, wanted.rank, display)
    backbone = adapted(output) if found is None else _adapted_anew(output, found, wanted.rank or 0)
    arranged = _lora_files(output, out) if wanted.layout == "comfyui" else None
    label = (
        labels.of_lora(output, folded=arranged is not None)
        if found is None
        else labels.of_difference(output, backbone, wanted.rank or 0)
    )
    if arranged is None:
        with _new_folder(out) as partial:
            weights.write(backbone, partial, _cast(_tensors(backbone, found), wanted))
            metadata.stamp(partial, label)
    else:
        _write_lora(out, arranged, _folded(backbone) if found is None else found.factors, wanted, label)
    on = "the base" if found or output.whole is None else f"the weights in {output.whole}"
    what = f"the LoRA of {output.stage}" if found is None else f"the difference of {output.stage} from the base"
    display.print(f"{out}: {what}, to go on {on}; {_use(out, wanted, arranged)}")
    if found:
        _report(found, wanted.rank or 0, display)


def _difference(output: Output, rank: int, display: Display) -> Difference:
    with Whole.opened(output) as whole, of_base(output, whole) as base, display, display.task("difference") as advance:
        return difference(whole, base, rank, advance)


def _adapted_anew(output: Output, found: Difference, rank: int) -> Backbone:
    """Return the base's backbone with a new LoRA on the modules that differ; its tensors are not set.

    A network of several, such as Wan's two experts, gives each a LoRA on modules of the names that it has inside it.
    """
    import torch

    backbone = read_empty(output.base(), torch.float32)
    modules = modules_of(backbone).items()
    inner = tuple(f"{name}." for name, module in modules if name and hasattr(module, "add_adapter"))
    targets = {name.removeprefix(next(filter(name.startswith, inner), "")) for name in found.factors}
    weights.make_trainable(backbone, Lora(rank=rank, targets=tuple(sorted(targets))))
    return backbone


def _tensors(backbone: Backbone, found: Difference | None) -> Iterable[tuple[str, Tensor]]:
    """Yield (name, tensor) of the LoRA on a backbone: its own, or the factors found.

    A module of which the name ends like that of one that differs has a LoRA as well, which is zero.
    """
    import torch

    state = backbone.transformer.state_dict()
    for name in lora_names(backbone):
        if found is None:
            yield name, state[name]
        else:
            module, _, half = name.partition(".lora_")
            pair = found.factors.get(module)
            yield name, torch.zeros(state[name].shape) if pair is None else pair[half.startswith("B")]


def _cast(tensors: Iterable[tuple[str, Tensor]], wanted: Export) -> Iterable[tuple[str, Tensor]]:
    dtype = torch_dtype(wanted.dtype)
    return ((name, tensor.to(dtype) if dtype else tensor) for name, tensor in tensors)


def _folded(backbone: Backbone) -> Factors:
    """Return the factors of a LoRA with its scale, alpha / rank, in B: ComfyUI does not read diffusers' alpha."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in adapted_layers(backbone).items():
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        found[name.removesuffix(".weight")] = a, b * layer.scaling["default"]
    return found


def _lora_files(output: Output, out: Path) -> tuple[Backbone, Files]:
    import torch

    backbone = read_empty(output.backbone(), torch.float32)
    return backbone, _arranged(backbone, out)


def _write_lora(
    out: Path, arranged: tuple[Backbone, Files], factors: Factors, wanted: Export, label: dict[str, str]
) -> None:
    """Write the factors under the names by which ComfyUI finds them, each to the file of its network."""
    backbone, contents = arranged
    assert isinstance(backbone, Original)
    for file, tensors in _each(out, contents):
        here = {part for made in tensors.values() for part in made.parts}
        named: dict[str, Tensor] = {}
        for module, pair in factors.items():
            if f"{module}.weight" in here:
                for half, tensor in _cast(zip("AB", pair, strict=True), wanted):
                    named[f"{backbone.original_lora(module)}.lora_{half}.weight"] = tensor
        described = {name: Described(t.dtype, tuple(t.shape)) for name, t in named.items()}
        single_file.write(file, described, named.__getitem__, {})
        labels.stamp(file, label)


def _report(found: Difference, rank: int, display: Display) -> None:
    """Say what share of the difference is kept, and what no LoRA can keep."""
    display.print(f"rank {rank} keeps {found.kept[rank]:.2%} of the difference (of the sum of its squares)")
    display.print("by rank: " + ", ".join(f"{shown}: {share:.2%}" for shown, share in found.kept.items()))
    if found.lost:
        rest = ", ".join(f"{kind} {share:.2%}" for kind, share in sorted(found.lost.items()))
        display.print(f"a LoRA cannot hold {rest}")


# where it is written


@contextmanager
def _new_folder(out: Path) -> Generator[Path]:
    """Yield an empty folder, which becomes `out` once the block has ended."""
    with _partial(out) as partial:
        partial.mkdir()
        yield partial
        files.publish(partial, out)


@contextmanager
def _new_file(out: Path) -> Generator[Path]:
    """Yield the name of a file, which becomes `out` once the block has ended."""
    with _partial(out) as partial:
        yield partial
        partial.rename(out)
        files.sync(out.parent)


@contextmanager
def _partial(out: Path) -> Generator[Path]:
    """Yield a name beside `out`; what has it goes if the block fails, and at the next export if it was killed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    _remove(partial)
    try:
        yield partial
    except BaseException:
        _remove(partial)
        raise


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def _use(out: Path, wanted: Export, arranged: object) -> str:
    """Say how to load what was written."""
    uses: dict[tuple[str, str], str] = {
        ("model", "diffusers"): f'DiffusionPipeline.from_pretrained("{out}") loads it',
        ("lora", "diffusers"): f'load_lora_weights("{out}") of a pipeline of diffusers loads it',
        ("model", "comfyui"): 'put it into models/diffusion_models of ComfyUI, for the node "Load Diffusion Model"; '
        "text encoders and VAE stay those of the base",
        ("lora", "comfyui"): 'put it into models/loras of ComfyUI, for the node "LoraLoaderModelOnly"',
    }
    return uses[wanted.what, wanted.layout]
