"""The lease protocol keeps its promises in every state that the model can reach, and breaks one without any rule."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.model.__main__ import main
from tests.model.planted import BUGS, CANCELLED, FROZEN, GHOSTS, LEADERS, PAIR, SIZES, SMALL, Bug
from tests.model.promises import Promise
from tests.model.protocol import Protocol, Rules
from tests.model.search import Search
from tests.model.world import Agent, Message, Server, Size

pytestmark = pytest.mark.unit

ALWAYS = {
    "answer hello", "ask", "begin", "commit hello", "expire", "give back", "give up", "grant", "keeper fences",
    "record end", "refuse end", "release", "renew", "say hello", "send grant", "send heartbeat", "take ack",
    "take end ack", "take grant again", "take question", "take welcome", "tell end",
}  # fmt: skip
UNCANCELLED = {"work ends", "record late end"}
SOMETIMES = {
    GHOSTS: {"lose"},
    CANCELLED: {"cancel", "take stop"},
    LEADERS: {"replace leader", "wake old leader"},
}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_every_promise_holds_in_every_state(size: Size) -> None:
    found = Search(Protocol(size)).run()
    assert found.broken is None, "\n".join([found.broken, *found.trace])
    assert found.states >= SIZES[size]
    assert found.actions == ALWAYS | SOMETIMES.get(size, set()) | (set() if size.endless else UNCANCELLED)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_rule_left_out_breaks_a_promise(bug: Bug) -> None:
    found = bug.search()
    assert (found.broken, len(found.trace)) == (bug.promise, bug.steps)


def test_each_rule_is_left_out_by_one_bug() -> None:
    default = Rules()
    left_out = [
        [field.name for field in fields(Rules) if getattr(bug.rules, field.name) != getattr(default, field.name)]
        for bug in BUGS
    ]
    assert sorted(left_out) == sorted([field.name] for field in fields(Rules))


UNMERGED = ("no-outbox", "no-session-lock", "late-end-dropped", "no-tombstone")
"""Bugs that are searched a second time."""


class Unmerged(Protocol):
    """Tells apart what differs in anything, as long as it matters at all."""

    def plain(self, server: Server, agent: Agent) -> Agent:
        """Returns the agent as it is, but for the order of messages and what is left after the end."""
        if self.is_quiet(server, agent):
            return Agent()
        return agent._replace(up=tuple(sorted(set(agent.up))), down=tuple(sorted(set(agent.down))))


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.name in UNMERGED], ids=lambda bug: bug.name)
def test_merging_states_hides_no_bug(bug: Bug) -> None:
    found = Search(Unmerged(bug.size, bug.rules), [bug.promise]).run()
    assert (found.broken, len(found.trace)) == (bug.promise, bug.steps)


def test_merging_states_hides_no_broken_promise() -> None:
    size = Size("one lease", agents=1, leases=1, ttl=2, up=1, down=1)
    merged, unmerged = Search(Protocol(size)).run(), Search(Unmerged(size)).run()
    assert unmerged.broken is None
    assert unmerged.states > merged.states
    assert unmerged.actions == merged.actions


def test_the_way_to_a_broken_promise_can_be_read() -> None:
    (bug,) = (bug for bug in BUGS if bug.name == "revoke-not-awaited")
    assert bug.search().trace == (
        "A: says hello on a new stream",
        "A: hello is committed",
        "A: the hello is answered",
        "A: takes welcome",
        "A: is given lease 1",
        "A: grant 1 is sent",
        "A: takes grant 1 and begins",
        "A: the question about lease 1 is sent",
        "A: is given lease 2",
        "A: grant 2 is sent",
        "A: takes grant 2 and begins",
    )


def test_leaders_are_not_searched_with_two_agents() -> None:
    with pytest.raises(ValueError, match="leaders are searched with one agent, not with 2"):
        Protocol(replace(PAIR, leaders=True))


def test_the_page_names_every_bug_and_what_it_breaks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "verification.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- model -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [[name, size, promise, steps] for name, _, size, promise, steps in cells] == [
        [f"`{bug.name}`", bug.size.name, bug.promise.value, str(bug.steps)] for bug in BUGS
    ]


def test_a_search_that_grows_too_large_says_so() -> None:
    with pytest.raises(RuntimeError, match="more than 100 states: take a smaller size"):
        Search(Protocol(PAIR)).run(most=100)


class TestTime:
    """Both deadlines to the step."""

    PROTOCOL = Protocol(SMALL)

    def test_a_keeper_ends_its_job_at_the_latest_one_step_after_it_is_due(self) -> None:
        agent = Agent(run=1, left=self.PROTOCOL.term, kept=True)
        due = self.PROTOCOL.older(agent, 1)
        assert (due.run, due.left) == (1, 0)
        assert self.PROTOCOL.older(due, 1).run == 0

    def test_frozen_work_goes_on_with_a_renewal_that_leaves_it_time(self) -> None:
        protocol = Protocol(FROZEN)
        frozen = protocol.older(Agent(welcomed=True, since=1, run=1, kept=True), 1)
        assert (frozen.run, frozen.lives) == (1, False)
        lives = [
            [
                step.agent.lives
                for step in protocol.steps(Server(tokens=1, leased=True), told)
                if step.action == "take ack"
            ]
            for told in (frozen._replace(down=(Message("ack", age=age),)) for age in (0, protocol.term))
        ]
        assert lives == [[True], [False]]

    def test_a_renewal_counts_from_when_the_heartbeat_was_sent(self) -> None:
        protocol = Protocol(Size("long", agents=1, leases=1, ttl=4, up=1, down=1))
        agent = Agent(welcomed=True, since=2, run=1, left=1, kept=True, down=(Message("ack", age=1),))
        (taken,) = [
            step.agent for step in protocol.steps(Server(tokens=1, leased=True), agent) if step.action == "take ack"
        ]
        assert (taken.since, taken.left) == (1, protocol.term - 1)

    @pytest.mark.parametrize(("age", "expires"), [(2, False), (3, True)])
    def test_a_lease_expires_a_margin_after_its_ttl(self, age: int, expires: bool) -> None:
        steps = self.PROTOCOL.steps(Server(tokens=1, leased=True), Agent(age=age, holds=True))
        assert ("expire" in {step.action for step in steps}) is expires

    def test_lease_time_makes_up_for_one_step_at_most(self) -> None:
        behind = Server(uncounted=True)
        ways = {(after.uncounted, grown) for _, after, grown in self.PROTOCOL.pass_time(behind)}
        assert ways == {(False, 2), (True, 0)}


def test_the_command_prints_the_way_to_a_planted_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bug", "no-outbox"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"no-outbox, small: {Promise.END_KEPT}"
    assert len(printed) == 11


def test_an_unknown_bug_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--bug", "nonsense"])
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert "nonsense" in told
    assert "no-margin" in told
