"""Reference sessions as ranks of a launch, many to a process; started by test_reference.py with accelerate launch.

Usage: reference_worker.py SCENARIO RECIPE FOLDER. Writes FOLDER/SCENARIO.json.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from dpo_scale.console import Console
from dpo_scale.data.layouts import PromptCompletions, collate
from dpo_scale.data.planning import Schedule
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed import exchange
from dpo_scale.distributed.engines import PolicyEngine, ReferenceEngine, loading_for, pin_where_it_fits
from dpo_scale.distributed.runtime import Runtime, start
from dpo_scale.errors import UserError
from dpo_scale.inputs import Data, prepare_data
from dpo_scale.model.loading import load_model, register_attention
from dpo_scale.recipe import Recipe, load_recipe
from dpo_scale.reference.cache import ReferenceStore, part_paths
from dpo_scale.reference.session import Reference

NUM_ADDED = 7


class Session:
    """A reference with a console that can be read, over the training pairs of `data`."""

    def __init__(self, recipe: Recipe, runtime: Runtime, data: Data) -> None:
        self.said = io.StringIO()
        self.reference = Reference(recipe, runtime, data, Console(self.said))  # type: ignore[arg-type]
        self.rows = self.reference.train_rows
        self.keys = self.rows.of(np.arange(len(data.train)))

    def score_all(self) -> dict[str, Any]:
        self.reference.score_all(self.rows)
        return {"computed": self.reference.rows_computed, "said": self.said.getvalue()}


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json")
    for section, fields in sections.items():
        values[section] |= fields
    return Recipe.model_validate(values)


def with_cache(recipe: Recipe, folder: Path, **reference: Any) -> Recipe:
    return changed(recipe, reference={"cache_dir": str(folder), **reference})


def files_in(store: ReferenceStore) -> int:
    return len(part_paths(store.folder))


def settings_and_data(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """What a second run has to score after this and that has changed; then the checkpoint itself."""
    half = replace(data, train=data.train[: len(data.train) - NUM_ADDED])
    first = with_cache(recipe, folder / "settings")
    found = {"first": Session(first, runtime, half).score_all()}
    other = changed(
        first,
        optim={"learning_rate": 0.5, "weight_decay": 0.0},
        run={"output_dir": str(folder / "elsewhere"), "epochs": 7, "seed": 99},
        batch={"global_pairs": 3, "rank_tokens": 200, "layout": "packed"},
        loss={"beta": 0.1, "reduction": "sum"},
        reference={"schedule": "per_batch", "offload": "none"},
    )
    reversed_pairs = TokenPairs.from_pairs(reversed(list(half.train)))
    found["other_settings"] = Session(other, runtime, replace(data, train=reversed_pairs)).score_all()
    more = TokenPairs.from_pairs(reversed(list(data.train)))
    found["rows_added"] = Session(other, runtime, replace(data, train=more)).score_all()
    return found


def ends_early(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """What a run that ends in its first epoch scores, and one without that end after it."""
    short = changed(with_cache(recipe, folder / "short"), run={"max_steps": 2}, batch={"global_pairs": 4})
    session = Session(short, runtime, data)
    found: dict[str, Any] = {"short": session.score_all()}
    schedule = Schedule(len(data.train), 4, short.run.seed, epochs=1)
    taken = session.rows.of(np.concatenate([schedule.pairs_of(0), schedule.pairs_of(1)]))
    found["all_of_its_steps"] = bool(session.reference.store.contains(taken).all())
    found["whole"] = Session(changed(short, run={"max_steps": None}), runtime, data).score_all()
    return found


def overwritten(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """The checkpoint before and after other weights took its place, under the same names and sizes."""
    ours = with_cache(recipe, folder / "overwritten", path=str(folder / "moving"))
    before = Session(ours, runtime, data)
    found = {"before": before.score_all()}
    runtime.ranks.barrier()
    if runtime.ranks.is_main:
        target = folder / "moving" / "model.safetensors"
        target.write_bytes((folder / "other_weights" / "model.safetensors").read_bytes())
    runtime.ranks.barrier()
    after = Session(ours, runtime, data)
    found["after"] = after.score_all()
    found["differing"] = sum(
        not np.array_equal(one, other)
        for one, other in zip(
            before.reference.store.lookup(before.keys), after.reference.store.lookup(after.keys), strict=True
        )
    )
    found["rows"] = len(before.keys)
    return found


def gathered_elements(held: ReferenceEngine) -> int:
    """Elements of whole parameters that are on the device."""
    return sum(parameter.numel() for parameter in held.model.parameters())


def engine(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """What is resident between forwards, and what lives after the release."""
    register_attention(recipe.model, runtime.ranks.device)
    with loading_for(runtime.accelerator, "reference"):
        held = ReferenceEngine(runtime.accelerator, load_model(data.model_folder, recipe.model))
    batch = collate([PromptCompletions.of_pair(data.train[0])], "shared")
    resident = [gathered_elements(held)]
    for _ in range(4):
        held(batch)
        resident.append(gathered_elements(held))
    watched = {
        "module": weakref.ref(held.model),
        "engine": weakref.ref(held.engine),
        "embedding": weakref.ref(held.model.model.get_input_embeddings()),
        "parameter": weakref.ref(next(held.model.parameters())),
        "shard": weakref.ref(next(held.model.parameters()).ds_tensor),
    }
    size = sum(parameter.ds_numel * 4 for parameter in held.model.parameters())
    devices = sorted({str(parameter.ds_tensor.device) for parameter in held.model.parameters()})
    held.release()
    del held
    gc.collect()
    return {
        "resident": resident,
        "pinned": [
            [pin_where_it_fits(runtime.accelerator, "reference", model_bytes) for model_bytes in (size, 1 << 50)],
            runtime.accelerator.state.get_deepspeed_plugin("reference").deepspeed_config["zero_optimization"][
                "offload_param"
            ]["pin_memory"],
        ],
        "shards_on": devices,
        "alive": [name for name, reference in watched.items() if reference() is not None],
    }


def architectures(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """A reference of another architecture, and one whose tokenizer differs."""
    other = Session(with_cache(recipe, folder / "architectures", path=str(folder / "gpt2")), runtime, data)
    found = other.score_all()
    found["sums"] = other.reference.store.sums_and_counts(other.keys)[0].tolist()
    try:
        Session(with_cache(recipe, folder / "architectures", path=str(folder / "other_tokens")), runtime, data)
    except UserError as error:
        found["refusal"] = str(error)
    return found


def disks(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """Each rank as a machine of its own; the first one's disk has some rows already."""
    alone = Runtime(runtime.accelerator, replace(runtime.ranks, local_rank=0))
    ours = with_cache(recipe, folder / f"disk-{runtime.ranks.rank}")
    source = Session(with_cache(recipe, folder / "whole"), runtime, data)
    source.score_all()
    session = Session(ours, alone, data)
    store, seeded = session.reference.store, 20
    if runtime.ranks.is_main:
        store.append(session.keys[:seeded], source.reference.store.lookup(session.keys[:seeded]))
    session.score_all()
    reopened = ReferenceStore.open(Path(str(ours.reference.cache_dir)), store.fingerprint)
    pairs = zip(reopened.lookup(session.keys), source.reference.store.lookup(session.keys), strict=True)
    return {
        "computed": session.reference.rows_computed,
        "rows": len(reopened),
        "needed": len(session.keys),
        "seeded": seeded,
        "largest_gap": max(float(np.abs(one - other).max()) for one, other in pairs),
    }


