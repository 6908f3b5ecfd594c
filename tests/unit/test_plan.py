"""`dpo-scale plan` on models that exist as configurations only, and `dpo-scale check` on a folder of its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from launching import make_model, make_pairs
from transformers import LlamaConfig

from dpo_scale.cli import main
from dpo_scale.console import Console
from dpo_scale.data.planning import plan_step
from dpo_scale.operations.fit import Setting
from dpo_scale.operations.plan import Plan, make_plan, policy_zero
from dpo_scale.operations.plan_report import verdict
from dpo_scale.operations.scaling import Assumptions, Cluster
from dpo_scale.operations.workload import AssumedData
from dpo_scale.recipe import load_recipe

ROOT = Path(__file__).parents[2]
GIB = 2**30
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


def plan_of(model: Path, cluster: Cluster, *overrides: str, ds_config: str | None = None) -> Plan:
    recipe = load_recipe(ROOT / "launch/recipes/8b_one_node.yaml", [f"model.path={model}", *overrides])
    deepspeed = None if ds_config is None else Path(ds_config)
    return make_plan(recipe, cluster, Assumptions(), deepspeed, ASSUMED, Console(is_main=False))


NODE = Cluster(1, 8, 80 * GIB, 1024 * GIB)


@pytest.fixture(scope="module")
def one_node(llama_8b: Path) -> Plan:
    return plan_of(llama_8b, NODE, "model.activation_checkpointing=true")


def test_an_8b_model_fits_a_node_of_eight_and_has_its_published_size(one_node: Plan) -> None:
    assert one_node.workload.meta.num_parameters == 8_030_261_248
    assert one_node.fit.fits
    assert one_node.remedy is None
    # 18 bytes of state a parameter, sharded over eight
    assert one_node.fit.gpu.states == pytest.approx(18 * 8_030_261_248 / 8 + 2 * 1e8, rel=0.001)


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
    plan = plan_of(llama_8b, small, "model.activation_checkpointing=true")
    assert plan.remedy is not None
    assert plan.remedy.setting == remedy
    assert "with this change" in verdict(plan)
    hopeless = plan_of(llama_8b, replace(NODE, gpu_memory=12 * GIB, host_memory=64 * GIB))
    assert hopeless.remedy is None
    assert verdict(hopeless).startswith("Does not fit on 1 node of 8 GPUs (as it is each GPU lacks")


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


def test_scaling_counts_what_the_planner_gives_each_rank(one_node: Plan) -> None:
    scales = {scale.cluster.ranks: scale for scale in one_node.scales}
    assert list(scales) == [8 * 2**n for n in range(10)]
    workload = one_node.workload
    pairs = workload.schedule.pairs_of(0)
    plan = plan_step(pairs, workload.costs, world_size=512, rank_tokens=16384, step=0, epoch=0)
    empty = sum(not len(indices) for round_ in plan.micro_batches for indices in round_)
    assert scales[512].step.idle == pytest.approx(empty / (512 * len(plan.micro_batches)))
    assert not scales[8].limits
    assert any("idle" in limit for limit in scales[4096].limits)
    assert "network" in scales[4096].limits
    memory = [scale.gpu_bytes for scale in one_node.scales]
    assert memory == sorted(memory, reverse=True)
    # weights twice and gradients once, less what stays between forward and backward
    weights = 2 * 8_030_261_248
    assert 2 * weights < scales[8].step.traffic < 3 * weights


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


# --- check


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, pairs, a recipe and no launch files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    make_model(tmp_path / "model")
    make_pairs(tmp_path / "pairs.jsonl", 40, seed=0)
    recipe: dict[str, Any] = {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": "pairs.jsonl"},
        "batch": {"global_pairs": 4},
        "loss": {"beta": 0.1},
        "run": {"output_dir": "run"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_check_shows_pairs_as_they_are_trained_on_and_a_plan(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own.yaml"]) == 0
    output = capsys.readouterr().out
    rows = [json.loads(line) for line in (own / "pairs.jsonl").read_text().splitlines()]
    shown = re.findall(r"pairs\.jsonl:(\d+)\n +chosen: (.*)\n +rejected: (.*)", output)
    assert len(shown) == 3
    for number, *sides in shown:
        row = rows[int(number) - 1]
        for name, line in zip(("chosen", "rejected"), sides, strict=True):
            letters = [letter.replace(" ", "\u0120") for letter in row[name]]  # a token each
            scored = [f"[{token}]" for token in [*letters, "</s>"]]
            assert "?" in line.partition("[")[0], "the prompt's last letter is not scored"
            if len(scored) <= 20:
                assert line.endswith("".join(scored))
            else:
                assert "".join(scored[:16]) in line
                assert line.endswith("".join(scored[-4:]))
    assert "10 steps of 4 pairs" in output
    assert "Fits on" in output
    assert output.rstrip().endswith("Nothing is wrong with this recipe")


def test_check_reads_as_many_rows_as_it_is_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "own.yaml", "--rows", "8", "batch.global_pairs=2"]) == 0
    assert "4 steps of 2 pairs" in capsys.readouterr().out


def test_check_tells_mistakes_of_several_parts_at_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(own / "pairs.jsonl", "a") as file:
        file.write('{"prompt": "x", "chosen": 3, "rejected": "y"}\n')
    (own / "model" / "model.safetensors").unlink()
    (own / "launch").mkdir()
    (own / "zero.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}')
    (own / "launch" / "mine.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: zero.json}\n"
    )
    assert main(["check", "own.yaml"]) == 2
    error = capsys.readouterr().err
    assert "3 parts of this recipe are wrong" in error
    assert "pairs.jsonl:41" in error
    assert "'gradient_clipping' belongs to the recipe (optim.max_grad_norm)" in error
    assert "mine.yaml names this file" in error
    assert "model" in error


def test_check_reads_the_rows_as_text_where_the_model_is_not_found(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(own / "pairs.jsonl", "a") as file:
        file.write('{"prompt": "x", "chosen": 3, "rejected": "y"}\n{"prompt": "x"\n')
        file.write('{"prompt": "x", "chosen": "same", "rejected": "same"}\n')
    assert main(["check", "own.yaml", "model.path=nowhere"]) == 2
    error = capsys.readouterr().err
    assert "2 parts of this recipe are wrong" in error
    assert "model.path: 'nowhere'" in error
    assert "2 rows cannot be used" in error  # the equal answers of row 43 are left out and counted, unless told
    assert "pairs.jsonl:41" in error
    assert "pairs.jsonl:42" in error
    assert main(["check", "own.yaml", "model.path=nowhere", "data.on_no_preference=error"]) == 2
    assert "pairs.jsonl:43: chosen and rejected are equal" in capsys.readouterr().err
    assert main(["check", "own.yaml", "model.path=nowhere", "data.on_bad_row=skip"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.path: 'nowhere'")
    assert "pairs.jsonl" not in error


def test_a_setting_is_not_lost_behind_an_option() -> None:
    with pytest.raises(SystemExit):
        main(["check", "own.yaml", "--rows", "8", "nonsense"])
    assert Setting(policy_zero(None, 8)[0], False, 1).change == ()
