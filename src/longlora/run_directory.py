"""A run directory: settings, checkpoints, metrics, evaluation and result of one run, safe against a second writer.

settings.yaml   every resolved setting, versions, seed, the package's commit
metrics.jsonl   one line a logged step
evaluation/     one JSON file a measurement
checkpoint-N/   what `--resume` goes on from
adapter/ | model/   the result: a stock PEFT adapter, or a full model
report.html
"""

import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from longlora import ranks
from longlora.errors import Unfinished, UserError
from longlora.whole_files import is_full, read_json, what_is_wrong, write_json, write_whole

logger = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = frozenset(
    "resume accept_changes steps epochs device_batch save_every evaluate_every report_to cache gradient_checkpointing "
    "loss_chunk memory offload_activations layer_tile tiled_mlp mlp_tile offload_optimizer loss_kernel gpu_memory "
    "reserve sequence_parallel output data evaluation_data".split()
)
"""Settings that do not change what a resumed run computes (or, like `steps` and `epochs`, only how long), and what is
known by its content instead of its name (`RunDirectory.recognise`)."""

NEVER_CHANGES = frozenset("model base context method train rank row_tokens".split())
"""Settings that decide which weights there are: no flag makes a checkpoint fit others."""

KEPT = 2
"""Checkpoints that a run keeps, the last ones by step."""