def per_batch(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """Steps of pairs as training takes them: readable at once on all ranks, written together."""
    session = Session(with_cache(recipe, folder / "per_batch", schedule="per_batch"), runtime, data)
    reference, files, computed = session.reference, [], []
    for indices in np.array_split(np.arange(len(data.train)), 5):
        reference.ensure(session.rows, indices)
        assert np.isfinite(reference.logps(session.rows, indices)).all()
        computed.append(reference.rows_computed)
        files.append(files_in(reference.store))
    runtime.ranks.barrier()  # else the other rank may commit before this one has counted
    reference.commit()
    files.append(files_in(reference.store))
    reference.ensure(session.rows, np.arange(4))
    reference.release()
    reopened = ReferenceStore.open(folder / "per_batch", reference.store.fingerprint)
    whole = ReferenceStore.open(folder / "whole", reference.store.fingerprint)
    pairs = zip(reopened.lookup(session.keys), whole.lookup(session.keys), strict=True)
    return {
        "files": files,
        "computed": [*computed, reference.rows_computed],
        "held": len(reference.store.held),
        "largest_gap": max(float(np.abs(one - other).max()) for one, other in pairs),
        "said": session.said.getvalue(),
    }


def one_step(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """A step that holds every pair: scored for that step alone, in the micro-batches of an upfront pass."""
    session = Session(with_cache(recipe, folder / "one_step", schedule="per_batch"), runtime, data)
    session.reference.ensure(session.rows, np.arange(len(data.train)))
    session.reference.release()
    return {"computed": session.reference.rows_computed}


def other_world(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """What another number of ranks has to score of what two ranks scored."""
    return Session(with_cache(recipe, folder / "whole"), runtime, data).score_all()


def not_finite(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """A reference whose embedding of one token, which one row holds, is not a number."""
    session = Session(with_cache(recipe, folder / "not_finite", path=str(folder / "broken")), runtime, data)
    try:
        session.score_all()
    except UserError as error:
        return {
            "error": str(error),
            "rows": len(ReferenceStore.open(folder / "not_finite", session.reference.store.fingerprint)),
        }
    return {}


def memory(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> dict[str, Any]:
    """Resident bytes of this process before, with and after a reference that is large enough to see."""
    register_attention(recipe.model, runtime.ranks.device)
    batch = collate([PromptCompletions.of_pair(data.train[0])], "shared")
    measured: list[dict[str, int]] = []
    for path in (folder / "large", folder / "large"):  # the first time libraries allocate what they keep
        gc.collect()
        before = resident_bytes()
        with loading_for(runtime.accelerator, "reference"):
            held = ReferenceEngine(runtime.accelerator, load_model(path, recipe.model))
        size = sum(parameter.ds_numel * 4 for parameter in held.model.parameters())
        for _ in range(3):
            held(batch)
        loaded = resident_bytes()
        held.release()
        del held
        measured.append({"model": size, "before": before, "loaded": loaded, "after": resident_bytes()})
    return {"measured": measured}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


UNNEEDED = ("torch._inductor.compile_fx", "pyarrow", "datasets", "pandas", "plotly")
"""What takes a rank time and memory to load, and serves only compiled kernels, some kinds of data files or reports."""


def loaded_in_vain(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> list[str]:
    """Unneeded packages that this rank has loaded, with both engines built."""
    register_attention(recipe.model, runtime.ranks.device)
    with loading_for(runtime.accelerator, "policy"):
        model = load_model(data.model_folder, recipe.model)
    PolicyEngine(runtime.accelerator, model, torch.optim.AdamW(model.parameters()), recipe)
    return [name for name in UNNEEDED if name in sys.modules]


def heaps(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> int:
    """Heaps of glibc's malloc that this rank has had so far."""
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return (text.value or b"").count(b"<heap nr=")


def asks_for_huge_pages(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> bool:
    """Whether the memory of a large tensor is advised to be in huge pages (`hg` of Linux's smaps)."""
    tensor = torch.ones(2**24)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside and name == "VmFlags:":
            return "hg" in values
    raise AssertionError("no mapping of this process holds the tensor")


def threads(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> list[int]:
    """Threads of operations in the thread that computes, and in another."""
    with ThreadPoolExecutor(1) as other:
        return [torch.get_num_threads(), other.submit(torch.get_num_threads).result()]


def exchanges(recipe: Recipe, runtime: Runtime, data: Data, folder: Path) -> list[bool]:
    """Whether the functions by which DeepSpeed's engines gather, and reduce, exchange between ranks."""
    whole, part = torch.ones(runtime.ranks.world_size), torch.ones(1)
    works = (
        deepspeed.comm.allgather_fn(whole, part, async_op=True),
        deepspeed.comm.reduce_scatter_fn(part, whole, async_op=True),
    )
    for work in works:
        work.wait()
    return [isinstance(work, exchange.Exchange) for work in works]


SCENARIOS: dict[str, Sequence[Any]] = {
    "two_ranks": (
        settings_and_data,
        ends_early,
        overwritten,
        engine,
        architectures,
        disks,
        per_batch,
        one_step,
        loaded_in_vain,
        heaps,
        asks_for_huge_pages,
        exchanges,
    ),
    "one_rank": (other_world, memory, not_finite, threads),
}


def main() -> None:
    scenario, recipe, folder = sys.argv[1], load_recipe(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(2 // int(os.environ["WORLD_SIZE"]))
    runtime = start(recipe)
    data = prepare_data(recipe, runtime.ranks, Console(io.StringIO()))  # type: ignore[arg-type]
    found = {action.__name__: action(recipe, runtime, data, folder) for action in SCENARIOS[scenario]}
    everywhere = runtime.ranks.gather_objects(found)
    if runtime.ranks.is_main:
        (folder / f"{scenario}.json").write_text(json.dumps(everywhere))
    torch.distributed.destroy_process_group()
    os._exit(0)  # as the program's ranks: threads of libraries that outlive the interpreter may abort it


if __name__ == "__main__":
    main()
