"""Several processes end together, each with the line of the one that had an error or died.

A process that waits in a collective for one that is gone is ended by jax after the heartbeat, by an
abort with stack traces. So each process here has a connection to process 0, which the system
closes at once when a process dies, and which carries the line that says why one ends.
"""

import contextlib
import json
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Self

import jax
from tqdm.auto import tqdm

from sedd_jax.parallel import processes

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds for a process to connect, and for the others to end
DELAY = 0.5  # seconds in which the end of another process, if that caused an error, is heard of
KEEPALIVE = 60  # seconds between two signs of life of a connection that is not used
BYE: dict[str, Any] = {}  # the message of a process that ends without an error

Message = dict[str, Any]  # {"text": str, "status": int}
Event = tuple[int | None, Message]  # the process that ends, None for this one, and why


class SharedEnd:
    """While entered, an error, a signal or the death of one process ends all, each with a line.

    Entering is a collective. A process that leaves without an exception ends nobody; an error is
    ended with `fail`. A thread does the ending, for the main one may wait in a collective.
    """

    def __init__(self, name: str, host: str | None = None, *, with_signals: bool = False):
        """name begins each line; host is an address of process 0, beside its host's name;
        with_signals, SIGINT and SIGTERM end all at once."""
        self.name, self.with_signals = name, with_signals
        self._hosts = [host] if host else []
        self._peers: dict[socket.socket, int] = {}  # the links, process 0's to all others
        self._unread: dict[socket.socket, bytes] = {}
        self._leaving: set[int] = set()  # who said why it ends
        self._selector = selectors.DefaultSelector()
        self._handlers: dict[int, Any] = {}  # of signals, as they were before
        self._wakeup_fd = -1  # likewise
        self._error: Message = {}

    def __enter__(self) -> Self:
        self._connect()
        self._wake_end, self._wake = os.pipe()  # a byte for each signal, 0 for `fail`
        os.set_blocking(self._wake, False)
        self._selector.register(self._wake_end, selectors.EVENT_READ)
        if self.with_signals and threading.current_thread() is threading.main_thread():
            self._wakeup_fd = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a library's
                    self._handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self._tell(BYE)
        if self.with_signals and threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_fd)

    def fail(self, message: str, status: int, details: str = "") -> NoReturn:
        """Ends all processes with the exit status and a line, which on the others says whose it
        is; before it the details, here alone. If another's end is what caused the error, the line
        is of that."""
        self._error = {"text": message, "status": status, "details": details}
        os.write(self._wake, b"\0")
        while True:
            time.sleep(PATIENCE)

    # --- the connections

    def _connect(self) -> None:
        """Connects the other processes with process 0. Those that cannot are left to jax's
        heartbeat."""
        server, mine = None, ""
        if processes.is_first():
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            # All connect before one is accepted.
            how = {"family": family, "dualstack_ipv6": dual, "backlog": jax.process_count()}
            server = socket.create_server(("", 0), **how)
            hosts = [*self._hosts, socket.gethostname()]
            mine = json.dumps([hosts, server.getsockname()[1], secrets.token_hex(16)])
        hosts, port, token = json.loads(processes.gather_text(mine)[0])
        fault = ""
        if server is None:
            try:
                link = _first_answer(hosts, port)
                link.sendall(f"{token} {jax.process_index()}\n".encode())
                self._watch(link, 0)
            except (OSError, UnicodeError) as error:
                fault = f"{' and '.join(hosts)}, port {port}: {error}"
        faults = processes.gather_text(fault)
        if server is not None:
            with server:
                self._accept(server, token, faults.count("") - 1)
        linked = json.loads(processes.gather_text(json.dumps([*self._peers.values()]))[0])
        if server is not None:
            for index in sorted({*range(1, len(faults))} - {*linked}):
                log.warning(
                    "process %d has no connection with process 0 (%s); if one of them dies, the "
                    "other ends after --heartbeat seconds",
                    index,
                    faults[index] or f"none came through within {PATIENCE:g} s",
                )
        elif jax.process_index() not in linked:
            for link in [*self._peers]:
                self._unwatch(link)
                link.close()

    def _accept(self, server: socket.socket, token: str, count: int) -> None:
        end = time.monotonic() + PATIENCE
        while len(self._peers) < count and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                link, _ = server.accept()
                link.settimeout(DELAY)  # a stranger may say nothing
                first, _, unread = link.recv(1024).partition(b"\n")
                theirs, index = first.decode("ascii").split()
                if secrets.compare_digest(theirs, token):  # a stranger's is dropped
                    self._watch(link, int(index), unread)

    def _watch(self, link: socket.socket, index: int, unread: bytes = b"") -> None:
        link.settimeout(PATIENCE)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):  # before a firewall forgets the connection
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE)
        self._peers[link], self._unread[link] = index, unread
        self._selector.register(link, selectors.EVENT_READ)

    def _unwatch(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        del self._peers[link]

    def _tell(self, message: Message, *, except_for: int | None = None) -> None:
        """Sends a message to all that this process is connected with, except for one."""
        for link, index in list(self._peers.items()):
            if index != except_for:
                with contextlib.suppress(OSError):  # it is gone
                    link.sendall(json.dumps(message).encode() + b"\n")

    # --- the thread

    def _listen(self) -> None:
        try:
            while True:
                for source, message in self._events(None):
                    self._end(source, message)
        except Exception:  # noqa: BLE001 (the main thread may wait in `fail`)
            traceback.print_exc()
        finally:
            os._exit(1)

    def _events(self, seconds: float | None) -> Iterator[Event]:
        """What happens next within so many seconds."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj == self._wake_end:
                for number in os.read(self._wake_end, 64):
                    if number == 0:
                        yield None, self._error
                    elif number in self._handlers:
                        name = signal.Signals(number).name
                        yield None, {"text": f"stopped by {name}", "status": 128 + number}
            else:
                yield from self._received(key.fileobj)

    def _received(self, link: socket.socket) -> Iterator[Event]:
        index = self._peers[link]
        try:
            data = link.recv(2**16)
        except TimeoutError:  # of keepalive: the network, and not the process, may be gone
            log.warning("the connection with process %d is lost; it may go on", index)
            self._unwatch(link)
            return
        except OSError:
            data = b""
        *lines, self._unread[link] = (self._unread[link] + data).split(b"\n")
        for message in map(json.loads, lines):
            self._leaving.add(index)
            if message != BYE:
                yield index, message
        if not data:
            self._unwatch(link)
            if index not in self._leaving:
                text = (
                    f"process {index} is gone without a word: it was killed, perhaps for memory, "
                    "or its machine has stopped; what it wrote may say more"
                )
                yield index, {"text": text, "status": 1}

    def _end(self, source: int | None, message: Message) -> NoReturn:
        """Says why, passes it on and ends this process."""
        if source is None and message["status"] < 128:
            for index, heard in self._within(DELAY):
                if index is not None and not heard["text"].endswith(message["text"]):
                    source, message = index, heard
                    break
        prefix = f"process {jax.process_index()}: " if source is None else ""
        if source is None or processes.is_first():
            self._tell(
                {**message, "text": prefix + message["text"], "details": ""}, except_for=source
            )
        try:
            # No progress bar comes back. One that could not be written has kept the lock for ever.
            tqdm.get_lock().acquire(timeout=DELAY)
            with tqdm.external_write_mode(file=sys.stderr, nolock=True):
                print(end=message.get("details", ""), file=sys.stderr)
                print(f"{self.name}: error: {message['text']}", file=sys.stderr, flush=True)
                if processes.is_first():  # jax aborts the others when it is gone: they go first
                    for _ in self._within(PATIENCE):
                        pass
                # The main thread may hold standard output, which nobody reads.
                flush = threading.Thread(target=sys.stdout.flush, daemon=True)
                flush.start()
                flush.join(DELAY)
        finally:
            os._exit(message["status"])

    def _within(self, seconds: float) -> Iterator[Event]:
        """The events of the next seconds, while there are links."""
        end = time.monotonic() + seconds
        while self._peers and (left := end - time.monotonic()) > 0:
            yield from self._events(left)


def _first_answer(hosts: Sequence[str], port: int) -> socket.socket:
    """A connection to the first host that answers; OSError if none does."""
    for host in hosts[:-1]:
        with contextlib.suppress(OSError, UnicodeError):
            return socket.create_connection((host, port), timeout=PATIENCE)
    return socket.create_connection((hosts[-1], port), timeout=PATIENCE)
