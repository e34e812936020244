"""Runs as processes of their own, side by side, and what each left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimtune.comparison.gpus import Places, ran_out
from slimtune.comparison.jobs import Job
from slimtune.comparison.lock import held, shared
from slimtune.comparison.made import Summary, beside, finished, put_stamp
from slimtune.comparison.program import commit, program

TUNE = (sys.executable, "-m", "slimtune", "tune")
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""What a run's threads are told by: torch's, the tokenizer's, and torch.compile's workers (else 32 a run, however many run)."""
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that somebody stopped: no result, and no failure of the run either."""


@dataclass(frozen=True)
class Ended:
    """A run's end: its summary, ``{"failed": end of the log}``, or None when there is none; how long it took; why none.

    Attributes:
        again: it is made once more, for others took the memory of its GPU.
    """

    job: Job
    summary: Summary | None
    seconds: float
    why: str = "stopped from outside"
    again: bool = False


def command(job: Job) -> list[str]:
    """The words of the run."""
    return [*TUNE, job.file, *job.filled, f"seed={job.seed}", f"out={job.folder}", "--overwrite"]


def told(ended: Ended) -> str:
    """Why a run has no result, in a few words."""
    if ended.summary is None:
        return ended.why
    if "result" in ended.summary:  # it came to its end, and its log tells of no failure
        return f"failed: {ended.summary['failed']}"
    return f"failed, see {beside(ended.job, '.log')}"


class Launcher:
    """Starts runs, as many side by side as ``jobs`` says, and stops them when the caller is interrupted."""

    def __init__(self, jobs: int, gpus: Sequence[str] = (), threads: int | None = None):
        self.jobs, self.threads = jobs, threads or max(1, (os.cpu_count() or 1) // jobs)
        self.gpus, self.places = gpus, Places(jobs, gpus)
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self.lock = threading.Lock()

    def run_all(self, work: Sequence[Job]) -> Generator[Ended, None, None]:
        """The ends of the runs, as they come. An interrupt stops the runs and goes on to the caller.

        A run starts when those of ``work`` that it reads have ended, and not at all where one of them has no result. One that
        others left too little memory ends with ``again``, and once more later.
        """
        self.stopping = False  # the end of an earlier call left it set
        self.places.clear()
        pool = ThreadPoolExecutor(self.jobs)
        left, going, without = list(work), dict[Future[Ended], tuple[Job, str]](), dict[Job, Ended]()
        try:
            with _terminable():
                while left or going:
                    yield from self._start(pool, left, going, without)
                    for future in wait(going, return_when=FIRST_COMPLETED).done:
                        ended = self._left(future.result(), *going.pop(future))
                        if ended.again:
                            left.append(ended.job)
                        elif ended.summary is None or "failed" in ended.summary:
                            without[ended.job] = ended
                        yield ended
        finally:  # also when the caller leaves early
            self._stop()
            pool.shutdown(cancel_futures=True)

    def _start(
        self,
        pool: ThreadPoolExecutor,
        left: list[Job],
        going: dict[Future[Ended], tuple[Job, str]],
        without: dict[Job, Ended],
    ) -> Iterator[Ended]:
        """Fill the free places in order; the ends of those that cannot start."""
        running = {job for job, _ in going.values()}
        for job in list(left):
            lost = next((without[source] for source in job.reads if source in without), None)
            if lost:
                left.remove(job)
                without[job] = Ended(job, None, 0.0, f"not started: it reads {lost.job.label} ({told(lost)})")
                yield without[job]
            elif not any(source in left or source in running for source in job.reads):
                gpu = self.places.take(job)
                if gpu is not None:
                    left.remove(job)
                    running.add(job)
                    going[pool.submit(self._run, job, gpu)] = job, gpu

    def _left(self, ended: Ended, job: Job, gpu: str) -> Ended:
        """A run's end, or that it is made again: its GPU was full, and not by it alone."""
        failed = ended.summary is not None and "failed" in ended.summary
        fewer = self.places.leave(gpu, job, failed and ran_out(beside(job, ".log")))
        return Ended(job, None, ended.seconds, str(fewer), again=True) if fewer else ended

    def _run(self, job: Job, gpu: str) -> Ended:
        job.folder.mkdir(parents=True, exist_ok=True)
        with held(beside(job, ".lock")) as lock:
            if lock is None:
                return Ended(job, None, 0.0, "left to another call, which is making it now")
            there = finished(job, program())  # another call may have made it since
            return Ended(job, there, 0.0) if there else self._made(job, gpu, shared(lock))

    def _made(self, job: Job, gpu: str, lock: tuple[int, ...]) -> Ended:
        started, now, log = time.perf_counter(), program(), beside(job, ".log")
        (job.folder / "summary.json").unlink(missing_ok=True)
        words = command(job)
        stamp = {"words": job.digest, "program": now, "commit": commit(), "command": " ".join(words)}
        put_stamp(job, stamp)
        code = self._wait(words, log, gpu, lock)
        seconds = time.perf_counter() - started
        if code is None or code in STOPPED:
            return Ended(job, None, seconds)
        summary = finished(job, now) if code == 0 else None
        return Ended(job, summary or {**stamp, "failed": _reason(log) or f"exit code {code}"}, seconds)

    def _wait(self, words: list[str], log: Path, gpu: str, lock: tuple[int, ...]) -> int | None:
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads))}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("wb") as file:
            with self.lock:
                if self.stopping:
                    return None
                # with the lock: where this process is killed, its child goes on, and no other must start beside it
                child = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT, pass_fds=lock)
                self.running.add(child)
            code = child.wait()
        with self.lock:
            self.running.discard(child)
        return code

    def _stop(self) -> None:
        with self.lock:
            self.stopping = True
            children = list(self.running)
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


REMEDY = "start anew with --overwrite"
"""What ``slimtune tune`` advises; a comparison has no such option and makes a failed run again by itself."""


def _reason(log: Path) -> str:
    """The end of a run's log."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return text.replace(REMEDY, "give the comparison again")[-400:]


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does: a batch system's time limit must not leave runs behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
