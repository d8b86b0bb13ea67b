"""The keeper: the small process that guards one lease on the host.

Two kinds of process run the code of this package, both without grpc, asyncio or
threads, so that they may fork:

* the **zygote** (:mod:`.zygote`), one per agent, forks keepers and exits with
  the agent;
* the **keeper** (:mod:`.guard`), one per lease, starts the workload
  (:mod:`.child`), counts its deadline (:mod:`.record`, :mod:`.verdict`), ends
  its whole process tree (:mod:`.tree`) and writes down how it ended
  (:mod:`.directory`). It outlives the agent.

The agent talks to them through :mod:`.nursery` (the zygote) and
``lessor_agent.runtimes.process_execution`` (a keeper).
"""
