"""Connects to a server as the user's ``ssh`` would: with fabric, but stricter about host keys."""

from __future__ import annotations

import getpass
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - the command line's parser reads the annotations
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import fabric  # type: ignore[import-untyped]
import paramiko
from cyclopts import Group, Parameter
from cyclopts.validators import Number

from proxy_fsm import fast_transport
from proxy_fsm.cli.ssh_config import read_ssh_config
from proxy_fsm.cli.verb import NotReachedError, UsageError, is_interactive
from proxy_fsm.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy_fsm.cli.interrupts import Interrupts
    from proxy_fsm.cli.output import Output

__all__ = ["SSHOptions", "ssh_login"]

_GROUP = Group("Connection", sort_key=1)
_CONNECT_S = 15
_TYPING_S = 120
_PASSWORDS = 3
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_SYSTEM_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True, kw_only=True)
class SSHOptions:
    """How to reach the server; ``~/.ssh/config`` and the SSH agent supply the rest.

    Attributes:
        port: The SSH server's port.
        key: A private key to log in with, before those of ``~/.ssh/config`` and of the SSH agent.
        known_hosts: The only file whose host keys are trusted; by default OpenSSH's own files.
        accept_unknown_host: Accept an unknown host key, this once and without saving it. A key that differs from the
            known one is always rejected.
    """

    port: Annotated[int | None, Parameter(name=("--port", "-p"), validator=Number(gte=1, lte=65_535))] = None
    key: Annotated[Path | None, Parameter(name=("--key", "-i"))] = None
    known_hosts: Path | None = None
    accept_unknown_host: bool = False


@contextmanager
def ssh_login(target: str, options: SSHOptions, output: Output, interrupts: Interrupts) -> Iterator[paramiko.Transport]:
    """Connect and log in; disconnect on the way out.

    Args:
        target: ``[USER@]HOST``, where the host may be an alias of ``~/.ssh/config``.
        options: The user's connection options.
        output: Receives the events.
        interrupts: Signals; one of them ends the wait.

    Yields:
        The transport, set up for speed.

    Raises:
        UsageError: An option or ``~/.ssh/config`` cannot be used.
        NotReachedError: The server could not be reached, its host key is not trusted, or the login was rejected.
        Interrupted: A signal came while connecting.
    """
    started = time.monotonic()
    dialogue = _Dialogue(is_interactive())
    hops = _hops(target, options, output, dialogue)
    try:
        worker = threading.Thread(target=_open_all, args=(hops, dialogue), name="connect", daemon=True)
        worker.start()
        dialogue.serve(interrupts)
        server = hops[-1]
        output.log.info(
            "connect.opened",
            host=server.host,
            port=server.port,
            user=server.user,
            via=[f"{hop.host}:{hop.port}" for hop in hops[:-1]],
            elapsed_s=round(time.monotonic() - started, 6),
        )
        yield server.transport
    finally:
        for hop in reversed(hops):
            with suppress(OSError, EOFError, paramiko.SSHException):  # already disconnected
                hop.client.close()


class UnknownHostKeyError(paramiko.SSHException):
    """No file of known hosts names this host."""

    def __init__(self, host: str, key: paramiko.PKey) -> None:
        self.host = host
        self.key = key
        super().__init__(f"The host key of {host} is not known.")


class _Policy(paramiko.MissingHostKeyPolicy):
    """Decides on hosts without a known key; paramiko itself rejects a key that differs from the known one."""

    def __init__(self, output: Output, *, accept: bool) -> None:
        self._output = output
        self._accept = accept

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:  # noqa: ARG002
        if not self._accept:
            raise UnknownHostKeyError(hostname, key)
        self._output.log.warning(
            "host_key.accepted", host=hostname, key_type=key.get_name(), fingerprint=key.fingerprint
        )


