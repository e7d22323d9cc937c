"""A run that is killed at random moments, and resumed until it ends; for a program that may fork itself."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from run_folder import steps_done
from runs import run_config

from deltaproduct.training import train


def warmed_up(place: Path, steps: int) -> None:
    """Train the run of so many steps in `place`/warm, so that a fork has imported and computed everything once: a start
    then costs milliseconds."""
    torch.set_num_threads(1)
    train(run_config(steps=steps), place / "warm", log_every=1, show=False)


def kill_and_resume(run: Path, steps: int, kills: int, between: Callable[[int], None] = lambda done: None) -> None:
    """Train a run that saves every step in a process that is killed so many times; then to its end.

    Args:
        between: is told how many kills there were, after each process.
    """
    chance, done = random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                train(run_config(steps=steps), run, resume=True, checkpoint_every=1, log_every=1, show=False)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if done < kills:
            # At most two steps and a part of one: however fast the machine, the run must not end before the last kill.
            moment = steps_done(run) + chance.randrange(3)
            while steps_done(run) < moment and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0.0, 0.01))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif status:
            sys.exit(f"resuming failed after {done} kills")
        between(done)
        if not os.WIFSIGNALED(status):
            return
