"""`dpo-scale doctor`: whether this machine is ready, one node or, under `srun`, all nodes of a job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dpo_scale.distributed.nodes import Nodes
from dpo_scale.errors import UserError
from dpo_scale.model.attention import choose_kernel
from dpo_scale.model.loading import DTYPES
from dpo_scale.operations.findings import Facts, Finding, Node, compare, examine, would_start
from dpo_scale.operations.machine import gather_facts, nearest_existing, versions
from dpo_scale.recipe import ModelSection, Recipe

STYLES = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "error": ("wrong", "bold red")}


def doctor(recipe: Recipe | None, config_file: str | None) -> int:
    """Print what is wrong with this machine, and what mends it; returns 0 if it is ready, else 1.

    Under `srun` with one task a node, the first node prints a table of all; the others only say that they looked.
    """
    nodes = Nodes.of_srun()
    facts = gather_facts(recipe, config_file, nodes.count)
    node = _node(facts, recipe, nodes)
    gathered = [_from_json(told) for told in nodes.gather("node", asdict(node))]
    findings = compare(gathered)
    if nodes.rank == 0:
        show(findings, gathered)
    nodes.part()
    return 0 if would_start(findings) else 1


def show(findings: Sequence[Finding], nodes: Sequence[Node], console: Console | None = None) -> None:
    """The findings, worst last, where the eye rests; a table of the nodes above them; the verdict below them."""
    console = console or Console(highlight=False)
    if len(nodes) > 1:
        console.print(_nodes_table(nodes))
    order = list(STYLES)
    findings = sorted(findings, key=lambda finding: order.index(finding.severity))
    if console.is_terminal:
        console.print(_findings_table(findings))
    else:  # a line each, for grep
        for finding in findings:
            remedy = f"; mended by: {finding.remedy}" if finding.remedy else ""
            line = f"{STYLES[finding.severity][0]}: {finding.topic}: {finding.found}{remedy}"
            console.print(Text(line), soft_wrap=True)
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        verdict = f"Training would not start: {errors} thing{'s are' if errors > 1 else ' is'} wrong."
        console.print(Text(verdict, "bold red"))
    else:
        console.print(Text("This machine is ready; dpo-scale check RECIPE looks at model and data.", "bold green"))


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = _table("", "", "found", "what mends it")
    for finding in findings:
        word, style = STYLES[finding.severity]
        table.add_row(Text(word, style), Text(finding.topic), Text(finding.found), Text(finding.remedy, "cyan"))
    return table


def _nodes_table(nodes: Sequence[Node]) -> Table:
    table = _table("node", "GPUs", "torch", "driver", "clock", "wrong")
    for node in nodes:
        errors = sum(finding.severity == "error" for finding in node.findings)
        told = [node.versions.get(name, "") for name in ("GPUs", "torch", "CUDA driver")]
        clock = f"{1000 * node.clock_offset:+.0f} ms"
        table.add_row(Text(node.host), *map(Text, told), clock, str(errors or ""))
    return table


def _table(*columns: str) -> Table:
    """A table that cuts nothing off: what is too long goes on in the next line."""
    return Table(*(Column(name, overflow="fold") for name in columns))


def _node(facts: Facts, recipe: Recipe | None, nodes: Nodes) -> Node:
    """This node, looked at. Collective over nodes."""
    offset, uncertainty = nodes.clock_offset()
    return Node(
        host=facts.host,
        versions=versions(facts),
        findings=(*examine(facts), *(_attention(recipe.model, on_gpu=bool(facts.gpus)) if recipe else ())),
        clock_offset=offset,
        clock_uncertainty=uncertainty,
        sees_output_dir=recipe is None or _sees_output_dir(Path(recipe.run.output_dir), nodes),
    )


def _attention(settings: ModelSection, *, on_gpu: bool) -> Iterator[Finding]:
    """The recipe's kernel of attention, by the rule of the run itself."""
    try:
        kernel = choose_kernel(settings.attention, torch.device("cuda" if on_gpu else "cpu"), DTYPES[settings.dtype])
    except UserError as error:
        found, _, mend = str(error).removeprefix("model.attention: ").partition("; ")
        yield Finding("error", "model.attention", found, mend)
    else:
        yield Finding("ok", "model.attention", kernel)


def _sees_output_dir(folder: Path, nodes: Nodes) -> bool:
    """Whether this node finds a file that the first node puts into the folder, or its nearest parent. Collective."""
    if nodes.count == 1:
        return True
    existing = nearest_existing(folder.absolute())
    mark = Path(nodes.gather("mark", str(existing / f".dpo-scale-doctor-{os.getpid()}"))[0])
    if nodes.rank == 0:
        with contextlib.suppress(OSError):  # told as a finding of the folder
            mark.touch()
    nodes.gather("marked", True)
    seen = mark.exists()
    nodes.gather("seen", True)
    if nodes.rank == 0:
        mark.unlink(missing_ok=True)
    return seen


def _from_json(told: dict[str, object]) -> Node:
    findings = told["findings"]
    assert isinstance(findings, list)
    return Node(**{**told, "findings": tuple(Finding(**finding) for finding in findings)})  # type: ignore[arg-type]
