"""`dpo-scale plan` on models that exist as configurations only."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from dpo_scale.cli import main
from dpo_scale.console import Console
from dpo_scale.data import planning
from dpo_scale.data.hashing import splitmix64
from dpo_scale.data.planning import Schedule, layout_costs, plan_step
from dpo_scale.distributed.zero_config import read_config
from dpo_scale.errors import UserError
from dpo_scale.operations.cluster import GIB, Assumptions, Cluster
from dpo_scale.operations.fit import MemoryPlan, Setting
from dpo_scale.operations.plan import STEPS_LOOKED_AT, Plan, make_plan, policy_zero, steps_looked_at_a_scale
from dpo_scale.operations.plan_report import render, verdict
from dpo_scale.operations.scaling import sample_steps
from dpo_scale.operations.workload import AssumedData
from dpo_scale.operations.zero_memory import ZeroSettings
from dpo_scale.recipe import load_recipe
from dpo_scale.shipped_files import shipped_file

ROOT = Path(__file__).parents[2]
ASSUMED = AssumedData(2560, 200, 330)


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the configuration of Llama 3.1 8B."""
    folder = tmp_path_factory.mktemp("llama-8b")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(folder)
    return folder


def plan_of(model: Path, cluster: Cluster, *overrides: str, assumed: AssumedData = ASSUMED) -> Plan:
    recipe = load_recipe(ROOT / "launch/recipes/8b_one_node.yaml", [f"model.path={model}", *overrides])
    return make_plan(recipe, cluster, Assumptions(), None, assumed, Console(is_main=False))


NODE = Cluster(1, 8, 80 * GIB, 1024 * GIB)
LOAD = ("model.activation_checkpointing=true", "batch.rank_tokens=16384")


@pytest.fixture(scope="module")
def one_node(llama_8b: Path) -> Plan:
    return plan_of(llama_8b, NODE, *LOAD)


def test_an_8b_model_fits_a_node_of_eight_and_has_its_published_size(one_node: Plan) -> None:
    assert one_node.workload.meta.num_parameters == 8_030_261_248
    assert one_node.fit.fits
    assert one_node.remedy is None
    # 18 bytes of state a parameter, sharded over eight; the bucket, and workspaces of matrix products
    assert one_node.fit.gpu.states == pytest.approx(18 * 8_030_261_248 / 8 + 2 * 1e8 + 64 * 2**20, rel=0.001)


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(one_node: Plan) -> None:
    tokens = one_node.largest_rank_tokens
    memory, setting = one_node.memory, one_node.fit.setting
    assert tokens > setting.rank_tokens
    assert memory.fit(replace(setting, rank_tokens=tokens), NODE).fits_gpu
    assert not memory.fit(replace(setting, rank_tokens=tokens + 256), NODE).fits_gpu


def test_where_it_does_not_fit_the_remedy_does(one_node: Plan, llama_8b: Path) -> None:
    memory, setting = one_node.memory, one_node.fit.setting
    small = replace(NODE, gpu_memory=24 * GIB)
    assert not memory.fit(setting, small).fits
    remedy = next(s for s in memory.remedies(setting, small) if memory.fit(s, small).fits)
    assert remedy.change
    plan = plan_of(llama_8b, small, *LOAD)
    assert plan.remedy is not None
    assert plan.remedy.setting == remedy
    first_line = verdict(plan).splitlines()[0]
    assert first_line.startswith("Does not fit on 1 node of 8 GPUs as it is (each GPU lacks")
    assert "; fits with this change: " in first_line
    hopeless = plan_of(llama_8b, replace(NODE, gpu_memory=12 * GIB, host_memory=64 * GIB))
    assert hopeless.remedy is None
    assert verdict(hopeless).startswith("Does not fit on 1 node of 8 GPUs (each GPU lacks")


def test_checkpointing_trades_activations_for_time(one_node: Plan) -> None:
    memory, setting = one_node.memory, one_node.fit.setting
    plain = memory.moments(replace(setting, checkpointing=False), 8)
    recomputed = memory.moments(setting, 8)
    assert max(m.activations for m in recomputed) < 0.3 * max(m.activations for m in plain)


@pytest.mark.parametrize("name", ["zero3_offload_optimizer", "zero3_offload_all", "zero3_nvme", "zero3_hpz"])
def test_deepspeed_files_move_memory_to_where_they_say(one_node: Plan, name: str) -> None:
    memory, setting = one_node.memory, one_node.fit.setting
    zero, _ = policy_zero(Path(f"ds_configs/{name}.json"), 8)
    other = replace(setting, zero=zero)
    gpu, host = memory.fit(other, NODE).gpu.total, sum(memory.host(other, NODE).values())
    base_gpu, base_host = one_node.fit.gpu.total, sum(one_node.fit.host.values())
    if name == "zero3_hpz":
        assert gpu - base_gpu == pytest.approx(2 * 8_030_261_248 / 8, rel=0.001)
    else:
        assert gpu < base_gpu
        assert host > base_host


