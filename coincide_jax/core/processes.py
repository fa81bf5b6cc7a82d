"""Several processes that run one command together, as a rule one a host (JAX's multi-controller runtime).

All run the same code on the same numbers, and share the arrays on the devices; the workdir is a folder that all see.
What happens outside the devices is done once: process 0 leads, it alone writes files and speaks (`leads`), and where
the others must wait for what it finds, or fail with it, they do so in `led`. With one process all of this is nothing.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from orbax.checkpoint import multihost

from coincide_jax.core.errors import UserError

WAIT = 300  # s for the others to come, at the start
HEARTBEAT = 60  # s without a sign of life after which a process counts as dead, and the others end too
GRACE = 2.0  # s
SLICE = 2000  # ms: between two looks for what another process is to say, a signal is heard
AUTO = "auto"  # the cluster's own words: SLURM, Open MPI, Kubernetes, TPU pods
STOPPED = 143  # exit status after SIGTERM, which all have heard: 128 + 15
AHEAD = 8  # steps from a request to stop to the stop; a loop's processes are never so far apart

_index, _count, _number = 0, 1, itertools.count()


def start(coordinator: str, count: int | None = None, index: int | None = None) -> None:
    """Joins the others, before anything else asks for a device. Processes too few, or two of one number, end in JAX's
    own words after `WAIT` seconds.

    Args:
      coordinator: address and port of process 0, or 'auto', where JAX finds all three out.
      count, index: how many processes there are, and which of them this is.

    Raises:
      UserError: half of it given, the port in use, nobody at the address, no cluster that JAX knows.
    """
    auto = coordinator == AUTO
    host, _, port = coordinator.rpartition(":")
    if not auto and (count is None or index is None or not 0 <= index < count or not host or not port.isdecimal()):
        raise UserError(
            f"coordinator={coordinator} processes={count} process={index}; expected HOST:PORT of process 0, the number "
            "of processes and which of them this is (0 to one less), or coordinator=auto on a cluster that JAX knows"
        )
    if not auto:
        _try_address(host.strip("[]"), int(port), index)
    # a signal is then Python's: outside of training it ends the process, inside `Stop` has all agree on a step
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            count,
            index,
            initialization_timeout=WAIT,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not find each other: {str(error).splitlines()[0]}") from error
    join()


def _try_address(host: str, port: int, index: int) -> None:
    """Raises `UserError` where process 0 cannot have the port, or another one cannot reach it. (What goes wrong inside
    JAX ends the process there.)"""
    if index == 0:
        try:
            with socket.create_server(("", port), family=socket.AF_INET):
                return
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} cannot be had: {error}; is there another process 0?") from error
    end = time.monotonic() + WAIT
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except (OSError, OverflowError) as error:
            if isinstance(error, OverflowError | socket.gaierror) or time.monotonic() > end:
                raise UserError(f"process 0 is not to be reached at {host}:{port}: {error}") from error
            time.sleep(0.5)


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
        if _count == 1 or (stopped and error.code in (None, 0, STOPPED)):
            raise
        if not stopped:
            traceback.print_exc()
        elif isinstance(error.code, str):
            print(error.code, file=sys.stderr)
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


def told(value) -> list:
    """What each process says, in their order, as JSON holds it; returns when all have said it."""
    if _count == 1:
        return [value]
    key = f"coincide/{next(_number)}"
    multihost.get_jax_distributed_client().key_value_set(f"{key}/{_index}", json.dumps(value))
    return [json.loads(_awaited(f"{key}/{index}")) for index in range(_count)]


def together() -> None:
    """Returns when every process is here: what each has written, all may read."""
    told(None)


def led(action: Callable):
    """Runs `action` in process 0, while the others wait. Gives what it gave (as JSON holds it) to all.

    Raises:
      UserError: in all of them, when it did in process 0; in the others, whatever else ended it there.
    """
    if _count == 1:
        return action()
    key = f"coincide/{next(_number)}"
    if leads():
        say = multihost.get_jax_distributed_client().key_value_set
        try:
            text = json.dumps({"result": action()})
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else f"process 0 failed: {type(error).__name__}: {error}"
            say(key, json.dumps({"error": why}))
            raise
        say(key, text)
    else:
        text = _awaited(key)
    found = json.loads(text)
    if "error" in found:
        raise UserError(found["error"])
    return found["result"]


def _awaited(key: str) -> str:
    """What another process says under a key, once it has. A process that died is noticed by JAX."""
    client = multihost.get_jax_distributed_client()
    while True:
        try:
            return client.blocking_key_value_get(key, SLICE)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


class Stop:
    """A request to stop that any of the processes may have got, and the step at which all of them do. Made by all."""

    def __init__(self):
        self.key = f"coincide/stop/{next(_number)}"
        self.said = False

    def now(self, requested: bool, step: int) -> bool:
        """Asked at every step, by all: whether this is the one to stop at. `requested`: whether this process was asked
        to."""
        if _count == 1:
            return requested
        client = multihost.get_jax_distributed_client()
        if requested and not self.said:
            client.key_value_set(f"{self.key}/{_index}", str(step + AHEAD))
            self.said = True
        asked = [int(at) for _, at in client.key_value_dir_get(self.key)]
        return bool(asked) and step >= min(asked)
