"""How many chunks may wait for a stage, and how often Ray Data looks: by itself it bounds bytes alone.

The store's bytes are no bound for small chunks: thousands of them fit, and each costs the driver 15 kB
while it waits. Nor is it good to decode far ahead of the model: what waits is lost with its node.
Imports of Ray Data only what its workers have anyway: they unpickle this module's name.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.context import DataContext

_MOST = "cvt_pipeline.most_waiting"
_PAUSE_S = 0.02


def bound_queues(context: DataContext, most: int) -> None:
    """Let at most `most` chunks wait for each stage or for the last's taker, beside those at work."""
    context.set_config(_MOST, most)
    # Ray lets a chunk through at every step where the next stage has nothing at work, as before its start.
    context.output_backpressure_guard_release_interval_s = 1.0
    policies = [*ENABLED_BACKPRESSURE_POLICIES, BoundedQueues]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    if Pause not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pause)


class Pause(ExecutionCallback):  # type: ignore[misc]  # Ray has no types
    """A moment's rest in each turn of Ray's loop.

    It waits for tasks to end, so that it turns at once, and takes a core, where those that have ended may
    not be read, or where none may be begun: as it mostly is where the model sets the pace.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_PAUSE_S)


class BoundedQueues(BackpressurePolicy):  # type: ignore[misc]  # Ray has no types
    """A stage neither begins a task nor hands on a chunk while enough of its chunks wait to be taken."""

    def can_add_input(self, op: Any) -> bool:
        return not self._enough(op)

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        if not op.output_dependencies:  # bounded by what it begins; a task that waits to be read is none
            return None
        return 0 if self._enough(op) else 1  # a chunk at a time, whatever its size

    def _enough(self, op: Any) -> bool:
        following = [self._topology[stage] for stage in op.output_dependencies]
        waiting: int = sum(state.total_enqueued_input_blocks() for state in following)
        if not following:
            waiting = self._topology[op].total_enqueued_output_blocks()
        return waiting >= int(self._data_context.get_config(_MOST))
