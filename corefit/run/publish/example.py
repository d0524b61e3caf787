"""The example of use in a model card: Python that loads the model in diffusers and generates with it."""

from __future__ import annotations

from collections.abc import Iterator

from corefit.run.publish.facts import Facts, Place

SECOND = "transformer_2"
"""The folder of a second network, whose LoRA is a file of its own."""


def example(facts: Facts) -> str:
    """Return Python that runs in the folder of the card, or anywhere once the model is on the hub."""
    return "\n".join(_lines(facts)) + "\n"


def _lines(facts: Facts) -> Iterator[str]:
    yield "import torch"
    yield "from diffusers import DiffusionPipeline"
    if facts.is_video:
        yield "from diffusers.utils import export_to_video"
    yield ""
    yield 'device = "cuda" if torch.cuda.is_available() else "cpu"'
    whole = facts.start if facts.lora else facts.place
    yield f"pipeline = DiffusionPipeline.from_pretrained({_named(whole, facts)}, torch_dtype=torch.bfloat16).to(device)"
    yield from _loras(facts)
    yield ""
    frames, height, width = (1, *facts.size)[-3:]
    evaluated = facts.output.tables.get("eval", {})
    arguments = {
        "num_frames": frames if facts.is_video else None,
        "height": height,
        "width": width,
        "num_inference_steps": evaluated.get("steps"),
        "guidance_scale": evaluated.get("guidance"),
        "max_sequence_length": facts.output.tables["backbone"].get("max_sequence_length"),
    }
    yield f"prompt = {facts.prompt!r}"
    given = ", ".join(f"{name}={value}" for name, value in arguments.items() if value is not None)
    if facts.is_video:
        yield f"frames = pipeline(prompt, {given}).frames[0]"
        yield 'export_to_video(frames, "sample.mp4")'
    else:
        yield f"picture = pipeline(prompt, {given}).images[0]"
        yield 'picture.save("sample.png")'


def _loras(facts: Facts) -> Iterator[str]:
    """Yield a line for each file of the LoRA."""
    files = sorted(file.name for file in facts.lora.glob("*.safetensors")) if facts.lora else []
    for name in files:
        second = ", load_into_transformer_2=True" if f".{SECOND}." in name else ""
        yield f'pipeline.load_lora_weights({_named(facts.place, facts)}, weight_name="{name}"{second})'


def _named(place: Place | None, facts: Facts) -> str:
    """Return a place as the first argument, or arguments, of a call."""
    if place is None:
        return f'"path/to/{facts.base_name}"'
    revision = f', revision="{place.revision}"' if place.revision else ""
    return f'"{place.name}"{revision}'
