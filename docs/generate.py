"""Fill in what the pages of docs/ take from the code: `python docs/generate.py`; `--check` only lists stale pages.

A function of BLOCKS writes what is between `<!-- generated: WHAT ARGUMENT -->` and `<!-- end -->`; the rest is written
by hand. messages.py keeps docs/errors.md.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import messages
from click.testing import CliRunner

from corefit.cli import cli
from corefit.data.settings import Data
from corefit.data.sources.saved import Pair
from corefit.pipeline import Eval, Pipeline, Stage
from corefit.pipeline.card import Card
from corefit.pipeline.eval import Diversity, Drift
from corefit.pipeline.evaluation import Benchmark, Evaluation, Model
from corefit.pipeline.pipeline import MODES
from corefit.pipeline.schema import Schema, Writer
from corefit.plugins import KINDS, Host, Offer
from corefit.train import remedies
from corefit.types.former import FORMER
from corefit.types.stage import Alarm

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) ?([\w.-]*) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 120
WORDS: Mapping[str, str] = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "object": "table",
    "path": "path",
    "path-or-address": "path or address",
}
"""JSON Schema's types, and the schema's own formats, in words of TOML."""
HEADINGS: Mapping[str, str] = {
    "Data": "[data]",
    "Stage": "[[stage]]",
    "Alarm": "[stage.alarm]",
    "Eval": "[eval]",
    "Diversity": "[eval.diversity]",
    "Drift": "[eval.drift]",
    "Pair": "[data.source.pair]",
    "Card": "[card]",
    "Model": "[[model]]",
    "Benchmark": "[[benchmark]]",
}
"""The heading under which the reference describes the table of a class."""
PAGES: Mapping[str, str] = {kind.name: kind.word for kind in KINDS.values()}
"""The page of each kind of plugin, in plugins/."""

EVALUATIONS = (
    "`corefit eval` reads a file of its own ([evaluating without training](evaluation.md#evaluating-without-training))."
)
BENCHMARKS = "A benchmark has a name and the keys of [[eval]](#eval) but `drift`, which needs the data of a pipeline."


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def filled(page: Path) -> str:
    """The text that the page should have."""
    text = page.read_text()
    if page == messages.PAGE:
        return messages.rendered(text)
    if page.name == "cli.md":
        for name in cli.commands:
            if f"<!-- generated: help {name} -->" not in text:
                text += f"\n## corefit {name}\n\n<!-- generated: help {name} -->\n<!-- end -->\n"
    return BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]](m[3]).strip()}\n\n{m[4]}", text)


# signatures


def _class(name: str) -> str:
    """The declaration of a class, such as `corefit.types.Sampler`: its attributes and the signatures of its methods."""
    module, _, cls = name.rpartition(".")
    node = _found(_tree(module), ast.ClassDef, cls)
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    attributes = [line for child in node.body for line in _attribute(child)]
    methods = [line for child in node.body if getattr(child, "name", "") not in FORMER for line in _method(child)]
    between = [""] if attributes and methods else []
    members = (f"    {line}".rstrip() for line in [*attributes, *between, *methods])
    return _python(f"class {cls}{bases}:", *members)


def _attribute(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
        default = "" if node.value is None or "field(" in ast.unparse(node.value) else f" = {ast.unparse(node.value)}"
        yield f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{default}"


def _method(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef) and (node.name in {"__len__", "__getitem__"} or not node.name.startswith("_")):
        yield from (f"@{ast.unparse(decorator)}" for decorator in node.decorator_list)
        yield from _signature(node, indent=4)


def _functions(module: str) -> str:
    """A table of the functions of a module, each with the first line of its docstring."""
    nodes = [node for node in _tree(module).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    calls = [f"{node.name}({', '.join(arg.arg for arg in node.args.args)})" for node in nodes]
    summaries = [_cell((ast.get_docstring(node) or "").partition("\n")[0]) for node in nodes]
    return "\n".join(
        ["| | |", "|---|---|", *(f"| `{call}` | {text} |" for call, text in zip(calls, summaries, strict=True))]
    )


def _remedies(_: str) -> str:
    """The rows of the table of keys that save memory, in the order of what they cost."""
    names = {"batch": "[eval] batch", "chunk": "chunk of an objective", "train": 'train = { use = "lora" }'}
    return "\n".join(f"| `{names.get(name, name)}` | {_cell(cost)} |" for name, cost in remedies.COSTS.items())


def _plans(_: str) -> str:
    """A table of the plans in plans.json."""
    head = ["what", "size", "GPUs", "keys to set", "largest phases", "main memory"]
    rows = [_plan(each) for each in json.loads((DOCS / "plans.json").read_text())]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


def _plan(plan: Mapping[str, Any]) -> str:
    largest = sorted(plan["phases"].items(), key=lambda item: -item[1])[:2]
    keys = [f"`{key}`" for key in plan["keys"]] or ["none"]
    fits = "" if plan["fits"] else "**does not fit**, nearest: "
    cells = [
        plan["task"],
        " x ".join(map(str, plan["size"])),
        plan["gpus"],
        fits + ", ".join(keys),
        ", ".join(f"{name} {count / 2**30:.1f} GiB" for name, count in largest),
        f"{plan['host'] / 2**30:.0f} GiB",
    ]
    return "| " + " | ".join(cells) + " |"


def _hook(name: str) -> str:
    return _python("@hookimpl", *_signature(_found(_tree("corefit.plugins.hookspecs"), ast.FunctionDef, name)))


def _signature(node: ast.FunctionDef, indent: int = 0) -> list[str]:
    """The lines of a signature, formatted as ruff does."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = re.sub(r"(: [^=,]+)=", r"\1 = ", ast.unparse(node.args))
    whole = f"def {node.name}({arguments}){returns}: ..."
    if indent + len(whole) <= WIDTH:
        return [whole]
    return [f"def {node.name}(", f"    {arguments}", f"){returns}: ..."]


