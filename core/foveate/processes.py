"""The processes of one run: when one of them fails or dies all end, and one says why.

Each process keeps a connection to process 0. The kernel closes it when its process ends, however that happens, and
keep-alive packets miss a machine that is gone. So nothing hangs on a collective operation that somebody will never
enter, and process 0 may fit a teacher for hours while the others wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

from foveate.errors import FoveateError, UserError

MEETING = timedelta(minutes=10)
"""How long processes wait for each other at the start."""
WORK = timedelta(days=7)
"""How long they wait in a collective operation, as long as all live."""
GRACE = 10.0
"""Seconds that the process which says why a run ends has for it, before the others end too."""
LOST = 60.0
"""Seconds between a collective operation that failed and the news that a process is gone, at most."""
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_NOT_OURS = {
    "ACCELERATE_USE_FSDP": "every process holds the whole model",
    "ACCELERATE_USE_DEEPSPEED": "every process holds the whole model",
    "ACCELERATE_USE_MEGATRON_LM": "every process holds the whole model",
    "ACCELERATE_DYNAMO_BACKEND": "the recipe's hardware.compile compiles",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "hardware.tokens_per_microbatch says how much is computed at a time",
}
"""What accelerate's configuration cannot change, and what does it instead."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_linked: Link | None = None


def launched() -> int:
    """How many processes the launcher says that this run has."""
    told = [os.environ[name] for name in _SIZES if os.environ.get(name, "").isdecimal()]
    return int(told[0]) if told else 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, the processes that were launched together are one: what is raised in one of them ends all.

    In the first process that raises it goes on its way; the others end without a word, with the same exit status. Does
    nothing where there is one process, and inside itself. Raises `UserError` where accelerate is told otherwise.
    """
    global _linked
    for name, instead in _NOT_OURS.items():
        if (value := os.environ.get(name, "").lower()) not in ("", "no", "false", "0", "1"):
            raise UserError(f"{name}={value}, set by `accelerate launch`, is not for foveate: {instead}. Take it out.")
    if launched() == 1 or _linked is not None:
        yield
        return
    link = _linked = _meet(launched())
    try:
        yield
        link.leave()
        _linked = None
    except BaseException as error:
        told = link.failed(error)
        if told is error:
            raise
        raise told from error


def _meet(asked: int) -> Link:
    """Joins the process group. Raises `FoveateError` where the others do not come or nobody knows of them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=MEETING, **({"backend": "gloo"} if cpu else {}))
        if state.num_processes == asked:
            link = Link(state)
            torch.distributed.set_timeout(WORK)
            return link
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise FoveateError(
            f"process {os.environ.get('RANK', '?')} of {asked} has not met the others: {why}. Launch with torchrun or "
            "`accelerate launch --multi_gpu` (docs/distributed.md)."
        ) from error
    raise UserError(
        f"this was launched as {asked} processes, and each of them would train alone. Launch it with torchrun "
        f"(`torchrun --nproc_per_node={asked} -m foveate train RECIPE`) or as docs/distributed.md says."
    )


