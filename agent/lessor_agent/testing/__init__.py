"""For tests of agents, and of runtimes: what stands in for a host.

The suite that every runtime is held to is :mod:`lessor_agent.testing.conformance`, which alone needs pytest.
"""

from lessor_agent.testing.scripted import ScriptedExecution, ScriptedHost, ScriptedRuntime

__all__ = ["ScriptedExecution", "ScriptedHost", "ScriptedRuntime"]
