"""The real engine under any sequence of calls, observations and deadlines."""

from __future__ import annotations

from hypothesis import settings

from proxy_fsm.testing.machine import ProxyMachine

TestProxyMachine = ProxyMachine.TestCase
TestProxyMachine.settings = settings(stateful_step_count=30, max_examples=300)
