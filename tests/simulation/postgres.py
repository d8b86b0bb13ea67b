"""Real PostgreSQL under the scheduler: when a statement begins, when it commits, and whether its answer arrives.

Production code gets pools that look like asyncpg's. Behind them each statement is
an actor: it is sent, runs on a connection of its own, may hold its transaction
open for a while, commits, and its answer travels back; between any two of these
others act, and the caller may crash. A statement that waits for a lock is left
waiting (PostgreSQL itself says so) until others have let it go on. So two
connections really interleave, statement by statement.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import asyncpg

from lessor_server.store.statements import all_names, statement
from tests.simulation.cluster import BEGINNING, CONNECTIONS, Backend, Cluster
from tests.simulation.scheduler import MS_NS, SECOND_NS, Event, Process, Scheduler, Violation

T = TypeVar("T")

LOCK_TIMEOUT_NS = 10 * SECOND_NS
IDLE_TIMEOUT_NS = 10 * SECOND_NS
"""As the server sets them; counted in virtual time here."""

_LOOK_S = 0.002
"""A statement that takes longer beside an open transaction may wait for it: PostgreSQL is asked."""
_STUCK_S = 30.0
_MOVES_NOTHING = frozenset({
    "tick", "take_over", "renew_term", "resign", "renew", "advance", "append_logs", "save_checkpoints", "save_progress",
    "save_readings", "save_agent", "save_gpus", "lock_agent", "begin_session", "resume_session", "set_agent_session",
    "ask_back", "cancel_leased", "settle_reports", "count_silent",
})  # fmt: skip
"""Statements that neither begin nor end a job or a lease: no invariant depends on them."""
_READS = ("read_", "SELECT", "WITH RECURSIVE", "INSERT INTO shape")


@dataclass(slots=True)
class Weather:
    """How the database is just now."""

    usual_s: float = 0.002
    """How long a statement or an answer is on its way, mostly."""
    rare_s: float = 0.05
    rarely: float = 0.02
    hold: float = 0.1
    """Probability that a statement's transaction stays open after it ran."""
    hold_s: float = 0.05
    long_hold: float = 0.02
    long_hold_s: float = 3.0
    slow_commit: float = 0.0
    """Probability that a transaction of several statements waits so long before it commits."""
    reset: float = 0.0
    """Probability that a connection breaks before a statement, or before its answer."""
    down_until_ns: int = 0


@dataclass(eq=False)
class Session:
    """A transaction of several statements, and whose it is."""

    process: Process
    life: int
    backend: Backend | None = None
    broken: bool = False
    moves: bool = False
    """An invariant may depend on what it has changed."""
    idle: Event | None = None


@dataclass(eq=False)
class Call:
    """One statement on its way."""

    name: str
    text: str
    arguments: tuple[Any, ...]
    process: Process
    life: int
    answer: Callable[[Any, BaseException | None], None]
    session: Session | None = None
    backend: Backend | None = None
    task: asyncio.Task[Any] | None = None
    is_held: bool = False
    """It runs in a transaction that the scheduler commits."""
    waits: bool = False
    lost: bool = False
    rows: Any = None
    timeout: Event | None = None
    label: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = f"{self.process.name}: {self.name}"


