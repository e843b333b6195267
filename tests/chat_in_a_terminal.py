"""`python -m helpers chat` as a process with a terminal of its own."""

import multiprocessing
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil


def _talk(terminal: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    os.login_tty(os.open(terminal, os.O_RDWR))
    sys.stdin, sys.stdout, sys.stderr = (open(n, mode, 1, "utf-8") for n, mode in enumerate("rww"))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    from helpers.__main__ import main

    sys.exit(main(["chat", *arguments]))


class Chat:
    """A chat that a person has started and reads.

    Imports take most of the time of a start. So the process is a fork of one that has made them (`forkserver` in
    conftest.py), unless it is to be `fresh`: then it is started as a person does.
    """

    def __init__(self, *arguments: str, fresh: bool = False):
        self.terminal, self._end = pty.openpty()
        if fresh:
            command = [sys.executable, "-m", "helpers", "chat", *arguments]
            ends = dict.fromkeys(("stdin", "stdout", "stderr"), self._end)
            self.process = subprocess.Popen(command, start_new_session=True, **ends)
        else:
            given = os.ttyname(self._end), arguments, dict(os.environ)
            self.process = multiprocessing.get_context("forkserver").Process(target=_talk, args=given)
            self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def until(self, text: str, seconds: float = 60) -> str:
        """Return what was shown until `text` appeared; raises AssertionError if it doesn't."""
        shown, end = b"", time.monotonic() + seconds
        while text.encode() not in shown:
            assert time.monotonic() < end, f"{text!r} never appeared in {shown.decode('utf-8', 'replace')!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                shown += os.read(self.terminal, 65536)
        return shown.decode("utf-8", "replace")

    def say(self, line: str) -> None:
        os.write(self.terminal, line.encode() + b"\n")

    def press_ctrl_c(self) -> None:
        """Interrupt at the prompt, until the chat says what ends it and asks again.

        A signal that comes after `input` has shown the prompt and before it reads is lost: then press again.
        """
        for _ in range(10):
            os.kill(self.pid, signal.SIGINT)
            with suppress(AssertionError):
                self.until("('salir')\r\n\r\n> ", 6)
                return
            assert psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE, "The interrupt ended the chat."
        raise AssertionError("Ten interrupts at the prompt were not noticed.")

    def first_word(self, line: str, seconds: float = 60) -> tuple[float, float]:
        """Ask, and return the seconds until a word of the answer shows: on the clock, and of the CPU."""
        process = psutil.Process(self.pid)
        used, started, shown, asked = process.cpu_times(), time.monotonic(), b"", line.encode()
        self.say(line)
        while asked not in shown or not shown.rpartition(asked)[2].strip():
            assert time.monotonic() < started + seconds, f"no answer in {shown!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                shown += os.read(self.terminal, 65536)
        waited, now = time.monotonic() - started, process.cpu_times()
        return waited, now.user + now.system - used.user - used.system

    def ended(self, seconds: float = 60) -> int | None:
        """Return the exit code, which comes within `seconds`."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(seconds)
        self.process.join(seconds)
        return self.process.exitcode

    def leave(self) -> int | None:
        self.say("salir")
        return self.ended()

    def close(self) -> None:
        self.process.kill()
        self.ended()
        os.close(self.terminal)
        os.close(self._end)
