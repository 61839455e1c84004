# SPDX-License-Identifier: BSD-3-Clause
"""What a stage has measured, safe from its end: a journal of one JSON line a row.

A stage that is killed, or that a kernel takes down, has lost the row in work and nothing else; when
it is started again it goes on behind that row. `check.py` makes one JSON file of the journals.
"""

import faulthandler
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tables

HANGS_S = 60  # a row that takes longer ends the process, with a traceback


class Journal:
    """Appends rows to `path`, and begins none after `until`, as time.time() counts. `lost()` says
    whether an error has left the device unusable."""

    def __init__(self, path: Path, until: float, lost: Callable[[], bool]):
        self.path, self.until, self.lost = path, until, lost
        self.rows = read(path)
        self.left_out = []

    def is_over(self) -> bool:
        return time.time() > self.until

    def write(self, key: str, **values) -> None:
        """Adds values to a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **values}) + "\n")
        self.rows.setdefault(key, {"key": key}).update(values)

    def run(self, key: str, measure, **facts) -> None:
        """Writes the facts and the dict that `measure()` returns, or what it raised as `failed`.

        A row that an earlier process began is not begun again. Where the CUDA context is lost, the
        process ends, so that the next one goes on."""
        if key in self.rows:
            return
        if self.is_over():
            self.left_out.append(key)
            return
        self.write(key, **facts, failed="the process ended in this row")
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        try:
            self.write(key, **measure(), failed=None)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:400]
            self.write(key, failed=text)
            print(f"{key}: {text}", flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self.lost():
            sys.exit("the CUDA context is lost; the next process goes on with the next row")

    def close(self, what: str) -> None:
        """Says how many rows there was no time for."""
        count = len(self.left_out)
        print(f"{len(self.rows)} {what} measured, {count} left out for lack of time", flush=True)
        if count:
            print(f"left out: {', '.join(self.left_out[:5])}{', …' * (count > 5)}", flush=True)
        self.write("left out", left_out=self.left_out)


def read(journal: Path) -> dict[str, dict]:
    """The rows of a journal by key. A line that was torn by the end of its process is left out."""
    rows = {}
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows.setdefault(row["key"], {}).update(row)
    return rows


def settle(journal: Path, stage: str, result: Path) -> None:
    """Puts a journal's rows into the result file, in place of that stage's old ones, and removes
    it."""
    rows = read(journal)
    if not rows:
        return
    content = {"rows": [], "left_out": {}}
    if result.exists():
        content = json.loads(result.read_text(encoding="utf-8"))
    content["left_out"][stage] = rows.pop("left out", {}).get("left_out", [])
    content["rows"] = [row for row in content["rows"] if row["stage"] != stage]
    content["rows"] += [{"stage": stage, **row} for row in rows.values()]
    tables.write_whole(result, json.dumps(content, indent=0) + "\n")
    journal.unlink()


def load(result: Path) -> list[dict]:
    """The rows of a result file; none where there is no file."""
    return json.loads(result.read_text(encoding="utf-8"))["rows"] if result.exists() else []