class SimulatedPostgres:
    """The database of one run."""

    def __init__(self, cluster: Cluster, scheduler: Scheduler, mutations: dict[str, Callable[[str], str]]) -> None:
        """
        Args:
            cluster: Where it is.
            scheduler: Says when what happens.
            mutations: Statement name → what to make of its text: planted bugs.
        """
        self._cluster = cluster
        self._scheduler = scheduler
        self.weather = Weather()
        self.wall_jump = timedelta()
        """How far the wall clock has been set wrong."""
        self.on_change: Callable[[str, Sequence[Any]], None] = lambda name, rows: None
        """Called when something was committed that an invariant may depend on."""
        self.closed = False
        self._known: dict[str, tuple[str, str, int | None]] = {}
        for name in all_names():
            known = statement(name)
            # Backoffs are spread by the scheduler's seed alone.
            text = known.text.replace("random()", "0.5")
            if name in mutations:
                changed = mutations[name](text)
                assert changed != text, f"the mutation of {name} changes nothing: the statement has changed"
                text = changed
            now = known.parameters.index("now") if "now" in known.parameters else None
            self._known[known.text] = (name, text, now)
        self._free = deque(cluster.backends)
        self._waiting: list[Call] = []
        self._sessions: list[Session] = []

    def now(self) -> datetime:
        """Returns the database's wall clock."""
        return BEGINNING + timedelta(microseconds=self._scheduler.now_ns // 1000) + self.wall_jump

    @property
    def is_calm(self) -> bool:
        """No transaction is open and no statement under way."""
        return len(self._free) == len(self._cluster.backends)

    # ── a statement's way ────────────────────────────────────────────────────

    def send(self, process: Process, answer: Callable[[Any, BaseException | None], None],
             text: str, arguments: tuple[Any, ...], session: Session | None = None) -> None:  # fmt: skip
        """Has a statement run in the name of a process.

        Args:
            process: Who asks; its crash does not stop what was sent.
            answer: Called with the rows, or an error, on the process's behalf.
            text: As production sends it.
            arguments: $1, $2, …
            session: The transaction it belongs to; None: its own.
        """
        name, real_text, now = self._known.get(text, (text.strip()[:30].replace("\n", " "), text, None))
        if now is not None and arguments[now] is None:
            arguments = (*arguments[:now], self.now(), *arguments[now + 1 :])
        call = Call(name, real_text, arguments, process, process.life, answer, session)
        self._scheduler.after(self._pause_ns(session) + self._delay_ns(), "", lambda: self._arrive(call))

    def _pause_ns(self, session: Session | None) -> int:
        """Returns how long a process hesitates amid a transaction, holding what it has locked."""
        weather = self.weather
        if session is None or session.backend is None or not self._scheduler.chance(weather.long_hold):
            return 0
        return self._scheduler.between_ns(0, weather.long_hold_s)

    def _delay_ns(self) -> int:
        weather = self.weather
        return self._scheduler.spread_ns(weather.usual_s, weather.rare_s, weather.rarely) + 50_000

    def _arrive(self, call: Call) -> None:
        scheduler, session = self._scheduler, call.session
        if call.process.life != call.life and (session is not None or scheduler.chance(0.5)):
            # It crashed while the statement was on its way: perhaps it never left.
            return
        if session is not None and session.broken:
            self._answer(call, None, asyncpg.IdleInTransactionSessionTimeoutError("the transaction was ended"))
            return
        if scheduler.now_ns < self.weather.down_until_ns or scheduler.chance(self.weather.reset):
            scheduler.note(f"{call.label} finds no connection")
            self._break(session)
            self._answer(call, None, asyncpg.ConnectionDoesNotExistError("connection was closed"))
            return
        if session is not None and session.backend is not None:
            call.backend = session.backend
        elif not self._free:
            scheduler.after(5 * MS_NS, "", lambda: self._arrive(call))
            return
        else:
            call.backend = self._free.popleft()
            if session is not None:
                session.backend = call.backend
        if session is not None and session.idle is not None:
            session.idle.cancelled = True
        if session is None:
            others = len(self._free) < len(self._cluster.backends) - 1
            call.is_held = others or scheduler.chance(self.weather.hold)
        if not call.backend.is_open and (call.is_held or session is not None):
            call.backend.is_open = True
            self._cluster.wait(call.backend.connection.execute("BEGIN"))
        call.task = self._cluster.start(call.backend.connection.fetch(call.text, *call.arguments))
        self._settle(call)

    def _others_are_open(self, call: Call) -> bool:
        return any(backend.is_open for backend in self._cluster.backends if backend is not call.backend)

    def _settle(self, call: Call) -> None:
        """Waits until a statement has ended, or waits for somebody's lock."""
        assert call.task is not None
        assert call.backend is not None
        waited_s = 0.0
        while not self._cluster.ended(call.task, _LOOK_S if self._others_are_open(call) else _STUCK_S):
            if self._cluster.look(
                "SELECT FROM (SELECT pg_blocking_pids($1) AS p) AS b WHERE p <> '{}'", call.backend.pid
            ):
                if not call.waits:
                    call.waits = True
                    self._waiting.append(call)
                    self._scheduler.note(f"{call.label} waits for a lock")
                    self._scheduler.happened["waits for a lock"] += 1
                    call.timeout = self._scheduler.after(LOCK_TIMEOUT_NS, "", lambda: self._give_up(call))
                    self._break_deadlock(call)
                return
            waited_s += _LOOK_S
            if waited_s > _STUCK_S:
                raise Violation(f"{call.label} neither ends nor waits for a lock")
        self._ran(call)

    def _ran(self, call: Call) -> None:
        scheduler = self._scheduler
        assert call.task is not None
        if call.waits:
            call.waits = False
            self._waiting.remove(call)
            scheduler.note(f"{call.label} goes on")
        if call.timeout is not None:
            call.timeout.cancelled = True
        error = call.task.exception()
        if error is not None:
            scheduler.note(f"{call.label} fails: {type(error).__name__}")
            if call.session is None:
                self._end(call, "ROLLBACK")
            self._answer(call, None, error)
            return
        call.rows = call.task.result()
        if call.rows:
            scheduler.happened[call.name] += 1
        if call.name != "tick" or call.is_held:
            scheduler.note(f"{call.label} → {_shown(call.rows)}{' …' if call.is_held else ''}")
        if call.session is not None:
            call.session.moves |= _moves(call.name)
            self._rest(call.session)
            self._answer(call, call.rows, None)
        elif call.is_held:
            weather = self.weather
            longest_s = weather.long_hold_s if scheduler.chance(weather.long_hold) else weather.hold_s
            scheduler.after(scheduler.between_ns(0, longest_s), f"{call.label} commits", lambda: self._commit(call))
        else:
            self._committed(call)

    def _commit(self, call: Call) -> None:
        self._end(call, "COMMIT", release=False)
        self._committed(call)

    def _committed(self, call: Call) -> None:
        assert call.backend is not None
        self._free.appendleft(call.backend)
        self._changed(call.name, call.rows)
        self._go_on()
        if self._scheduler.chance(self.weather.reset):
            self._scheduler.note(f"{call.label}: the answer is lost")
            self._answer(call, None, asyncpg.ConnectionDoesNotExistError("connection was closed in mid-operation"))
        else:
            self._answer(call, call.rows, None)

    def _changed(self, name: str, rows: Any) -> None:
        if rows and _moves(name):
            self.on_change(name, rows)

    def _end(self, call: Call, how: str, *, release: bool = True) -> None:
        backend = call.backend
        assert backend is not None
        if backend.is_open:
            self._cluster.wait(backend.connection.execute(how))
            backend.is_open = False
        if release:
            self._free.appendleft(backend)
            self._go_on()

    def _go_on(self) -> None:
        """Lets those go on whose locks are free now."""
        for call in list(self._waiting):
            if call.waits:
                self._settle(call)

    def _answer(self, call: Call, rows: Any, error: BaseException | None) -> None:
        if call.process.life == call.life:
            delay_ns = self._delay_ns()
            self._scheduler.after(delay_ns, "", lambda: call.answer(rows, error), call.process)

    # ── transactions of several statements ───────────────────────────────────

    def open(self, process: Process) -> Session:
        """Returns a transaction of a process; it begins with its first statement."""
        session = Session(process, process.life)
        self._sessions.append(session)
        return session

    def finish(self, session: Session, how: str, answer: Callable[[Any, BaseException | None], None]) -> None:
        """Commits a transaction or rolls it back.

        Args:
            session: The transaction.
            how: COMMIT or ROLLBACK.
            answer: As in :meth:`send`.
        """
        call = Call(how, how, (), session.process, session.process.life, answer, session)

        def arrive() -> None:
            lost = session.process.life != session.life and how == "COMMIT" and self._scheduler.chance(0.5)
            if session.broken or lost:
                self._answer(call, None, asyncpg.ConnectionDoesNotExistError("connection was closed"))
                self._break(session)
                return
            self._scheduler.note(f"{session.process.name}: {how}")
            self._close(session, how)
            if how == "COMMIT" and self._scheduler.chance(self.weather.reset):
                self._answer(call, None, asyncpg.ConnectionDoesNotExistError("connection was closed in mid-operation"))
            else:
                self._answer(call, None, None)

        slow = self._scheduler.chance(self.weather.slow_commit)
        pause_ns = self._scheduler.between_ns(0, self.weather.long_hold_s) if slow else self._pause_ns(session)
        self._scheduler.after(pause_ns + self._delay_ns(), "", arrive)

    def _rest(self, session: Session) -> None:
        """PostgreSQL ends a transaction whose client says nothing for too long."""
        session.idle = self._scheduler.after(IDLE_TIMEOUT_NS, "", lambda: self._break(session))

    def _break(self, session: Session | None) -> None:
        if session is not None and not session.broken:
            session.broken = True
            self._close(session, "ROLLBACK")

    def _close(self, session: Session, how: str) -> None:
        session.broken = True
        if session.idle is not None:
            session.idle.cancelled = True
        if session in self._sessions:
            self._sessions.remove(session)
        backend = session.backend
        session.backend = None
        if backend is None:
            return
        self._cluster.wait(backend.connection.execute(how))
        backend.is_open = False
        self._free.appendleft(backend)
        if how == "COMMIT" and session.moves:
            self.on_change("transaction", ())
        self._go_on()

    def forget(self, process: Process) -> None:
        """A process has crashed: what it had open is rolled back once PostgreSQL notices."""
        for session in [session for session in self._sessions if session.process is process]:
            if not any(call.session is session for call in self._waiting):
                delay_ns = self._scheduler.spread_ns(0.05, 5.0, 0.2)
                self._scheduler.after(delay_ns, f"{process.name}: its transaction ends", _bound(self._break, session))

    # ── locks ────────────────────────────────────────────────────────────────

    def _give_up(self, call: Call) -> None:
        if call.waits:
            self._scheduler.note(f"{call.label} has waited too long")
            self._abort(call, asyncpg.LockNotAvailableError("canceling statement due to lock timeout"))

    def _break_deadlock(self, newest: Call) -> None:
        """Ends the newest of those that wait for each other, as PostgreSQL would end one of them."""
        blocked = {call.backend.pid: call for call in self._waiting if call.backend is not None}
        waits_for = {pid: set(self._blockers(pid)) for pid in blocked}
        assert newest.backend is not None
        reached, ahead = set[int](), set(waits_for[newest.backend.pid])
        while ahead:
            pid = ahead.pop()
            if pid == newest.backend.pid:
                self._scheduler.note(f"{newest.label} closes a deadlock")
                self._scheduler.happened["deadlocks"] += 1
                self._abort(newest, asyncpg.DeadlockDetectedError("deadlock detected"))
                return
            if pid not in reached:
                reached.add(pid)
                ahead |= waits_for.get(pid, set())

    def _blockers(self, pid: int) -> list[int]:
        (row,) = self._cluster.look("SELECT pg_blocking_pids($1) AS pids", pid)
        return list(row["pids"])

    def _abort(self, call: Call, error: BaseException) -> None:
        assert call.backend is not None
        assert call.task is not None
        self._cluster.cancel(call.backend)
        self._cluster.ended(call.task, _STUCK_S)
        # Seen: it was cancelled for our error.
        call.task.exception()
        call.waits = False
        self._waiting.remove(call)
        if call.timeout is not None:
            call.timeout.cancelled = True
        if call.session is None:
            self._end(call, "ROLLBACK")
        else:
            self._break(call.session)
        self._answer(call, None, error)

    def close(self) -> None:
        """Ends what is under way; the database is then emptied."""
        self.closed = True
        for _ in range(CONNECTIONS):
            for backend in self._cluster.backends:
                waits = any(call.backend is backend and call.waits for call in self._waiting)
                if backend.is_open and not waits:
                    self._cluster.wait(backend.connection.execute("ROLLBACK"))
                    backend.is_open = False
            for call in list(self._waiting):
                if call.task is not None and self._cluster.ended(call.task, 0.01):
                    call.task.exception()
                    self._waiting.remove(call)


def _moves(name: str) -> bool:
    return name not in _MOVES_NOTHING and not name.startswith(_READS)


def _bound(act: Callable[[T], None], value: T) -> Callable[[], None]:
    return lambda: act(value)


def _shown(rows: Any) -> str:
    if not rows:
        return "nothing"
    keys = [key for key in ("job_id", "lease_id", "id", "epoch", "clock") if key in dict(rows[0])]
    return " ".join(",".join(str(row[key]) for key in keys) or "row" for row in rows[:6])