@dataclass
class _Dialogue:
    """The connecting thread asks; the main thread, which receives the signals, answers.

    Attributes:
        may_ask: Whether there is a person at a terminal.
    """

    may_ask: bool
    _messages: SimpleQueue[tuple[str | None, Exception | None]] = field(default_factory=SimpleQueue)
    _answers: SimpleQueue[str] = field(default_factory=SimpleQueue)

    def ask(self, prompt: str) -> str:
        """Return what the user typed; on the connecting thread."""
        self._messages.put((prompt, None))
        return self._answers.get()

    def finish(self, error: Exception | None) -> None:
        """Report the outcome; on the connecting thread."""
        self._messages.put((None, error))

    def serve(self, interrupts: Interrupts) -> None:
        """Answer prompts until the connecting thread has finished, and raise its error."""
        while True:
            with interrupts.waiting():
                prompt, error = self._messages.get()
                answer = "" if prompt is None else getpass.getpass(prompt)
            if prompt is not None:
                self._answers.put(answer)
            elif error is not None:
                raise error
            else:
                return


def _hops(target: str, options: SSHOptions, output: Output, dialogue: _Dialogue) -> list[fabric.Connection]:
    """Make the connections to open one after the other; the last one leads to the server."""
    if options.key is not None and not os.access(options.key, os.R_OK):
        raise UsageError(f"The key {options.key} cannot be read.")
    try:
        # Lazy: do not read fabric's own files, which configure another program.
        config = fabric.Config(ssh_config=read_ssh_config(), lazy=True)
        server = fabric.Connection(
            target,
            port=options.port,
            config=config,
            gateway=_no_jump(config, target),
            connect_kwargs={} if options.key is None else {"key_filename": [str(options.key)]},
        )
    except (OSError, ValueError, paramiko.SSHException) as error:
        raise UsageError(f"{target} cannot be connected to: {error}", "Check HOST and ~/.ssh/config.") from error
    hops = [server]
    while isinstance(hops[0].gateway, fabric.Connection):
        hops.insert(0, hops[0].gateway)
    for hop in hops:
        _prepare(hop, options, output, dialogue)
    return hops


def _no_jump(config: fabric.Config, target: str) -> bool | None:
    """Return fabric's value for "no gateway" if the configuration says ``ProxyJump none``, else None.

    Raises:
        ValueError: The target names no host.
    """
    host = fabric.connection.derive_shorthand(target)["host"]
    if not host:
        raise ValueError("it names no host.")
    return False if config.base_ssh_config.lookup(host).get("proxyjump", "").lower() == "none" else None


def _prepare(hop: fabric.Connection, options: SSHOptions, output: Output, dialogue: _Dialogue) -> None:
    """Replace unsafe defaults of fabric and paramiko: any host key is accepted, prompts go to standard output."""
    hop.client.set_missing_host_key_policy(_Policy(output, accept=options.accept_unknown_host))
    _load_known_hosts(hop, options)
    keys = hop.connect_kwargs.get("key_filename", [])
    hop.connect_kwargs = {
        **hop.connect_kwargs,
        "key_filename": [name for name in keys if os.path.isfile(os.path.expanduser(name))],  # noqa: PTH111, PTH113
        "transport_factory": _transport_factory(dialogue),
        "channel_timeout": _CONNECT_S,
        "auth_timeout": _TYPING_S if dialogue.may_ask else 2 * _CONNECT_S,
    }
    hop.connect_timeout = hop.connect_timeout or _CONNECT_S


def _load_known_hosts(hop: fabric.Connection, options: SSHOptions) -> None:
    named = hop.ssh_config.get("userknownhostsfile")
    files = [*(named.split() if named else _KNOWN_HOSTS), *_SYSTEM_KNOWN_HOSTS]
    if options.known_hosts is not None:
        files = [str(options.known_hosts)]
    known = paramiko.HostKeys()
    for name in files:
        try:
            known.load(os.path.expanduser(name))  # noqa: PTH111 - it may be any string
        except FileNotFoundError as error:
            if options.known_hosts is not None:
                raise UsageError(f"The file of known hosts {name} does not exist.") from error
        except (OSError, ValueError, paramiko.SSHException) as error:
            raise UsageError(f"The file of known hosts {name} cannot be read: {error}") from error
    own_name = hop.host if hop.port == paramiko.config.SSH_PORT else f"[{hop.host}]:{hop.port}"
    for key_type, key in (known.lookup(hop.ssh_config.get("hostkeyalias", own_name)) or {}).items():
        hop.client.get_host_keys().add(own_name, key_type, key)


