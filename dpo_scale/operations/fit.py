"""Whether a run fits: its memory in a setting, on a cluster, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.operations.cluster import GIB, Cluster
from dpo_scale.operations.memory import MicroBatchShape, Moment, peak, scoring_moments, training_moments
from dpo_scale.operations.workload import Workload
from dpo_scale.operations.zero_memory import ZeroSettings, parameters_of, states
from dpo_scale.shipped_files import shipped_file

RESERVED = int(2.5 * GIB)
"""Of each GPU, for the CUDA context, NCCL's buffers and kernels."""
FRAGMENTATION = 0.05
"""Share of a GPU that torch's allocator cannot use well."""
RANK_HOST_MEMORY = 4 * GIB
"""Python, CUDA and libraries in the host memory of each rank."""
SCORING_BYTES_A_PAIR = 370
"""Host memory in which every rank lays out the reference pass, whatever their number: prompts are compared and
micro-batches filled as lists of Python integers. Measured with 0.5 to 2 million pairs that have a prompt each, in
proportion to them: 352 MiB more for each million.
"""
OTHER_OFFLOADS = ("zero3_offload_optimizer.json", "zero3_offload_all.json")


def scaled(shape: MicroBatchShape, tokens: int) -> MicroBatchShape:
    """The same mix of pairs with another number of tokens."""
    completions = int(shape.head.completion_tokens * tokens / shape.activations.tokens)
    head = replace(shape.head, completion_tokens=completions)
    return MicroBatchShape(shape.activations.of(tokens), head, shape.checked_tokens)


@dataclass(frozen=True, slots=True)
class Setting:
    """What may be changed to make a run fit."""

    zero: ZeroSettings
    checkpointing: bool
    rank_tokens: int
    change: tuple[str, ...] = ()
    """The changes in the words of the command line; empty for the recipe as it is."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a setting fits on a cluster."""

    setting: Setting
    gpu: Moment
    scoring: Moment
    host: dict[str, int]
    """Bytes of node 0 at the worst moment, by what takes them."""
    gpu_usable: int
    host_usable: int

    @property
    def fits_gpu(self) -> bool:
        return max(self.gpu.total, self.scoring.total) <= self.gpu_usable

    @property
    def fits_host(self) -> bool:
        return sum(self.host.values()) <= self.host_usable

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.fits_host


class MemoryPlan:
    """The memory of a workload in any setting, on any cluster."""

    def __init__(self, workload: Workload, reference_zero: ZeroSettings) -> None:
        self.workload, self.reference_zero = workload, reference_zero
        self.parameters = parameters_of(workload.meta.units)
        self._shapes: dict[tuple[bool, bool], MicroBatchShape] = {}

    def _shape(self, checkpointing: bool, training: bool) -> MicroBatchShape:
        key = checkpointing, training
        if key not in self._shapes:
            self._shapes[key] = self.workload.shape(checkpointing=checkpointing, training=training)
        return self._shapes[key]

    def moments(self, setting: Setting, ranks: int) -> list[Moment]:
        """The moments of a training step whose micro-batches are full."""
        return training_moments(
            self.workload.meta.units,
            scaled(self._shape(setting.checkpointing, True), setting.rank_tokens),
            setting.zero,
            ranks=ranks,
            dtype_bytes=self.workload.dtype_bytes,
            checkpointing=setting.checkpointing,
        )

    def scoring(self, ranks: int, rank_tokens: int) -> Moment:
        """The worst moment of the reference pass."""
        return peak(
            scoring_moments(
                self.workload.meta.units,
                scaled(self._shape(False, False), rank_tokens),
                self.reference_zero,
                ranks=ranks,
                dtype_bytes=self.workload.dtype_bytes,
            )
        )

    def host(self, setting: Setting, cluster: Cluster) -> dict[str, int]:
        """Bytes of node 0 where they are most: while rank 0 reads the checkpoint, or in training."""
        own = states(self.parameters, setting.zero, cluster.ranks, self.workload.dtype_bytes, cpu=False).host
        gpus = cluster.gpus_per_node
        processes = {"processes": gpus * (RANK_HOST_MEMORY + SCORING_BYTES_A_PAIR * self.workload.most_pairs_scored)}
        offloaded = {name: gpus * size for name, size in own.items()}
        reference = gpus * self.reference_host(cluster.ranks)
        checkpoint = self.workload.meta.num_parameters * self.workload.dtype_bytes
        weights = offloaded.get("weights", 0)
        loading = {
            **processes,
            "checkpoint, read whole by rank 0": checkpoint,
        }
        if max(weights, reference):  # one after the other, the policy's last
            loading[("weights" if weights >= reference else "reference") + ", offloaded"] = max(weights, reference)
        training = {**processes, **{f"{name}, offloaded": size for name, size in offloaded.items()}}
        if self.workload.recipe.reference.schedule == "per_batch":
            for use in (loading, training):
                use["reference, offloaded"] = reference
        return max((loading, training), key=lambda use: sum(use.values()))

    def reference_host(self, ranks: int) -> int:
        """Host bytes of a rank's part of the reference."""
        held = states(self.parameters, self.reference_zero, ranks, self.workload.dtype_bytes, cpu=False)
        return held.host.get("weights", 0) + held.host.get("weights' NVMe buffers", 0)

    def fit(self, setting: Setting, cluster: Cluster) -> Fit:
        """Whether a setting fits."""
        tokens = self.workload.recipe.reference.rank_tokens or 4 * setting.rank_tokens
        return Fit(
            setting=setting,
            gpu=peak(self.moments(setting, cluster.ranks)),
            scoring=self.scoring(cluster.ranks, tokens),
            host=self.host(setting, cluster),
            gpu_usable=usable(cluster.gpu_memory),
            host_usable=cluster.host_memory,
        )

    def largest_rank_tokens(self, setting: Setting, cluster: Cluster) -> int:
        """The largest micro-batch that fits, in steps of 256 tokens; 0 if not even one pair does."""
        low, high = 0, 2**20 // 256
        while low < high:
            middle = (low + high + 1) // 2
            tried = replace(setting, rank_tokens=256 * middle)
            low, high = (middle, high) if self.fit(tried, cluster).fits_gpu else (low, middle - 1)
        return 256 * low if 256 * low >= self.workload.longest_pair else 0

    def remedies(self, setting: Setting, cluster: Cluster) -> Iterator[Setting]:
        """Settings to try where the recipe as it is does not fit, the cheapest first."""
        offloads = [(setting.zero, ())] + [
            (ZeroSettings.of_config(read_policy_config(shipped_file(f"ds_configs/{name}"))), (f"ds_configs/{name}",))
            for name in OTHER_OFFLOADS
        ]
        for zero, offload in offloads:
            for checkpointing in sorted({setting.checkpointing, True}):
                switched_on = checkpointing and not setting.checkpointing
                change = (*offload, "model.activation_checkpointing=true") if switched_on else offload
                tried = replace(setting, zero=zero, checkpointing=checkpointing, change=change)
                if change:
                    yield tried
                tokens = min(self.largest_rank_tokens(tried, cluster), setting.rank_tokens)
                if 0 < tokens < setting.rank_tokens:
                    yield replace(tried, rank_tokens=tokens, change=(*change, f"batch.rank_tokens={tokens}"))


def usable(gpu_memory: int) -> int:
    """What tensors may take of a GPU."""
    return int(gpu_memory * (1 - FRAGMENTATION)) - RESERVED
