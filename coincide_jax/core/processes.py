"""Several processes that run one command together, as a rule one a host (JAX's multi-controller runtime).

All run the same code on the same numbers, and share the arrays on the devices; the workdir is a folder that all see.
What happens outside the devices is done once: process 0 leads, it alone writes files and speaks (`leads`), and where
the others must wait for what it finds, or fail with it, they do so in `led`. With one process all of this is nothing.
"""

import contextlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from orbax.checkpoint import multihost

from coincide_jax.core.errors import UserError

FOREVER = 7 * 86_400_000  # ms that a process waits for another one; one that died is noticed within `HEARTBEAT`
HEARTBEAT = 60  # s without a sign of life after which a process counts as dead, and the others end too
AUTO = "auto"  # the cluster's own words: SLURM, Open MPI, Kubernetes, TPU pods
GRACE = 2.0  # s
STOPPED = 143  # exit status after SIGTERM, which all have heard: 128 + 15

_index, _count, _number = 0, 1, itertools.count()


def start(coordinator: str, count: int | None = None, index: int | None = None) -> None:
    """Joins the others, before anything else asks for a device.

    Args:
      coordinator: address and port of process 0, or 'auto', where JAX finds all three out.
      count, index: how many processes there are, and which of them this is.

    Raises:
      UserError: half of it given, or no such process reached.
    """
    auto = coordinator == AUTO
    if not auto and (count is None or index is None or not 0 <= index < count or ":" not in coordinator):
        raise UserError(
            f"coordinator={coordinator} processes={count} process={index}; expected HOST:PORT of process 0, the number "
            "of processes and which of them this is (0 to one less), or coordinator=auto on a cluster that JAX knows"
        )
    try:
        jax.distributed.initialize(None if auto else coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not find each other: {str(error).splitlines()[0]}") from error
    join()


def join() -> None:
    """Takes note of the processes that JAX was started with, by `start` or by whoever calls the pipeline."""
    global _index, _count
    _index, _count = jax.process_index(), jax.process_count()


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """One of several processes that fails inside it ends without the farewell that JAX says at exit, in which it would
    wait for others that are waiting for it. Those end too, as soon as they miss it."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit)
        if _count == 1 or (stopped and error.code == STOPPED):
            raise
        if not stopped:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if leads():
            time.sleep(GRACE)  # the others end with process 0: time to say what they have to say
        os._exit(error.code if stopped and isinstance(error.code, int) else 1)


def leads() -> bool:
    """Whether this is the process that writes and speaks."""
    return _index == 0


def share(items: Sequence) -> Sequence:
    """This process's part of what the processes do one by one."""
    return items[_index::_count]


def together() -> None:
    """Returns when every process is here: what each has written, all may read."""
    if _count > 1:
        client = multihost.get_jax_distributed_client()
        client.wait_at_barrier(f"coincide/{next(_number)}", timeout_in_ms=FOREVER)


def told(value) -> list:
    """What each process says, in their order, as JSON holds it."""
    if _count == 1:
        return [value]
    client, key = multihost.get_jax_distributed_client(), f"coincide/{next(_number)}"
    client.key_value_set(f"{key}/{_index}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{key}/{index}", FOREVER)) for index in range(_count)]


def led(action: Callable):
    """Runs `action` in process 0, while the others wait. Gives what it gave (as JSON holds it) to all.

    Raises:
      UserError: in all of them, when it did in process 0; in the others, whatever else ended it there.
    """
    if _count == 1:
        return action()
    client, key = multihost.get_jax_distributed_client(), f"coincide/{next(_number)}"
    if not leads():
        told = json.loads(client.blocking_key_value_get(key, FOREVER))
        if "error" in told:
            raise UserError(told["error"])
        return told["result"]
    try:
        result = action()
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else f"process 0 failed: {type(error).__name__}: {error}"
        client.key_value_set(key, json.dumps({"error": told}))
        raise
    client.key_value_set(key, json.dumps({"result": result}))
    return result
