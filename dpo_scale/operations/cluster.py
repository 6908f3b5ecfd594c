"""What a plan takes for given: the cluster that is to be booked, and what no file says. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GPU_GIB, HOST_GIB = 80, 1024
"""Memory of a GPU and of a node where nobody says."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is to be booked."""

    nodes: int
    gpus_per_node: int
    gpu_memory: int
    """Bytes of each GPU."""
    host_memory: int
    """Bytes of each node."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What no file says. Rates are bytes or floating-point operations a second."""

    mfu: float = 0.40
    """Share of a GPU's peak that goes into the model's own work while a rank computes, recomputation left out."""
    peak_flops: float = 989e12
    """Dense bf16 peak of a GPU: an H100's."""
    network: float = 400e9
    """All network adapters of a node together: eight of 400 Gbit/s."""
    node_link: float = 450e9
    """From a GPU to the others of its node: fourth-generation NVLink, one way."""
    link_efficiency: float = 0.8
    """Share of these two rates that large collectives reach."""
    hop_seconds: float = 2e-6
    """Latency of each of the ranks - 1 hops of a ring."""
    host_link: float = 25e9
    """Between a GPU and its host: PCI Express 4.0 x16."""
    host_memory_rate: float = 200e9
    """Of a node's memory, under AdamW on its CPUs."""
    nvme: float = 6e9
    """Of a node's local disks."""

    def link_between_ranks(self, cluster: Cluster) -> float:
        """What large collectives over all ranks reach, in bytes a second."""
        return self.link_efficiency * (self.node_link if cluster.nodes == 1 else min(self.network, self.node_link))

    def lines(self) -> list[str]:
        """The assumptions in words, one a line."""
        return [
            f"MFU {self.mfu:.0%} of {self.peak_flops / 1e12:,.0f} Tflop/s while a rank computes (--mfu, "
            "--peak-tflops); recomputation comes on top",
            f"network {self.network / 1e9:,.0f} GB/s a node (--network) and {self.node_link / 1e9:,.0f} GB/s a GPU "
            f"within one, at {self.link_efficiency:.0%}, {self.hop_seconds * 1e6:.0f} us a hop of a ring, behind "
            "computation",
            f"offload: {self.host_link / 1e9:,.0f} GB/s between GPU and host; a node's memory "
            f"{self.host_memory_rate / 1e9:,.0f} GB/s, its NVMe {self.nvme / 1e9:,.0f} GB/s",
        ]
