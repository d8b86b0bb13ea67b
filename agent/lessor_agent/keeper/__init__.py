"""The keeper: the small process that guards one lease on the host.

Two kinds of process run the code of this package, both without grpc or asyncio
and with one thread, so that they may fork:

* the **zygote** (:mod:`.zygote`), one per agent, forks keepers and ends what a
  killed one leaves; it stays until the last of them has ended;
* the **keeper** (:mod:`.duty`), one per lease, guards it (:mod:`.guard`): starts
  the workload (:mod:`.child`), counts its deadline (:mod:`.record`,
  :mod:`.verdict`), ends its whole process tree (:mod:`.tree`) and writes down how
  it ended (:mod:`.directory`). It outlives the agent. Afterwards it waits a few
  seconds for another lease: most of what a short job costs is a keeper's fork.

While a keeper starts a workload it has a second thread (:mod:`.spawned_child`);
one that ever had does not fork.

The agent talks to them through :mod:`.nursery` (the zygote) and
``lessor_agent.runtimes.process_execution`` (a keeper).
"""
