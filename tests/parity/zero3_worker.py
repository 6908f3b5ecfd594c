"""Trains tiny Llamas under ZeRO-3 as the program does, and writes what happened; started by accelerate launch.

Usage: zero3_worker.py RECIPE FOLDER. FOLDER holds `policy_KIND` and `reference_KIND` for each kind of model, and
receives `KIND_TOKENS.json` and `KIND_TOKENS.safetensors` for each case.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_llamas import random_pairs
from torch import Tensor

from dpo_scale.data.layouts import MicroBatch, PromptCompletions, collate
from dpo_scale.data.planning import CostModel, Schedule, StepPlan, layout_costs, plan_step
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.distributed.engines import PolicyEngine, ReferenceEngine, loading_for
from dpo_scale.distributed.runtime import Runtime, start
from dpo_scale.model.loading import checkpoint_activations, load_model, register_attention
from dpo_scale.objectives import reduce_log_probs
from dpo_scale.recipe import Recipe, load_recipe
from dpo_scale.training.metrics import MetricSums
from dpo_scale.training.optimizer import build_optimizer
from dpo_scale.training.step import ReferenceLogps, pair_batches, run_step

CASES = {"untied": (400, 31), "tied": (400, 31), "mixture": (31,)}
"""Kind of model -> token budgets: one micro-batch a rank; and up to two, some of them filler."""
CHECKPOINTED = ("tied", "mixture")
"""Kinds whose layers are computed again in the backward pass."""
GLOBAL_PAIRS, EPOCHS, SEED = 5, 2, 2
"""Of 8 pairs: every second step is partial. With this seed the first of those takes two micro-batches and a filler."""


class WatchedPolicy:
    """A policy engine that gathers the gradients of a step before the step is taken."""

    def __init__(self, engine: PolicyEngine) -> None:
        self.engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.engine(batch)

    def backward(self, loss_sum: Tensor, *, global_pairs: int, is_last: bool) -> None:
        self.engine.backward(loss_sum, global_pairs=global_pairs, is_last=is_last)

    def step(self) -> bool:
        for name, parameter in self.engine.model.model.named_parameters():
            self.gradients[name] = deepspeed.utils.safe_get_full_grad(parameter).clone()
        return self.engine.step()

    def grad_norm(self) -> float:
        return self.engine.grad_norm()


def score(runtime: Runtime, recipe: Recipe, folder: Path, pairs: TokenPairs) -> ReferenceLogps:
    """Reference log-probs of all pairs from a ZeRO-3 inference engine, which is then released."""
    with loading_for(runtime.accelerator, "reference"):
        reference = ReferenceEngine(runtime.accelerator, load_model(folder, recipe.model))
    batch = collate([PromptCompletions.of_pair(pair) for pair in pairs], "shared")
    logps_S = reduce_log_probs(reference(batch), batch.sequence_of_target, batch.lengths, recipe.loss.reduction)
    table = logps_S.double().numpy().reshape(-1, 2)
    reference.release()
    return lambda indices: table[indices]


def check_shards(policy: PolicyEngine, runtime: Runtime) -> None:
    """Each rank holds half of every parameter, rounded up."""
    assert runtime.accelerator.num_processes == dist.get_world_size() == 2
    assert policy.engine.zero_optimization_stage() == 3
    parameters: Sequence[Any] = list(policy.model.parameters())
    assert all(parameter.numel() == 0 for parameter in parameters), "nothing is gathered between steps"
    held = sum(parameter.ds_tensor.numel() for parameter in parameters)
    whole = sum(parameter.ds_numel for parameter in parameters)
    assert 0 <= held - whole / 2 <= len(parameters) / 2, f"{held} of {whole} elements are here"


def plans(pairs: TokenPairs, rank_tokens: int) -> Iterator[StepPlan]:
    """The steps as the program plans them."""
    schedule = Schedule(num_pairs=len(pairs), global_pairs=GLOBAL_PAIRS, seed=SEED, epochs=EPOCHS)
    for step in range(schedule.num_steps):
        yield plan_step(
            schedule.pairs_of(step),
            layout_costs(pairs.lengths, "shared", CostModel()),
            world_size=2,
            rank_tokens=rank_tokens,
            step=step,
        )


def train(
    runtime: Runtime, recipe: Recipe, policy: PolicyEngine, reference: ReferenceLogps, rank_tokens: int, out: Path
) -> None:
    """All steps; losses, norms and the pairs of each rank go to JSON, whole gradients to safetensors."""
    ranks, pairs = runtime.ranks, random_pairs()
    watched, steps, tensors = WatchedPolicy(policy), [], {}
    for plan in plans(pairs, rank_tokens):
        batches = list(pair_batches(plan, ranks.rank, pairs, "shared", pad_id=0))
        sums = MetricSums(ranks.device)
        output = run_step(
            watched, batches, reference, sums, recipe.loss, global_pairs=plan.num_pairs, device=ranks.device
        )
        check_shards(policy, runtime)
        trained = ranks.gather_objects([int(i) for item in batches if item.weight for i in item.pairs])
        assert not set(trained[0]) & set(trained[1]), "the ranks train on the same pairs"
        micro_losses = ranks.gather_objects([float(loss) for loss in output.micro_losses])
        steps.append(
            {
                "pairs": trained,
                "micro_batches": len(batches),
                "fillers": sum(ranks.gather_objects(sum(item.weight == 0 for item in batches))),
                "loss": sum(sum(losses) for losses in micro_losses) / plan.num_pairs,
                "metric_loss": sums.reduce(ranks)["loss"],
                "grad_norm": output.grad_norm,
                "applied": output.applied,
            }
        )
        tensors |= {f"{plan.step}/{name}": gradient for name, gradient in watched.gradients.items()}
    if ranks.is_main:
        out.with_suffix(".json").write_text(json.dumps(steps, indent=1))
        save_file(tensors, out.with_suffix(".safetensors"))


def main() -> None:
    torch.set_num_threads(1)
    recipe, folder = load_recipe(sys.argv[1]), Path(sys.argv[2])
    runtime = start(recipe)
    register_attention(recipe.model, runtime.ranks.device)
    for kind, budgets in CASES.items():
        reference = score(runtime, recipe, folder / f"reference_{kind}", random_pairs())
        for rank_tokens in budgets:
            with loading_for(runtime.accelerator, "policy"):
                model = load_model(folder / f"policy_{kind}", recipe.model)
            if kind in CHECKPOINTED:
                checkpoint_activations(model, dropout=False)
            optimizer = build_optimizer(model, recipe.optim)
            policy = PolicyEngine(runtime.accelerator, model, optimizer, recipe)
            policy.train()
            train(runtime, recipe, policy, reference, rank_tokens, folder / f"{kind}_{rank_tokens}")
            policy.engine.destroy()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as the program's ranks: threads of libraries that outlive the interpreter may abort it


if __name__ == "__main__":
    main()
