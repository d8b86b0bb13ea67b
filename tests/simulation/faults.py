"""What goes wrong in a run. Each seed has a mixture of its own: some faults often, most of them not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from tests.simulation.agent import Agent
from tests.simulation.network import Network, Way
from tests.simulation.network import Weather as NetworkWeather
from tests.simulation.postgres import SimulatedPostgres
from tests.simulation.postgres import Weather as DatabaseWeather
from tests.simulation.replica import Replica
from tests.simulation.scheduler import Process, Scheduler

_CUTS_S = ((8.0, 17.0), (10.0, 12.5), (11.0, 16.0))
"""Longer than a lease stands, or nearly; often just as long."""


class Faults:
    """Breaks things, and mends them all at the end."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        postgres: SimulatedPostgres,
        agents: Sequence[Agent],
        replicas: Sequence[Replica],
        until_ns: int,
    ) -> None:
        self._scheduler = scheduler
        self._network = network
        self._postgres = postgres
        self._agents = agents
        self._replicas = replicas
        self.until_ns = until_ns
        self._kinds: list[Callable[[], None]] = [
            self._crash_agent,
            self._pause_agent,
            self._crash_replica,
            self._pause_replica,
            self._cut_off,
            self._cut_all_off,
            self._cut_one_way,
            self._break_stream,
            self._half_open,
            self._database_down,
            self._reboot,
            self._kill_keeper,
            self._wall_jump,
        ]
        random = scheduler.random
        self._weights = [random.choice((0, 0, 1, 3)) for _ in self._kinds]
        # Whatever else there is: leases run out, and the first of them early.
        for _ in range(random.choice((1, 2))):
            scheduler.after(scheduler.between_ns(1.5, 9.0), "", self._cut_off)
        self._weights[self._kinds.index(self._cut_off)] = random.choice((1, 3, 6))
        self._every_s = random.choice((0.7, 1.5, 3.0))
        self._cut_until_ns: dict[Agent, int] = {}
        self._cuts_s: tuple[tuple[float, float], ...] = _CUTS_S
        self._draw_weather()
        theme = random.choice((None, None, self._deadlines, self._late_acks, self._late_hellos, self._stopped_leaders))
        if theme is not None:
            theme()
        self._plan()

    def _draw_weather(self) -> None:
        random = self._scheduler.random
        self._network.weather = random.choice(
            (
                NetworkWeather(),
                NetworkWeather(usual_s=0.002, rare_s=0.02),
                NetworkWeather(usual_s=0.2, rare_s=5.0, rarely=0.1),
                NetworkWeather(usual_s=0.01, rare_s=7.0, rarely=0.15),
            )
        )
        self._postgres.weather = DatabaseWeather(
            hold=random.choice((0.02, 0.1, 0.25)),
            long_hold=random.choice((0.0, 0.1, 0.4)),
            long_hold_s=random.choice((1.0, 4.0, 9.0)),
            slow_commit=random.choice((0.0, 0.3)),
            reset=random.choice((0.0, 0.0, 0.005, 0.02)),
            rare_s=random.choice((0.05, 2.0)),
        )
        for agent in self._agents:
            weather = agent.weather
            weather.disk_rare_s = random.choice((0.2, 3.0))
            weather.disk_fails = random.choice((0.0, 0.0, 0.05))
            weather.prepare_rare_s, weather.prepare_rarely = random.choice(((1.0, 0.05), (14.0, 0.4), (0.1, 0.0)))
            agent.crash_in_burst = random.choice((0.0, 0.0, 0.003))
            agent.host.keepers_late = random.choice((0.05, 0.9))
            agent.on_crash = _bound(self._restart_agent, agent)
        quick = random.random() < 0.3
        for replica in self._replicas:
            replica.quick = quick

    # ── themes: little goes wrong, but again and again where it matters ──────

    def _only(self, fault: Callable[[], None], every_s: float) -> None:
        self._kinds, self._weights, self._every_s = [fault], [1], every_s
        # Time for two rounds of it.
        self.until_ns = self._scheduler.between_ns(26.0, 32.0)
        self._network.weather = NetworkWeather(usual_s=0.005, rare_s=0.05)
        for agent in self._agents:
            agent.weather.prepare_rare_s = 0.1

    def _deadlines(self) -> None:
        """Leases run out under live executions, and everybody is prompt but the keepers."""
        self._only(self._cut_off, 2.5)
        self._cuts_s = ((11.5, 16.0),)
        self._postgres.weather = DatabaseWeather(hold=0.02, long_hold=0.0)
        for agent in self._agents:
            agent.host.keepers_late = 0.9
        for replica in self._replicas:
            replica.quick = True

    def _late_acks(self) -> None:
        """What agents say is heard, and they learn of it late; then they are not heard any more."""
        self._only(self._delay_acks, 4.0)

    def _late_hellos(self) -> None:
        """Agents come back just when their leases run out, and the database is slow to commit it."""
        self._only(self._cut_off, 6.0)
        self._cuts_s = ((9.5, 12.0),)
        self._postgres.weather = DatabaseWeather(hold=0.02, long_hold=0.0, long_hold_s=4.0, slow_commit=0.8)
        for replica in self._replicas:
            replica.quick = True

    def _stopped_leaders(self) -> None:
        """Leaders stand still for long enough to be replaced, and go on, while agents are cut off."""
        self._only(self._pause_replica, 1.5)
        self._kinds, self._weights = [self._pause_replica, self._cut_off], [3, 1]

    def _plan(self) -> None:
        scheduler = self._scheduler
        delay_ns = int(scheduler.random.expovariate(1 / self._every_s) * 1e9)
        if scheduler.now_ns + delay_ns < self.until_ns:
            scheduler.after(delay_ns, "", self._strike)

    def _strike(self) -> None:
        (fault,) = self._scheduler.random.choices(self._kinds, self._weights)
        fault()
        self._plan()

    def _note(self, text: str) -> None:
        self._scheduler.note(f"FAULT {text}")

    # ── agents and their hosts ───────────────────────────────────────────────

    def _agent(self) -> Agent:
        return self._scheduler.random.choice(self._agents)

    def _crash_agent(self) -> None:
        agent = self._agent()
        if agent.process.alive:
            self._note(f"{agent.process.name} is killed")
            agent.crash()

    def _restart_agent(self, agent: Agent) -> None:
        life = agent.process.life

        def start() -> None:
            if not agent.process.alive and agent.process.life == life:
                agent.start()

        self._scheduler.after(self._scheduler.spread_ns(1.0, 20.0, 0.3), "", start)

    def _pause(self, process: Process, low_s: float, high_s: float) -> None:
        if process.alive:
            duration_ns = self._scheduler.between_ns(low_s, high_s)
            self._note(f"{process.name} stands still for {duration_ns / 1e9:.1f} s")
            process.paused_until_ns = self._scheduler.now_ns + duration_ns

    def _pause_agent(self) -> None:
        self._pause(self._agent().process, 0.5, 15.0)

    def _reboot(self) -> None:
        agent = self._agent()
        self._note(f"{agent.process.name}'s host boots anew")
        if agent.process.alive:
            agent.crash()
        agent.host.reboot()

    def _kill_keeper(self) -> None:
        agent = self._agent()
        alive = [execution for execution in agent.host.executions.values() if execution.exit is None]
        if alive:
            execution = self._scheduler.random.choice(alive)
            self._note(f"the keeper of lease {execution.lease_id} dies")
            agent.host.lose_keeper(execution)

    # ── replicas and the database ────────────────────────────────────────────

    def _replica(self) -> Replica:
        leaders = [replica for replica in self._replicas if replica.process.alive and replica.leadership.epoch]
        if leaders and self._scheduler.chance(0.5):
            return self._scheduler.random.choice(leaders)
        return self._scheduler.random.choice(self._replicas)

    def _crash_replica(self) -> None:
        replica = self._replica()
        if replica.process.alive:
            self._note(f"{replica.process.name} is killed")
            replica.crash()
            life = replica.process.life

            def start() -> None:
                if not replica.process.alive and replica.process.life == life:
                    replica.start()

            self._scheduler.after(self._scheduler.spread_ns(1.0, 10.0, 0.3), "", start)

    def _pause_replica(self) -> None:
        self._pause(self._replica().process, 0.5, 9.0)

    def _database_down(self) -> None:
        duration_ns = self._scheduler.between_ns(0.2, 6.0)
        self._note(f"no connection to the database for {duration_ns / 1e9:.1f} s")
        self._postgres.weather.down_until_ns = self._scheduler.now_ns + duration_ns

    def _wall_jump(self) -> None:
        jump = timedelta(seconds=self._scheduler.random.choice((-30, -2, 2, 30)))
        self._note(f"the database's wall clock jumps by {jump}")
        self._postgres.wall_jump = jump

    # ── the network ──────────────────────────────────────────────────────────

    def _cut_off(self) -> None:
        self._cut_agent_off(self._busy_agent())

    def _busy_agent(self) -> Agent:
        """An agent that runs something, and is not cut off already."""
        heard = [agent for agent in self._agents if self._cut_until_ns.get(agent, 0) < self._scheduler.now_ns]
        busy = [agent for agent in heard if any(each.lives for each in agent.host.executions.values())]
        return self._scheduler.random.choice(busy or heard or list(self._agents))

    def _cut_all_off(self) -> None:
        for agent in self._agents:
            self._cut_agent_off(agent)

    def _cut_agent_off(self, agent: Agent) -> None:
        until_ns = self._scheduler.now_ns + self._scheduler.between_ns(*self._scheduler.random.choice(self._cuts_s))
        self._note(f"{agent.process.name} is cut off until {until_ns / 1e9:.1f} s")
        self._cut_until_ns[agent] = until_ns
        for replica in self._replicas:
            for way in Way:
                self._network.cut(agent.process.name, replica.process.name, way, until_ns)

    def _cut_one_way(self) -> None:
        """One way or both, each for a time of its own."""
        scheduler, agent = self._scheduler, self._agent()
        ways = scheduler.random.choice(((Way.TO_SERVER,), (Way.TO_AGENT,), tuple(Way)))
        replicas = self._replicas if scheduler.chance(0.7) else [scheduler.random.choice(self._replicas)]
        for way in ways:
            until_ns = scheduler.now_ns + scheduler.between_ns(*scheduler.random.choice(((1.0, 7.0), *_CUTS_S[1:])))
            for replica in replicas:
                self._note(
                    f"{agent.process.name} {way.value} {replica.process.name} is cut until {until_ns / 1e9:.1f} s"
                )
                self._network.cut(agent.process.name, replica.process.name, way, until_ns)

    def _delay_acks(self) -> None:
        agent, scheduler = self._busy_agent(), self._scheduler
        back_ns = scheduler.now_ns + scheduler.between_ns(2.5, 5.5)
        there_ns = scheduler.now_ns + scheduler.between_ns(11.5, 16.0)
        self._note(
            f"{agent.process.name} hears nothing until {back_ns / 1e9:.1f} s, is not heard until {there_ns / 1e9:.1f} s"
        )
        for replica in self._replicas:
            self._network.cut(agent.process.name, replica.process.name, Way.TO_AGENT, back_ns)
            self._network.cut(agent.process.name, replica.process.name, Way.TO_SERVER, there_ns)

    def _break_stream(self) -> None:
        scheduler = self._scheduler
        streams = [stream for stream in self._network.streams if stream.is_open]
        if streams:
            stream = scheduler.random.choice(streams)
            self._note(f"{stream.label} breaks")
            stream.lose_at_agent("connection reset", scheduler.spread_ns(0.05, 3.0, 0.3))
            stream.lose_at_server(scheduler.spread_ns(0.05, 3.0, 0.3))

    def _half_open(self) -> None:
        """The agent goes to another stream at once; the server notices late, if at all."""
        scheduler = self._scheduler
        streams = [stream for stream in self._network.streams if stream.is_open]
        if streams:
            stream = scheduler.random.choice(streams)
            self._note(f"{stream.label} is half open")
            stream.lose_at_agent("connection reset", 0)
            if scheduler.chance(0.5):
                until_ns = scheduler.now_ns + scheduler.between_ns(0.5, 8.0)
                # What is under way arrives late, on a stream that the agent has left.
                self._network.cut(stream.agent.name, stream.replica.name, Way.TO_SERVER, until_ns)
            stream.lose_at_server(scheduler.between_ns(1.0, 15.0))

    # ── the end ──────────────────────────────────────────────────────────────

    def mend(self) -> None:
        """Nothing goes wrong any more, and what is down comes up."""
        self._scheduler.note("all is mended")
        self._network.heal()
        self._network.weather = NetworkWeather(usual_s=0.01, rare_s=0.05)
        self._postgres.weather = DatabaseWeather(hold=0.02, long_hold=0.0)
        self._postgres.wall_jump = timedelta()
        for agent in self._agents:
            agent.host.hurry()
            agent.weather.disk_fails = agent.weather.prepare_fails = agent.crash_in_burst = 0.0
            agent.weather.disk_rare_s = agent.weather.prepare_rare_s = 0.1
        everything: Sequence[Agent | Replica] = (*self._agents, *self._replicas)
        for each in everything:
            each.process.paused_until_ns = 0
            if not each.process.alive:
                each.start()


def _bound(act: Callable[[Agent], None], agent: Agent) -> Callable[[], None]:
    return lambda: act(agent)
