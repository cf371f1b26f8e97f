"""Channels that cannot harm their transport, and a transport's signs of life.

This is the only part that depends on paramiko's internals. What it uses beyond the public API is checked by
`tests/ssh/test_reliance.py`, which names whatever a new paramiko has changed:

* ``Transport``: ``lock``, ``_channels`` (``put``, ``delete``), ``_next_channel``, ``channel_events``,
  ``channels_seen``, ``saved_exception``, ``_send_user_message``, ``_send_message``, ``clear_to_send``,
  ``clear_to_send_lock``, ``packetizer``, ``run``, ``_handler_table``, ``_parse_disconnect``
* ``Channel``: ``_set_transport``, ``_set_window``, ``_close_internal``, ``_set_closed``, ``_unlink``,
  ``_check_add_window``, ``_wait_for_send_window``, ``in_buffer``
* ``BufferedPipe``: ``_lock``, ``_cv``, ``_buffer``, ``_closed``
* ``Packetizer``: ``__aead_in``, ``__aead_out``, ``__block_engine_in``, ``__block_engine_out``,
  ``__compress_engine_in``, ``__compress_engine_out``, ``__dump_packets``, ``__iv_in``, ``__iv_out``,
  ``__received_bytes``, ``__received_bytes_overflow``, ``__received_packets``, ``__received_packets_overflow``,
  ``__remainder``, ``__sent_bytes``, ``__sent_packets``, ``__sequence_number_in``, ``__sequence_number_out``,
  ``__write_lock``, ``_check_keepalive``, ``_inc_iv_counter``, ``_log``, ``_trigger_rekey``
* ``transport``: ``_active_threads``

Tested with paramiko 3.5.1, 4.0.0, 5.0.0, 5.0.1 and 5.1.0: all of this holds in each, and the tunnel's tests pass. It
holds in 3.4.1 too, but that has no AES-GCM, so `fast_transport` is no faster there.

Three things are done differently from ``Transport.open_channel`` and ``Channel.close``, for these reasons:

* An open is a request and, later, its answer; nothing has to wait in between, an abandoned open that succeeds late is
  closed, and each refusal reaches the open that it answers.
* A channel's CLOSE is sent by the thread that used the channel, when it is done, and not by whichever thread
  notices first. So data can never follow it, to which OpenSSH responds by closing the whole connection
  (paramiko issues 1115 and 1705), and the transport's own thread never waits for a key exchange that only
  it can finish (issue 822).
* The end of a transport is reported by the transport: it unlinks its channels, and one of them is ours.

Three things are changed in the caller's transport for good: `set_nodelay` before a proxy is started, and, when the
first channel is opened here:

* What its own thread has to send during a key exchange is sent afterwards. In paramiko that thread waits for itself,
  for 30 s, and then the transport is dead: the answer to any channel's CLOSE is enough, the caller's own commands
  included, and so is a keepalive. Without a tunnel hardly any transport carries the 512 MiB after which paramiko
  rekeys; with one it takes seconds. When keys are exchanged, and which, is unchanged. Our own channels wait for a key
  exchange as long as it takes: if they gave up after paramiko's 30 s, which a slow link may need to deliver the data
  in flight, bytes would be lost.
* The refusal of an open of ours is kept from paramiko, which stores only the last refusal: ours, or a probe's, would
  overwrite one that the caller is about to read.

For speed, a channel's data is written straight to its socket, on the transport's thread (`SafeChannel.deliver`), and a
transport made by `fast_transport` has a packetizer of its own (`fast`).
"""

from proxy_fsm.ssh.channel import WINDOW_BYTES, SafeChannel
from proxy_fsm.ssh.command import CompletedCommand, RemoteCommand
from proxy_fsm.ssh.errors import (
    ChannelRefused,
    CommandCancelled,
    CommandFailed,
    CommandNotRun,
    NotOpened,
    OpenAbandoned,
    TransportClosed,
)
from proxy_fsm.ssh.fast import fast_transport, received_ago_s, set_nodelay
from proxy_fsm.ssh.framed import FramedCommand, words
from proxy_fsm.ssh.opening import ChannelOpening, EndWatch, packets_received, why_ended

__all__ = [
    "WINDOW_BYTES",
    "ChannelOpening",
    "ChannelRefused",
    "CommandCancelled",
    "CommandFailed",
    "CommandNotRun",
    "CompletedCommand",
    "EndWatch",
    "FramedCommand",
    "NotOpened",
    "OpenAbandoned",
    "RemoteCommand",
    "SafeChannel",
    "TransportClosed",
    "fast_transport",
    "packets_received",
    "received_ago_s",
    "set_nodelay",
    "why_ended",
    "words",
]