def _python(*lines: str) -> str:
    quoted = (line.replace("'", '"') for line in lines)  # as ruff formats them
    return "\n".join(["```python", *quoted, "```"])


def _tree(module: str) -> ast.Module:
    __import__(module)
    return ast.parse(inspect.getsource(sys.modules[module]))


def _found(tree: ast.AST, kind: type, name: str) -> Any:
    return next(node for node in ast.walk(tree) if isinstance(node, kind) and getattr(node, "name", None) == name)


# offers


def first_party(kind: str) -> list[Offer]:
    """The offers of corefit's own plugins, sorted by name."""
    offers = Host().offers[kind].values()
    return sorted((offer for offer in offers if offer.owner.split()[0] == "corefit"), key=lambda offer: offer.name)


def _offers(kind: str) -> str:
    rows = [f"| [`{o.name}`](../configuration.md#{_anchor(o)}) | {_summary(o.cls)} |" for o in first_party(kind)]
    return "\n".join(["| `use` | |", "|---|---|", *rows]) if rows else "None: corefit itself offers none of this kind."


def _anchor(offer: Offer) -> str:
    return f"{KINDS[offer.kind].name} {offer.name}".replace(" ", "-")


def _summary(cls: type) -> str:
    first = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    return _cell(" ".join(first.split()))


# the configuration reference


def _configuration(_: str) -> str:
    """Every key of a pipeline file, from the same tables as `corefit schema`."""
    parts = [
        *("## The file", _table(Pipeline)),
        *("## [backbone]", "One table with `use`; beside the backbone's own keys it may have `train`, below."),
        *_sections("backbones"),
        *("### train", "Which weights train. A key of `[backbone]`, and of a stage that differs from it."),
        *(part for use, cls in MODES.items() for part in (f"#### train `{use}`", _summary(cls), _table(cls))),
        *(f"## {HEADINGS['Data']}", _table(Data), *_sections("sources")),
        *(f"### {HEADINGS['Pair']}", "Keys of `hf_dataset`. " + _summary(Pair), _table(Pair)),
        *(f"## {HEADINGS['Stage']}", _table(Stage)),
        *(f"## {HEADINGS['Alarm']}", _table(Alarm)),
        *("## Optimizers", "Without `use` it is `adamw`.", *_sections("optimizers")),
        *("## Objectives", *_sections("objectives")),
        *("## Samplers", *_sections("samplers")),
        *("## Noise weightings", *_sections("noise_weightings")),
        *(
            "## Rewards",
            "Beside a reward's own keys, an entry may have a `name`, under which it is logged, by default that of\n"
            "`use`; a `weight`, 1.0 by default; and in a stage `normalize`, none (the default) or batch. Several\n"
            "entries of one reward need a name each ([entries](plugins/reward.md#the-entries-of-a-list)).",
            *_sections("rewards"),
        ),
        *(f"## {HEADINGS['Eval']}", _table(Eval)),
        *(f"### {HEADINGS['Diversity']}", _table(Diversity), f"### {HEADINGS['Drift']}", _table(Drift)),
        *(f"## {HEADINGS['Card']}", _table(Card)),
        *("## [[observer]]", "Observers are named in any number, each once.", *_sections("observers")),
        *("## The file of corefit eval", EVALUATIONS, _table(Evaluation)),
        *(f"## {HEADINGS['Model']}", _table(Model), f"## {HEADINGS['Benchmark']}", BENCHMARKS, _table(Benchmark, Eval)),
    ]
    return "\n\n".join(parts)


