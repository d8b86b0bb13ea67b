"""What a fake server knows of jobs and agents; it moves only when a test moves it."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from lessor.v1 import fleet_service_pb2, job_pb2, job_service_pb2


@dataclass
class FakeWorld:
    """Jobs, attempts, logs, queues and agents, and the handles that move them."""

    jobs: dict[str, job_pb2.Job] = field(default_factory=dict)
    attempts: dict[str, list[job_pb2.Attempt]] = field(default_factory=lambda: defaultdict(list))
    logs: dict[tuple[str, int], list[job_service_pb2.StreamLogsResponse]] = field(
        default_factory=lambda: defaultdict(list)
    )
    logs_complete: set[tuple[str, int]] = field(default_factory=set)
    changes: list[job_service_pb2.JobChange] = field(default_factory=list)
    queue_rows: dict[str, fleet_service_pb2.Queue] = field(
        default_factory=lambda: {"default": fleet_service_pb2.Queue(name="default")}
    )
    agent_rows: dict[str, fleet_service_pb2.Agent] = field(default_factory=dict)
    gpu_rows: list[fleet_service_pb2.GpuStatus] = field(default_factory=list)
    lease_rows: list[fleet_service_pb2.LeaseStatus] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.news = threading.Condition(threading.RLock())
        """Notified of every change."""
        self.scripts: list[threading.Thread] = []
        self.script_errors: list[BaseException] = []

    def change(self, job_id: str, state: int, progress: job_pb2.Progress | None = None) -> None:
        with self.news:
            job = self.jobs[job_id]
            job.state = state  # type: ignore[assignment]
            made = job_service_pb2.JobChange(job_id=job_id, state=job.state, attempt=job.attempt, progress=progress)
            made.time.GetCurrentTime()
            self.changes.append(made)
            self.news.notify_all()

    def start(self, job_id: str, agent: str = "alpha") -> int:
        """Begins the next attempt; returns its number."""
        with self.news:
            job = self.jobs[job_id]
            job.attempt += 1
            job.agent = agent
            job.lease_id = 1000 + job.attempt
            job.start_time.GetCurrentTime()
            attempt = job_pb2.Attempt(
                attempt=job.attempt, lease_id=job.lease_id, phase=job_pb2.LEASE_PHASE_RUNNING, agent=agent
            )
            attempt.grant_time.GetCurrentTime()
            attempt.start_time.GetCurrentTime()
            self.attempts[job_id].append(attempt)
            self.change(job_id, job_pb2.JOB_STATE_RUNNING)
            return job.attempt

    def log(self, job_id: str, data: bytes, stream: int = job_pb2.LOG_STREAM_STDOUT) -> None:
        with self.news:
            attempt = self.jobs[job_id].attempt
            chunks = self.logs[job_id, attempt]
            offset = chunks[-1].offset + len(chunks[-1].data) if chunks else 0
            chunk = job_service_pb2.StreamLogsResponse(attempt=attempt, offset=offset, stream=stream, data=data)  # type: ignore[arg-type]
            chunk.time.GetCurrentTime()
            chunks.append(chunk)
            self.news.notify_all()

    def progress(self, job_id: str, fraction: float, message: str = "", **metrics: float) -> None:
        with self.news:
            progress = job_pb2.Progress(fraction=fraction, message=message, metrics=metrics)
            self.jobs[job_id].progress.CopyFrom(progress)
            self.change(job_id, self.jobs[job_id].state, progress)

    def lose(self, job_id: str) -> None:
        """Ends the attempt as LOST and queues the job again."""
        with self.news:
            job = self.jobs[job_id]
            attempt = self.attempts[job_id][-1]
            attempt.phase = job_pb2.LEASE_PHASE_ENDED
            attempt.outcome = job_pb2.OUTCOME_LOST
            job.losses += 1
            self.logs_complete.add((job_id, job.attempt))
            self.change(job_id, job_pb2.JOB_STATE_QUEUED)

    def end(
        self,
        job_id: str,
        state: int = job_pb2.JOB_STATE_SUCCEEDED,
        *,
        exit_code: int | None = None,
        signal: int = 0,
        error: job_pb2.JobError | None = None,
        result: bytes = b"",
    ) -> None:
        with self.news:
            job = self.jobs[job_id]
            job.result_json = result
            job.signal = signal
            if exit_code is not None:
                job.exit_code = exit_code
            if error is not None:
                job.error.CopyFrom(error)
            job.end_time.GetCurrentTime()
            if job.attempt:
                attempt = self.attempts[job_id][-1]
                attempt.phase = job_pb2.LEASE_PHASE_ENDED
                outcomes = {
                    job_pb2.JOB_STATE_SUCCEEDED: job_pb2.OUTCOME_SUCCEEDED,
                    job_pb2.JOB_STATE_FAILED: job_pb2.OUTCOME_FAILED,
                    job_pb2.JOB_STATE_CANCELLED: job_pb2.OUTCOME_CANCELLED,
                }
                attempt.outcome = outcomes[state]  # type: ignore[index]
                job.outcome = attempt.outcome
                if exit_code is not None:
                    attempt.exit_code = exit_code
                attempt.end_time.GetCurrentTime()
                self.logs_complete.add((job_id, job.attempt))
            self.change(job_id, state)

    def add_agent(self, name: str, gpus: int = 0, **labels: str) -> fleet_service_pb2.Agent:
        agent = fleet_service_pb2.Agent(
            id=f"agent-{name}",
            name=name,
            state=fleet_service_pb2.AGENT_STATE_ACTIVE,
            labels=labels,
            cpu_millis=8000,
            memory_bytes=32 * 2**30,
            gpu_count=gpus,
            runtimes=["process"],
            version="0.1.0",
        )
        agent.connect_time.GetCurrentTime()
        agent.heartbeat_interval.FromSeconds(5)
        self.agent_rows[name] = agent
        for index in range(gpus):
            self.gpu_rows.append(
                fleet_service_pb2.GpuStatus(
                    uuid=f"GPU-{name}-{index}", agent=name, index=index, model="NVIDIA H200", memory_bytes=141 * 2**30
                )
            )
        return agent

    def script(self, work: Callable[[], None]) -> None:
        """Runs ``work`` in a thread; its error fails the test when the server is stopped."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.script_errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self.scripts.append(thread)
        thread.start()

    def until(self, happened: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Waits until ``happened`` after some news."""
        with self.news:
            if not self.news.wait_for(happened, timeout_s):
                raise AssertionError("it did not happen in time")