def _transport_factory(dialogue: _Dialogue) -> Callable[..., paramiko.Transport]:
    def make(sock: Any, **kwargs: Any) -> paramiko.Transport:
        transport = fast_transport(sock, **kwargs)

        def second_factor(username: str, *_: object) -> list[str]:
            if not dialogue.may_ask:
                raise paramiko.AuthenticationException("The server asks for a second factor, but there is no terminal.")
            return transport.auth_interactive(
                username, lambda _title, _text, prompts: [dialogue.ask(printable(prompt)) for prompt, _ in prompts]
            )

        # paramiko's own prints on standard output and reads standard input.
        transport.auth_interactive_dumb = second_factor  # type: ignore[method-assign,assignment]
        return transport

    return make


def _open_all(hops: list[fabric.Connection], dialogue: _Dialogue) -> None:
    for hop in hops:
        try:
            _open(hop, dialogue)
        except Exception as error:  # noqa: BLE001 - the main thread reports it
            dialogue.finish(_as_not_reached(error, hop))
            return
    dialogue.finish(None)


def _open(hop: fabric.Connection, dialogue: _Dialogue) -> None:
    for attempt in range(_PASSWORDS + 1):
        try:
            hop.open()
        except paramiko.SSHException as error:
            last = attempt == _PASSWORDS or not dialogue.may_ask or not _login_rejected(hop, error)
            password = "" if last else dialogue.ask(f"Password of {hop.user}@{hop.host} (or of its key): ")
            if not password:
                raise
            hop.client.close()
            hop.connect_kwargs["password"] = password
        else:
            return


def _login_rejected(hop: fabric.Connection, error: Exception) -> bool:
    """Return whether the login failed on a server whose host key was accepted."""
    if isinstance(error, UnknownHostKeyError | paramiko.BadHostKeyException):
        return False
    if isinstance(error, paramiko.AuthenticationException | paramiko.PasswordRequiredException):
        return True
    transport = hop.client.get_transport()
    # paramiko tries a key file as every key type, and its error only says that the last type did not fit.
    return transport is not None and transport.is_active() and transport.initial_kex_done


def _as_not_reached(error: Exception, hop: fabric.Connection) -> Exception:
    where = f"{hop.host}:{hop.port}"
    key: paramiko.PKey | None = None
    match error:
        case UnknownHostKeyError(host=host, key=key):
            reason = "host_key_unknown"
            detail = f"The host key of {host} is not known."
            hint = (
                "Compare its fingerprint with the server's, then add it to ~/.ssh/known_hosts (ssh-keyscan shows it), "
                "or pass --accept-unknown-host."
            )
        case paramiko.BadHostKeyException(key=key):
            reason = "host_key_changed"
            detail = f"The host key of {where} is not the known one: it was changed, or the connection is intercepted."
            hint = "Ask the server's administrator; only then remove the old key with ssh-keygen -R."
        case socket.gaierror() | UnicodeError():  # the latter: a label is empty or too long
            reason = "name_unknown"
            detail = f"The name {hop.host} cannot be resolved: {_sentence(error)}"
            hint = "Check HOST, and HostName in ~/.ssh/config."
        case paramiko.ChannelException():
            reason = "unreachable"
            detail = f"The jump host did not open a channel to {where}: {_sentence(error)}"
            hint = "Check ProxyJump, and whether the jump host allows forwarding."
        case paramiko.SSHException() if _login_rejected(hop, error):
            reason = "not_authenticated"
            detail = f"{where} rejected the login of {hop.user}: {_sentence(error)}"
            hint = "Name the key with -i, or load it into the SSH agent (a key with a passphrase too)."
        case OSError() | OverflowError():  # NoValidConnectionsError and time-outs too; the latter: a port above 65535
            reason = "unreachable"
            detail = f"{where} could not be reached: {_sentence(error)}"
            hint = "Check host, port and network."
        case paramiko.SSHException() | EOFError():
            reason = "no_ssh"
            detail = f"The SSH handshake with {where} failed: {_sentence(error)}"
            hint = "Make sure that an SSH server listens there."
        case _:
            return error
    fields = {"reason": reason, "host": hop.host, "port": hop.port, "user": hop.user}
    if key is not None:
        fields |= {"key_type": key.get_name(), "fingerprint": key.fingerprint}
    return NotReachedError("connect.failed", detail, hint, **fields)


def _sentence(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
