"""How fast the ranks of a group reach each other: inside a node, or over the network where the group spans several.

Ranks lie in megatron-core's order: tensor ranks next to each other, then context or expert ranks, data ranks, and the
pipeline ranks farthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig

_GIGA = 1e9


@dataclass(frozen=True)
class Links:
    """Bandwidths that collectives reach, in bytes a second of one GPU and one direction.

    Attributes:
        node: to the GPUs of the node.
        network: to other nodes.
        gpus_per_node: of a node.
    """

    node: float
    network: float
    gpus_per_node: int

    @classmethod
    def of(cls, cluster: ClusterConfig, assumptions: AssumptionsConfig) -> Links:
        """Of a cluster, under the planner's assumptions."""
        hardware, share = cluster.hardware, assumptions.link_efficiency
        return cls(
            hardware.node_gb_per_s * share * _GIGA,
            hardware.network_gb_per_s * share * _GIGA,
            cluster.num_ranks_per_node,
        )

    def ring_seconds(self, num_bytes: float, size: int, stride: int) -> float:
        """Time to gather, or to reduce and scatter, a buffer of so many bytes in a group.

        Args:
            num_bytes: of the whole buffer.
            size: ranks of the group.
            stride: ranks from one member to the next.
        """
        if size <= 1:
            return 0.0
        rate = self.node
        if size * stride > self.gpus_per_node:
            # Every member brings its own share of the network.
            members = max(min(self.gpus_per_node // stride, size), 1)
            rate = min(self.node, self.network * members)
        return num_bytes * (size - 1) / size / rate

    def exchange_seconds(self, num_bytes: float, size: int, stride: int) -> float:
        """Time of an all-to-all in which each rank sends so many bytes, its own share included."""
        if size <= 1:
            return 0.0
        nodes = max(size * stride / self.gpus_per_node, 1.0)
        beyond = (nodes - 1.0) / nodes
        inside = max((size - 1) / size - beyond, 0.0)
        return num_bytes * (inside / self.node + beyond / self.network)

    def send_seconds(self, num_bytes: float, distance: int) -> float:
        """Time to send bytes to the rank so far away."""
        return num_bytes / (self.node if distance < self.gpus_per_node else self.network)