def test_a_reference_on_nvme_takes_the_hosts_memory_for_its_buffers(one_node: Plan) -> None:
    path = shipped_file("ds_configs/reference_nvme.json")
    buffers = read_config(path)["zero_optimization"]["offload_param"]
    memory = MemoryPlan(one_node.workload, ZeroSettings.of_config(read_config(path)))
    assert memory.reference_host(8) == buffers["buffer_count"] * buffers["buffer_size"] * 2


def test_scaling_counts_what_the_planner_gives_each_rank(one_node: Plan) -> None:
    scales = {scale.cluster.ranks: scale for scale in one_node.scales}
    assert list(scales) == [8 * 2**n for n in range(10)]
    workload = one_node.workload
    costs = layout_costs(workload.train, "shared", workload.cost.in_time())  # as the trainer balances its ranks
    work, computed = [], 0.0
    steps = sample_steps(workload.schedule, steps_looked_at_a_scale(workload.schedule.global_pairs))
    for step in steps:
        pairs = workload.schedule.pairs_of(step)
        plan = plan_step(pairs, costs, world_size=512, rank_tokens=16384, step=step)
        work += [[float(costs.work[indices].sum()) for indices in round_] for round_ in plan.micro_batches]
        computed += float(layout_costs(workload.train[pairs], "shared", workload.cost).work.sum())
    waited = sum(max(round_) - mine for round_ in work for mine in round_)
    assert scales[512].step.idle == pytest.approx(waited / (512 * sum(max(round_) for round_ in work)))
    done = 6 * computed / len(steps)
    peak = scales[512].step.seconds * 512 * Assumptions().peak_flops
    assert scales[512].step.mfu == pytest.approx(done / peak)
    assert not scales[8].limits
    assert any("idle" in limit for limit in scales[4096].limits)
    assert "network" in scales[4096].limits
    memory = [scale.gpu_bytes for scale in one_node.scales]
    assert memory == sorted(memory, reverse=True)
    # weights twice and gradients once, less what stays between forward and backward
    weights = 2 * 8_030_261_248
    assert 2 * weights < scales[8].step.traffic < 3 * weights


@pytest.mark.parametrize(("global_pairs", "epochs"), [(128, 2), (4096, 1)])
@pytest.mark.parametrize("more", [0, 1])
def test_both_tables_agree_with_and_without_a_smaller_last_step(
    more: int, global_pairs: int, epochs: int, llama_8b: Path
) -> None:
    run = f"batch.global_pairs={global_pairs}", f"run.epochs={epochs}"
    assumed = AssumedData(20 * global_pairs + more, 200, 330)
    for nodes in (1, 64):
        plan = plan_of(llama_8b, Cluster(nodes, 8, 80 * GIB, 1024 * GIB), *LOAD, *run, assumed=assumed)
        row = next(scale.step for scale in plan.scales if scale.cluster == plan.cluster)
        assert row.pairs_a_rank == plan.step.pairs_a_rank == global_pairs / plan.cluster.ranks
        assert row.micro_batches == pytest.approx(plan.step.micro_batches, rel=0.03)
        assert row.seconds == pytest.approx(plan.step.seconds, rel=0.03)
        assert row.mfu == pytest.approx(plan.step.mfu, rel=0.03)


