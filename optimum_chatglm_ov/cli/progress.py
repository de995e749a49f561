# SPDX-License-Identifier: Apache-2.0
"""The progress bar of an export."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@contextmanager
def export_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields the `progress` argument of `export_model`, which draws a bar on stderr if that is a terminal.

    What libraries print meanwhile goes to stderr as well.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        redirect_stdout(sys.stderr),
        Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as bar,
    ):
        tasks: dict[str, TaskID] = {}

        def progress(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bar.add_task(description, total=total)
            bar.update(tasks[description], completed=done, total=total)
            if done >= total:
                # the next step, NNCF's, draws its own bar, and two at a time overwrite each other
                bar.stop()

        yield progress
