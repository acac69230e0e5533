"""How many chunks may wait for a stage: a policy for Ray Data, which by itself bounds bytes alone.

The store's bytes are no bound for small chunks: thousands of them fit, and each costs the driver 15 kB
while it waits. Nor is it good to decode far ahead of the model: what waits is lost with its node.
Imports of Ray Data only what its workers have anyway: they unpickle this module's name.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data.context import DataContext

_MOST = "cvt_pipeline.most_waiting"


def bound_queues(context: DataContext, most: int) -> None:
    """Let at most `most` chunks wait for each stage, beside those at work there."""
    context.set_config(_MOST, most)
    # Ray lets a chunk through at every step where the next stage has nothing at work, as before its start.
    context.output_backpressure_guard_release_interval_s = 1.0
    policies = [*ENABLED_BACKPRESSURE_POLICIES, BoundedQueues]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)


class BoundedQueues(BackpressurePolicy):  # type: ignore[misc]  # Ray has no types
    """A stage neither begins a task nor hands on a chunk while enough of its chunks wait for the next."""

    def can_add_input(self, op: Any) -> bool:
        return not self._enough(op)

    def max_task_output_bytes_to_read(self, op: Any) -> int:
        return 0 if self._enough(op) else 1  # a chunk at a time, whatever its size

    def _enough(self, op: Any) -> bool:
        queues = (self._topology[stage] for stage in op.output_dependencies)
        waiting: int = sum(queue.total_enqueued_input_blocks() for queue in queues)
        return waiting >= int(self._data_context.get_config(_MOST))