def _sections(kind: str) -> Iterator[str]:
    for offer in first_party(kind):
        yield f"### {KINDS[kind].name} `{offer.name}`"
        yield _summary(offer.cls)
        yield _table(offer.cls)


def _table(cls: type, base: type | None = None) -> str:
    """A row for each key that the table of `cls` may set; those of `base` are left out."""
    schema, known = Writer(Host()).table(cls), Writer(Host()).table(base)["properties"] if base else {}
    rows = [
        f"| `{name}` | {_type(key)} | {_default(key, name in schema.get('required', ()))} "
        f"| {_cell(key.get('description', ''))} |"
        for name, key in schema["properties"].items()
        if name not in known
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) if rows else "It has no keys."


def _type(schema: Schema) -> str:
    """The type that a schema stands for, in words of TOML, with a link to where its table is described."""
    match schema:
        case {"enum": values}:
            return " or ".join(f"`{json.dumps(value)}`" for value in values)
        case {"type": "array", "items": one}:
            return f"list of {_plural(_type(one))}"
        case {"type": "array", "prefixItems": [one, *more]}:
            return f"list of {1 + len(more)} {_plural(_type(one))}"
        case {"anyOf": _, "title": name}:
            return f"[{name}](plugins/{PAGES[name]}.md)"
        case {"anyOf": [{"type": "object"}, *_]}:
            return "[table with `use`](#train)"
        case {"anyOf": choices}:
            return " or ".join(map(_type, choices))
        case {"type": "object", "title": name} if name in HEADINGS:
            return f"[table](#{HEADINGS[name].strip('[]').replace('.', '')})"
        case {"type": "object", "additionalProperties": one}:
            return f"table of {_type(one)}"
        case {"type": "object", "properties": keys}:
            return f"table of {', '.join(f'`{key}`' for key in keys)}"
        case {"type": plain}:
            return WORDS[schema.get("format", plain)]
        case _:
            return "any value"


def _plural(one: str) -> str:
    return one.replace("]", "s]", 1) if one.startswith("[") else f"{one}s"


def _default(schema: Schema, required: bool) -> str:
    match schema.get("default"):
        case None | []:
            return "required" if required else "none"
        case {"use": name}:
            return f"`{name}`"
        case {}:
            return "all defaults"
        case value:
            return f"`{json.dumps(value, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    """The text with those characters escaped that a table's cell may not hold, on GitHub and on the site."""
    return re.sub(r"(?<!`)<", "&lt;", re.sub(r"(?<!`)\*", r"\*", text.replace("|", r"\|")))


# the command line


def _help(name: str) -> str:
    arguments = [name, "--help"] if name else ["--help"]
    done = CliRunner().invoke(cli, arguments, prog_name="corefit", terminal_width=80)
    assert done.exit_code == 0, done.output
    return f"```text\n{done.output.strip()}\n```"


BLOCKS: Mapping[str, Callable[[str], str]] = {
    "remedies": _remedies,
    "plans": _plans,
    "class": _class,
    "functions": _functions,
    "hook": _hook,
    "offers": _offers,
    "configuration": _configuration,
    "help": _help,
}


def stale() -> list[Path]:
    """The pages that differ from what the code says."""
    return [page for page in pages() if filled(page) != page.read_text()]


def main() -> int:
    wrong = stale()
    for page in wrong:
        if "--check" not in sys.argv:
            page.write_text(filled(page))
        print(f"{'changed' if '--check' not in sys.argv else 'stale'}: {page.relative_to(DOCS.parent)}")
    differences = messages.differences(messages.PAGE.read_text())
    print(differences, end="\n" if differences else "")
    return int(bool(differences) or (bool(wrong) and "--check" in sys.argv))


if __name__ == "__main__":
    sys.exit(main())