_VERSIONED = ("longlora", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


class RunDirectory:
    """The files of one run under `path`.

    Of several processes that train together only the first writes (`writes`), but for checkpoints.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.writes = ranks.rank() == 0
        self.settings_file = self.path / "settings.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.content_file = self.path / "content.json"
        self.evaluation = self.path / "evaluation"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.report = self.path / "report.html"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this run; it is created if it is not there. All of its processes call.

        Raises:
            UserError: another run holds it, the folder cannot be written, or some process does not see it.
        """
        held: list[FileLock] = []
        created = not self.path.exists()
        try:
            ranks.first_alone(lambda: held.append(self._lock()))
            self._refuse_unshared()
            yield
        finally:
            if held:
                (self.path / ".lock").unlink(missing_ok=True)  # who waits for this file sees that and makes another
                held[0].release()
                if created and self.path.exists() and not any(self.path.iterdir()):
                    self.path.rmdir()

    def _lock(self) -> FileLock:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"--output {self.path} is in use by another run: wait until it has ended, or name another folder."
            ) from error
        except OSError as error:
            raise UserError(
                f"--output {self.path} cannot be written ({error.strerror}): name another folder."
            ) from error
        return lock

    def _refuse_unshared(self) -> None:
        """Raises UserError where processes on several machines do not see one folder."""
        if not ranks.joined():
            return
        mark = self.path / f".seen-by-all-{ranks.first_alone(lambda: uuid.uuid4().hex)}"
        ranks.first_alone(mark.touch)
        blind = [number for number, sees in enumerate(ranks.everyones(mark.exists())) if not sees]
        ranks.first_alone(lambda: mark.unlink(missing_ok=True))
        if blind:
            raise UserError(
                f"--output {self.path} is not one folder for all processes: what process 0 writes there, process "
                f"{blind[0]} does not see. Name a folder on a file system that all machines share."
            )

    def begin(self, command: str, settings: Mapping[str, Any], resume: bool, accept: bool = False) -> None:
        """Write `settings.yaml`, or on `resume` check that the run on disk is the same run. All processes call.

        Args:
            accept: settings that differ are said and taken over, as far as the checkpoints allow; what was measured
                with the old ones is forgotten.

        Raises:
            UserError: the folder holds something and `resume` is off, or the settings differ from the run's.
        """
        ranks.first_alone(lambda: self._begin(command, settings, resume, accept))

    def _begin(self, command: str, settings: Mapping[str, Any], resume: bool, accept: bool) -> None:
        if self.settings_file.exists():
            before = self.read_settings()
            if not resume:
                raise UserError(
                    f"--output {self.path} already holds a run: give --resume to go on with it, or name another folder."
                )
            for name, value in settings.items():
                if name in MAY_CHANGE_ON_RESUME or before.get(name, value) == plain(value):
                    continue
                if name in NEVER_CHANGES or not accept:
                    other = "" if name in NEVER_CHANGES else "give --accept-changes to go on with the new one, "
                    raise UserError(
                        f"--resume: '{name}' was {before[name]!r} in {self.settings_file} and is now {value!r}; "
                        f"go on with the first value, {other}or start a new run in another folder."
                    )
                logger.warning("'%s' was %r and is now %r: going on with that", name, before[name], value)
                self.forget_evaluation()
        elif any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise UserError(f"--output {self.path} is not empty and holds no run: name another folder.")
        elif resume:
            raise UserError(f"--resume: {self.path} holds no run to go on with; leave --resume out to start one.")
        document = {
            "command": command,
            **{name: plain(value) for name, value in settings.items()},
            "versions": versions(),
            "commit": _commit(),
        }
        write_whole(self.settings_file, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))

    def read_settings(self) -> dict[str, Any]:
        """The recorded settings.

        Raises:
            UserError: there is no readable `settings.yaml`.
        """
        try:
            settings = yaml.safe_load(self.settings_file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path} is not a run directory: {self.settings_file.name} is not readable."
            ) from error
        if not isinstance(settings, dict):
            raise UserError(f"{self.settings_file} is not a table of settings: name another run directory.")
        return settings

    def recognise(self, content: Mapping[str, Mapping[str, Any]], accept: bool) -> None:
        """Note what the run reads, or see that a resumed run still reads the same. All processes call.

        Args:
            content: what it is called -> `{"fingerprint", …}` and what else says to people how much it is.
            accept: other content is said and taken; what was measured before is forgotten.

        Raises:
            UserError: the content is another one.
        """
        ranks.first_alone(lambda: self._recognise(content, accept))

    def _recognise(self, content: Mapping[str, Mapping[str, Any]], accept: bool) -> None:
        before = read_json(self.content_file) or {}
        for name, now in content.items():
            then = before.get(name, now)
            if then["fingerprint"] == now["fingerprint"]:
                continue
            words = f"{name} is not what this run began with (now {_said(now)}; then {_said(then)})"
            if not accept:
                raise UserError(
                    f"--resume: {words}: give it the same again, --accept-changes to go on with what is there now, or "
                    "start a new run in another folder."
                )
            logger.warning("%s: going on with it, and measuring anew", words)
            self.forget_evaluation()
        write_json(self.content_file, content)

    def forget_evaluation(self) -> None:
        """What was measured no longer belongs to the run as it goes on."""
        for file in self.evaluation.glob("*.json"):
            file.unlink()

    def checkpoints(self) -> list[Path]:
        """The folders of checkpoints, the one of most steps first, whatever the clock says."""
        found = [folder for folder in self.path.glob("checkpoint-*") if folder.name.partition("-")[2].isdigit()]
        return sorted(found, key=checkpoint_step, reverse=True)

    def last_checkpoint(self, verify: bool = False) -> Path | None:
        """The checkpoint of most steps that is whole, or None.

        Args:
            verify: read every file and compare its checksum; each checkpoint passed over is said.
        """
        for folder in self.checkpoints():
            wrong = what_is_wrong(folder, verify)
            if wrong is None:
                return folder
            if verify:
                logger.warning("%s is not whole (%s): passing it over", folder, wrong)
        return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns a full disk or a folder that is gone, whatever library meets it, into a sentence.

        Raises:
            UserError: either of these.
        """
        try:
            yield
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch.distributed.checkpoint's are no Exception
            if not self.path.is_dir():
                raise UserError(
                    f"--output {self.path} is gone: it was removed or unmounted while the run was writing to it."
                ) from error
            if is_full(error, self.path):
                for half in self.path.glob(".checkpoint-*"):
                    shutil.rmtree(half, ignore_errors=True)
                last = self.last_checkpoint()
                rest = f"{last.name} is whole" if last else "there is no checkpoint yet"
                raise Unfinished(
                    f"the disk is full while writing to {self.path}: {rest}. Free some space, then give the same "
                    "command again with --resume."
                ) from error
            raise

    def record_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with self.writing(), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop metrics of steps a killed run had done beyond the checkpoint it goes on from."""
        if self.metrics_file.exists():
            kept = [record for record in self.read_metrics() if record["step"] <= step]
            write_whole(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged steps in order; a last line that a kill cut short is left out."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return records

    def write_evaluation(self, name: str, document: Mapping[str, Any]) -> None:
        """Keep one measurement as `evaluation/NAME.json`."""
        if not self.writes:
            return
        with self.writing():
            self.evaluation.mkdir(exist_ok=True)
            write_json(self.evaluation / f"{name}.json", document)

    def read_evaluation(self, name: str) -> dict[str, Any] | None:
        """A measurement that was kept whole, or None."""
        return read_json(self.evaluation / f"{name}.json")


def checkpoint_step(folder: Path) -> int:
    """Optimiser steps that the checkpoint in `checkpoint-N` has trained."""
    return int(folder.name.rpartition("-")[2])


def _said(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a result depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str | None:
    """Commit of the package's own checkout, or None when it is installed from a wheel."""
    package = Path(__file__).parent
    if not (package.parents[1] / ".git").exists():
        return None
    answer = subprocess.run(
        ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


def plain(value: Any) -> Any:
    """`value` as YAML gives it back: tuples are lists."""
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value
