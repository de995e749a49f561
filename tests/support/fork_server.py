# SPDX-License-Identifier: Apache-2.0
"""Processes that have imported everything already: forks of one that imports it once and does nothing else.

A process of Python that imports torch, transformers, optimum-intel and NNCF computes ten seconds before it begins.
Tests about what a command or a script does, and not about its imports, run it in a fork: with arguments, environment,
folder, standard streams and a session of its own, and the interpreter's own end. OpenVINO and the threads of torch
were not used before, so nothing of theirs is half there.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


# What commands and scripts import; not their entry points, which run as `__main__`.
_IMPORTED = (
    "optimum_chatglm_ov.export.exporter",
    "optimum_chatglm_ov.measure.accuracy",
    "optimum_chatglm_ov.modeling",
    "optimum.commands.optimum_cli",
    "datasets",
    "nncf",
    "rich.console",
)
# Libraries read these when they are imported, and so before a fork could change them.
_READ_AT_IMPORT = ("HF_H", "HF_M", "HF_TOKEN_", "HUGGINGFACE_", "KMP_", "LANG", "LC_", "OMP_", "OPENBLAS_", "PYTHON")
_MESSAGE_BYTES = 1 << 20


class ForkServer:
    """Starts processes of Python as `subprocess` does, one at a time, by the arguments that follow `python`."""

    def __init__(self, root: Path):
        """`root`: the folder of the package."""
        self._root = root
        self._server: subprocess.Popen | None = None
        self._connection: socket.socket | None = None
        self._environment: dict[str, str] = {}
        self._at_start = dict(os.environ)  # some libraries, such as gradio, change what others read at import
        self._process: ForkedProcess | None = None

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of the tests with changes; processes compute in one thread and find no stored token."""
        paths = os.pathsep.join(filter(None, [str(self._root), os.environ.get("PYTHONPATH")]))
        settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_TOKEN_PATH": os.devnull}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_READ_AT_IMPORT)}
        environment |= {name: value for name, value in self._at_start.items() if name.startswith(_READ_AT_IMPORT)}
        return {**environment, "PYTHONPATH": paths, **settings, **changes}

    def start(
        self,
        arguments: Sequence[object],
        stdin: int | IO = subprocess.DEVNULL,
        stdout: int | IO = subprocess.DEVNULL,
        stderr: int | IO = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        fresh: bool = False,
    ) -> ForkedProcess | subprocess.Popen:
        """Starts `python ARGUMENTS...`, as `-m MODULE ...`, `-c CODE ...` or `FILE ...`, with text in UTF-8.

        `env` is by default `environment()`. Raises ValueError where it differs in what libraries read when they are
        imported. A terminal as `stdin` becomes that of the process. With `fresh` it is no fork.
        """
        environment, folder = dict(self.environment() if env is None else env), str(cwd or self._root)
        if fresh:
            settings = {"env": environment, "cwd": folder, "start_new_session": True, "preexec_fn": _take_terminal}
            settings |= {"stdin": stdin, "stdout": stdout, "stderr": stderr}
            return subprocess.Popen([sys.executable, *map(str, arguments)], **settings)
        if self._connection is None:
            self._start_server()
        if self._process is not None:
            self._process.kill()  # of a test that failed
        for name in environment.keys() | self._environment.keys():
            if name.startswith(_READ_AT_IMPORT) and environment.get(name) != self._environment.get(name):
                raise ValueError(f"{name} is read when libraries are imported: this needs a process of its own")
        request = {"arguments": [*map(str, arguments)], "environment": environment, "folder": folder}
        with open(os.devnull, "r+b") as null:
            streams = [null if each == subprocess.DEVNULL else each for each in (stdin, stdout, stderr)]
            descriptors = [each if isinstance(each, int) else each.fileno() for each in streams]
            self._connection.settimeout(None)
            socket.send_fds(self._connection, [json.dumps(request).encode()], descriptors)
        self._process = ForkedProcess(self._connection)
        return self._process

    def run(
        self,
        arguments: Sequence[object],
        input: str = "",
        stdout: int | IO | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout: float = 300,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess:
        """Runs `python ARGUMENTS...` to its end, on `input`, and keeps what it prints, as text.

        `stdout`: where to instead. Raises subprocess.TimeoutExpired, and ends the process, after `timeout` seconds.
        """
        with (
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as printed,
            tempfile.TemporaryFile() as errors,
        ):
            given.write(input.encode())
            given.seek(0)
            process = self.start(arguments, given, printed if stdout is None else stdout, errors, env, cwd, fresh)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            printed.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(arguments, code, printed.read().decode(), errors.read().decode())

    def close(self) -> None:
        """Ends the server."""
        if self._connection is not None:
            self._connection.close()
            self._server.wait()

    def _start_server(self) -> None:
        self._connection, side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = self.environment()
        with side:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(side.fileno())],
                stdin=subprocess.DEVNULL,
                env=self._environment,
                cwd=self._root,
                pass_fds=[side.fileno()],
                start_new_session=True,
            )


class ForkedProcess:
    """A process that the server forked, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.returncode: int | None = None
        self.pid = self._receive()

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal, or None while the process runs."""
        try:
            return self.wait(1e-3)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the process to end, and returns its exit status, negative for a signal."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(self._receive())
            except TimeoutError:
                raise subprocess.TimeoutExpired("the forked process", timeout or 0) from None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the process, if it runs, and waits for its end."""
        self.send_signal(signal.SIGKILL)
        self.wait(60)

    def _receive(self) -> int:
        message = self._connection.recv(_MESSAGE_BYTES)
        if not message:
            raise RuntimeError("the fork server ended; its error is among the output of the tests")
        return int(message)


def mount_tmpfs(folder: str | Path, options: str) -> None:
    """Mounts a tmpfs on `folder`, which this process and its children alone see; `options` as of mount(8)."""
    if not os.environ.get("FORKED_HAS_MOUNTS"):
        user, group = os.getuid(), os.getgid()
        new_user, new_mounts = 0x10000000, 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS
        if ctypes.CDLL(None, use_errno=True).unshare(new_user | new_mounts):
            raise OSError(ctypes.get_errno(), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        os.environ["FORKED_HAS_MOUNTS"] = "1"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def _take_terminal() -> None:
    """Makes a terminal at stdin that of this session."""
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Forks a process for each request; returns the request in that process alone."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        if not message:
            raise SystemExit
        child = os.fork()
        if child == 0:
            connection.close()
            _become(request := json.loads(message), descriptors)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(child).encode())
        connection.send(str(os.waitpid(child, 0)[1]).encode())


def _become(request: dict[str, Any], descriptors: array.array | list[int]) -> None:
    """Gives this process its session, streams, folder and environment."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _take_terminal()
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # which depends on the environment


def _run(arguments: list[str]) -> None:
    """What `python ARGUMENTS...` runs."""
    how, *rest = arguments
    if how == "-m":
        sys.modules.pop(rest[0], None)  # `runpy` warns of modules that are there
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(how))
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _run(_serve(socket.socket(fileno=int(sys.argv[1])))["arguments"])