class Link:
    """This process's connections: of process 0 to all others, of the others to process 0.

    In each direction goes one line of JSON at most: `{}` from who leaves, or the verdict that ends the run, with
    `teller` (the process that says it), its `host`, `text` and exit `code`. Process 0 picks the first and hands it on.
    """

    def __init__(self, state: Any) -> None:
        self.rank, self.world, self.state = state.process_index, state.num_processes, state
        self._lock, self._decided = threading.Lock(), threading.Event()
        self._verdict: dict[str, Any] | None = None
        self._peers = self._connect()
        os.register_at_fork(after_in_child=self._close)  # or a worker would keep a dead process's connection open
        threading.Thread(target=self._watch, name="foveate-link", daemon=True).start()

    def _connect(self) -> dict[int, socket.socket]:
        from torch.distributed import broadcast_object_list

        peers: dict[int, socket.socket] = {}
        if self.rank == 0:
            with socket.create_server(("", 0), backlog=self.world) as server:
                secret = secrets.token_hex(16)
                broadcast_object_list([(server.getsockname()[1], secret)], src=0)
                server.settimeout(LOST)
                while len(peers) < self.world - 1:
                    peer = _kept_alive(server.accept()[0])
                    hello = _receive(peer) or {}
                    if hello.get("secret") == secret:
                        peers[hello["rank"]] = peer
        else:
            facts: list[Any] = [None]
            broadcast_object_list(facts, src=0)
            [(port, secret)] = facts
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            peers[0] = _kept_alive(socket.create_connection((host, port), timeout=LOST))
            _send(peers[0], {"secret": secret, "rank": self.rank})
        for peer in peers.values():
            peer.settimeout(None)
        return peers

    def _watch(self) -> None:
        """Waits for what the others say, or no longer say."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    heard = _receive(key.fileobj)
                    selector.unregister(key.fileobj)
                    if heard is None:
                        text = (
                            f"process {key.data} of {self.world} is gone: killed (out of memory?), or its machine has "
                            "failed. --resume goes on from the last checkpoint, with any number of processes"
                        )
                        heard = self._words(text, 1)
                        if self._decide(heard):
                            self._end(heard, tells=self.rank < 2 or self.state.is_local_main_process)
                    elif heard and self._decide(heard) and heard["teller"] != self.rank:
                        self._end(heard)

    def _words(self, text: str, code: int) -> dict[str, Any]:
        return {"teller": self.rank, "host": socket.gethostname(), "text": text, "code": code}

    def _decide(self, verdict: dict[str, Any]) -> bool:
        """Takes a verdict, if it is the first; process 0 hands it on."""
        with self._lock:
            if self._verdict is not None:
                return False
            self._verdict = verdict
            for peer in self._peers.values() if self.rank == 0 else ():
                _send(peer, verdict)
        self._decided.set()
        return True

    def _end(self, verdict: dict[str, Any], tells: bool = False) -> NoReturn:
        """Ends this process from a thread, whatever its main thread waits for; after the one that says why."""
        if not tells:
            teller = self._peers.get(verdict["teller"] if self.rank == 0 else 0)
            with contextlib.suppress(OSError):
                if teller is not None:
                    teller.settimeout(GRACE if self.rank == 0 else 2 * GRACE)
                    teller.recv(1)
        elsewhere = verdict["host"] != socket.gethostname()
        if tells or (elsewhere and self.state.is_local_main_process):
            shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a progress bar hides
            sys.stderr.write(f"{shown}error: {verdict['text']}\n")
            sys.stderr.flush()
        os._exit(verdict["code"])

    def failed(self, error: BaseException) -> BaseException:
        """What to raise in the process that says why the run ends; the others do not come back from here."""
        if _is_collective(error):
            self._decided.wait(LOST)  # somebody is gone, and the watching thread will hear of it
            error = FoveateError(f"the processes have lost each other: {error}. --resume goes on.")
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        text = str(error) if isinstance(error, FoveateError) else f"{type(error).__name__}: {error}"
        words = self._words(text, code)
        if self.rank == 0:
            self._decide(words)
        else:
            _send(self._peers[0], words)
            self._decided.wait(GRACE)
        while self._verdict is not None and self._verdict["teller"] != self.rank:
            time.sleep(GRACE)  # until the watching thread ends this process
        return error

    def leave(self) -> None:
        """All are at the end: whoever goes now is not missed."""
        self.state.wait_for_everyone()
        atexit.register(self.state.destroy_process_group)  # NCCL wants it, and another run may come before
        for peer in self._peers.values():
            _send(peer, {})

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _is_collective(error: BaseException) -> bool:
    """Whether an error only says that another process has gone."""
    from torch.distributed import DistError

    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(LOST)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _send(peer: socket.socket, words: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who is gone already needs no words
        peer.sendall(json.dumps(words).encode() + b"\n")


def _receive(peer: Any) -> dict[str, Any] | None:
    """One line, read byte by byte: nothing after it may be taken away. None where the connection is closed."""
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and (byte := peer.recv(1)):
            line += byte
    with contextlib.suppress(ValueError):
        words = json.loads(line)
        return words if isinstance(words, dict) else None
    return None