def test_the_order_of_an_epoch_is_made_once_a_table(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(planning, "splitmix64", lambda values: made.append(len(values)) or splitmix64(values))
    plan_of(llama_8b, NODE, *LOAD, "run.epochs=3")
    assert made.count(ASSUMED.pairs) <= 3 * 2 + 2  # and for a typical micro-batch


@pytest.mark.parametrize("most", [1, 4, STEPS_LOOKED_AT])
@pytest.mark.parametrize(("pairs", "epochs", "last"), [(640, 1, 4), (641, 1, 4), (641, 3, 16), (641, 7, 40)])
def test_full_steps_are_looked_at_from_the_first_to_the_last(most: int, pairs: int, epochs: int, last: int) -> None:
    schedule = Schedule(pairs, 128, 0, epochs)
    steps = sample_steps(schedule, most)
    assert len(set(steps)) == len(steps) == min(most, 5 * epochs)
    assert all(len(schedule.pairs_of(step)) == 128 for step in steps)
    assert (steps[0], steps[-1]) == (0, 0 if most == 1 else last)


def test_where_no_step_is_full_all_are_alike() -> None:
    assert sample_steps(Schedule(100, 128, 0, 3), 4) == [0, 1, 2]
    assert sample_steps(Schedule(300, 128, 0, 2, max_steps=4), 4) == [0, 1, 3]


def test_assumed_lengths_have_their_means_and_their_limit() -> None:
    lengths = AssumedData(20_000, 200, 330).lengths(4096)
    assert lengths.mean(axis=0) == pytest.approx([200, 330, 330], rel=0.03)
    assert (AssumedData(5000, 900, 1500).lengths(2048)[:, 0] + np.array([0])).max() <= 1024
    cut = AssumedData(5000, 900, 1500).lengths(2048)
    assert (cut[:, :1] + cut[:, 1:]).max() <= 2048
    assert cut.min() >= 1


def test_the_command_says_what_is_missing_and_what_stands_in(
    llama_8b: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(ROOT / "launch/recipes/8b_one_node.yaml")
    assert main(["plan", recipe, "--nodes", "1", f"model.path={llama_8b}"]) == 2
    assert "--pairs N --prompt-tokens MEAN --completion-tokens MEAN" in capsys.readouterr().err
    assert main(["plan", recipe, "--pairs", "100", f"model.path={llama_8b}"]) == 2
    assert "give all three" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu_gib", "code"), [("80", 0), ("24", 1)])
def test_a_recipe_that_fits_after_a_change_only_does_not_fit(llama_8b: Path, gpu_gib: str, code: int) -> None:
    recipe = [str(ROOT / "launch/recipes/8b_one_node.yaml"), f"model.path={llama_8b}"]
    means = ["--pairs", "256", "--prompt-tokens", "200", "--completion-tokens", "330"]
    assert main(["plan", *recipe, *means, "--gpu-memory", gpu_gib]) == code


def test_a_run_that_ends_in_its_first_epoch_scores_less(one_node: Plan, llama_8b: Path) -> None:
    short = plan_of(llama_8b, NODE, *LOAD, "run.max_steps=3")
    taken = np.concatenate([short.workload.schedule.pairs_of(step) for step in range(3)])
    assert len(taken) < len(short.workload.train)
    assert short.reference.tokens == short.workload.costs.tokens[taken].sum() < one_node.reference.tokens


def test_each_rank_lays_out_the_reference_pass_over_all_pairs_of_it(one_node: Plan) -> None:
    def processes(train: int, held_out: int, max_steps: int | None = None) -> int:
        recipe, lengths = one_node.workload.recipe, np.ones((3, 3), np.int64)
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"max_steps": max_steps})})
        workload = replace(
            one_node.workload, recipe=recipe, train=lengths.repeat(train, 0), evaluate=lengths.repeat(held_out, 0)
        )
        return MemoryPlan(workload, one_node.memory.reference_zero).host(one_node.fit.setting, NODE)["processes"]

    none = 8 * 4 * GIB
    assert processes(1_000_000, 0) == pytest.approx(none + 8 * 3_000_000 * 370)
    assert processes(1_000_000, 500_000) == processes(1_000_000, 0)  # one after the other
    assert processes(1_000_000, 0, max_steps=100) == pytest.approx(none + 8 * 12_800 * 370)
    assert processes(1, 100_000) == pytest.approx(none + 8 * 300_000 * 370)


def test_a_smaller_last_step_makes_no_more_epochs(one_node: Plan) -> None:
    train = one_node.workload.train[: 2 * one_node.workload.schedule.global_pairs + 1]
    plan = replace(one_node, workload=replace(one_node.workload, train=train))
    console = Console()
    with console.rich.capture() as capture:
        console.show(next(iter(render(plan))))
    assert re.search(r"3 of 128 pairs, 1 epoch\s", capture.get())


def test_one_of_each_is_told_in_the_singular(one_node: Plan) -> None:
    workload = replace(one_node.workload, train=one_node.workload.train[:128])
    plan = replace(one_node, workload=workload, step=replace(one_node.step, ranks=1), cluster=Cluster(1, 1, GIB, GIB))
    console = Console()
    with console.rich.capture() as capture:
        console.show(next(iter(render(plan))))
    said = " ".join(capture.get().split())
    assert "on each of 1 rank, " in said
    assert "(means of 1 step)" in said
    assert verdict(plan).startswith("Fits on 1 node of 1 GPU\n")
    assert str(AssumedData(1, 200, 330)).startswith("1 pair, prompts of 200 and completions of 330 tokens on average")


def test_the_references_deepspeed_file_is_not_planned_with() -> None:
    with pytest.raises(UserError, match=r"reference_gpu\.json: its settings are the reference's"):
        policy_zero(Path("ds_configs/reference_gpu.json"), 8)


def test_the_settings_as_they_are_change_nothing() -> None:
    assert Setting(policy_zero(None, 8)[0], False, 1).change == ()
