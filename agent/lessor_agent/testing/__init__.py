"""For tests of agents, and of runtimes: what stands in for a host."""

from lessor_agent.testing.scripted import ScriptedExecution, ScriptedHost, ScriptedRuntime

__all__ = ["ScriptedExecution", "ScriptedHost", "ScriptedRuntime"]
