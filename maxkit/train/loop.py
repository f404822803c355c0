# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches into the step, hooks every n updates, a clean stop on SIGTERM.

With `lookahead` one update is in flight while the metrics of the one before are read, so an accelerator never waits for
Python. What happens with metrics, checkpoints and evaluation is decided by the hooks that are handed in.
"""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from maxkit.types import Batch, TrainState

OnMetrics = Callable[[int, dict[str, float], float], None]
OnState = Callable[[int, TrainState], None]


class BatchSource(Protocol):
    """Where the updates' batches come from. Its state is saved with every checkpoint."""

    def next(self, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """The next update's batch on the mesh, and what the host measured while making it.

        A data set does not look at `state`; a rollout generates with its parameters.
        """

    def get_state(self) -> Any:
        """A JSON value: where the source is after the last batch it gave."""

    def set_state(self, value: Any) -> None:
        """Continue with the batch after that, bit for bit."""


@dataclasses.dataclass(frozen=True)
class Every:
    """Call `hook(step, state)` after every `every`-th update, and after the last if `at_end`."""

    every: int
    hook: OnState
    at_end: bool = True

    def due(self, step: int, last: bool) -> bool:
        """Whether to call the hook after this update."""
        return bool(self.every and step % self.every == 0) or (last and self.at_end)


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop honours after the update it is in.

    A second SIGINT interrupts at once. Outside the main thread, where handlers cannot be set, nothing is caught.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def name(self) -> str | None:
        """Either "SIGTERM" or "SIGINT", None while nobody asked. Of several hosts, any may have been asked."""
        asked = self.signal
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # A numpy value: a jax one would belong to all processes under the mesh in force, and be refused.
            asked = int(multihost_utils.process_allgather(np.int32(asked or 0)).max())
        return signal.Signals(asked).name if asked else None


def train_loop(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    source: BatchSource,
    *,
    done: int,
    total: int,
    on_metrics: OnMetrics,
    hooks: Sequence[Every] = (),
    stop: StopRequest | None = None,
    lookahead: bool = True,
) -> tuple[TrainState, int, str | None]:
    """Do updates `done + 1` to `total`.

    Args:
        step: compiled; donates the state.
        source: gives the next update's batch each time, and host metrics that join the step's.
        on_metrics: called with (update, metrics as floats, seconds it took) for every update, in order.
        hooks: called with the state right after their update, before the next one may donate it.
        lookahead: read the metrics of an update only after the next one is dispatched.
        stop: when it has a name, the loop ends after the current update and runs the hooks that are due at the end.

    Returns:
        (state, updates done, name of the signal that ended the loop early or None).
    """
    pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None
    clock = time.perf_counter()

    def emit() -> None:
        nonlocal pending, clock
        if pending is None:
            return
        number, metrics, measured = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()} | measured
        now = time.perf_counter()
        on_metrics(number, values, now - clock)
        pending, clock = None, time.perf_counter()

    for number in range(done + 1, total + 1):
        batch, measured = source.next(state)
        state, metrics = step(state, batch)
        emit()
        pending = (number, metrics, measured)
        if not lookahead:
            emit()
        reason = stop.name if stop is not None else None
        last = number == total or reason is not None
        due = [hook for hook in hooks if hook.due(number, last)]
        if due or last:
            emit()
        for hook in due:
            hook.hook(number, state)
        if due:
            clock = time.perf_counter()  # a checkpoint is not part of an update's time
        if reason:
            return state, number, reason
    return state, max(done, total), None
