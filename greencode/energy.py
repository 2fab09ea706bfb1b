"""Joules of a stretch of work: measured by Zeus where the machine can, else estimated, else unknown.

A window covers many samples and lasts seconds; counters advance in steps, and many short windows count too
much. Joules that nothing measures are None, never 0.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from greencode.errors import UserError

SOURCES = ("nvml", "rapl", "estimate")

_KEY = "greencode"


@dataclass(frozen=True)
class Energy:
    """What one window cost.

    Attributes:
        seconds: wall time of the window.
        cpu_seconds: CPU time of this process, all threads, during it.
        joules: energy, or None where it was not obtained.
        source: `nvml`, `rapl`, `estimate`, or None.
        idle_subtracted: whether idle power x window length was taken off.
        window_seconds: the window's length by the meter's own clock.
    """

    seconds: float
    cpu_seconds: float
    joules: float | None
    source: str | None
    idle_subtracted: bool
    window_seconds: float


@dataclass
class Window:
    """An open window; `energy` is there once it is closed."""

    energy: Energy | None = None


class Meter:
    """Measures windows one at a time; make it with `Meter.open`.

    Attributes:
        source: `nvml`, `rapl`, `estimate`, or None.
        cpu_watts: power of one busy core, for the estimate.
        idle_watts: what `measure_idle` found, subtracted from every later window; None before.
    """

    def __init__(
        self,
        source: str | None,
        monitor: Any = None,
        cpu_watts: float | None = None,
        reads: str = "",
        missing: str = "",
    ) -> None:
        """Args: see the attributes; `monitor` is a `ZeusMonitor`, `reads` says what it reads, and
        `missing` why there is nothing better than an estimate."""
        self.source = source
        self.cpu_watts = cpu_watts
        self.idle_watts: float | None = None
        self._monitor = monitor
        self._reads = reads
        self._missing = missing
        self._start: tuple[float, float] | None = None

    @classmethod
    def open(cls, device: str, cpu_watts: float | None = None, allow: Sequence[str] = SOURCES) -> Meter:
        """The best meter that this machine has for work on a device.

        On `cuda` or `cuda:1`: NVML, through Zeus. On `cpu`: RAPL through Zeus, else the estimate
        `cpu_watts` x CPU seconds. Otherwise a meter without joules. Work on a GPU is never estimated from
        CPU seconds, nor measured by the CPU's counters: most of its energy would be missing.

        RAPL starts a helper process that watches for counter overflow.

        Args:
            device: a torch device name.
            cpu_watts: watts of one busy core, for the estimate; None for no estimate.
            allow: the sources that may be used.

        Raises:
            UserError: an unknown source, or watts that are not positive.
        """
        if unknown := sorted(set(allow) - set(SOURCES)):
            raise UserError(f"Energy source {unknown[0]!r} is unknown; use some of {', '.join(SOURCES)}.")
        if cpu_watts is not None and not 0 < cpu_watts < float("inf"):
            raise UserError(f"The CPU power is {cpu_watts} W; state a positive number, or null for none.")
        kind, _, index = device.partition(":")
        missing = []
        if kind == "cuda":
            if "nvml" not in allow:
                return cls(None, missing="NVML is not among the allowed sources")
            monitor, found = _nvml(int(index or 0))
            return cls("nvml", monitor, reads=found) if monitor else cls(None, missing=found)
        if kind != "cpu":
            return cls(None, missing=f"nothing here can measure device {device}")
        if "rapl" in allow:
            monitor, found = _rapl()
            if monitor:
                return cls("rapl", monitor, reads=found)
            missing.append(found)
        else:
            missing.append("RAPL is not among the allowed sources")
        if "estimate" in allow and cpu_watts is not None:
            return cls("estimate", cpu_watts=cpu_watts, missing=missing[0])
        missing.append("no CPU power is stated" if "estimate" in allow else "estimates are not allowed")
        return cls(None, missing=" and ".join(missing))

    @property
    def counts(self) -> bool:
        """Whether joules come from a counter, which advances in steps: short windows miss it."""
        return self.source in ("nvml", "rapl")

    @property
    def note(self) -> str:
        """One sentence on how joules are obtained."""
        if self.source is None:
            return f"Energy was not measured: {self._missing}."
        if self.source == "estimate":
            return f"An estimate, not a measurement ({self._missing}): {self.cpu_watts:g} W x CPU seconds."
        idle = (
            "idle power included"
            if self.idle_watts is None
            else f"idle power of {self.idle_watts:.1f} W subtracted"
        )
        return f"Measured with Zeus: {self._reads}; {idle}."

    def begin(self) -> None:
        """Open a window; a GPU is synchronised first."""
        if self._start is not None:
            raise RuntimeError("the window is open already")
        if self._monitor is not None:
            self._monitor.begin_window(_KEY)
        self._start = time.perf_counter(), time.process_time()

    def end(self) -> Energy:
        """Close the window; a GPU is synchronised first.

        Joules are None if the counter did not advance: the window was shorter than its period. With idle
        power subtracted they can be slightly negative, which averages out; cutting at 0 would not.
        """
        if self._start is None:
            raise RuntimeError("no window is open")
        measurement = None
        if self._monitor is not None:
            with warnings.catch_warnings():
                # Zeus warns of zero energy; here that becomes None.
                warnings.simplefilter("ignore")
                measurement = self._monitor.end_window(_KEY)
        wall, cpu = self._start
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        self._start = None
        window_seconds = seconds if measurement is None else float(measurement.time)
        if self.source == "estimate":
            joules = self.cpu_watts * cpu_seconds
        else:
            joules = _counted(self.source, measurement)
        idle_subtracted = joules is not None and self.idle_watts is not None
        if idle_subtracted:
            joules -= self.idle_watts * window_seconds
        return Energy(seconds, cpu_seconds, joules, self.source, idle_subtracted, window_seconds)

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:
        """`with meter.window() as window: ...`, then read `window.energy`; None if the work failed."""
        window = Window()
        self.begin()
        try:
            yield window
        except BaseException:
            self.end()
            raise
        window.energy = self.end()

    def measure_idle(self, seconds: float) -> float | None:
        """Measure the power of doing nothing, and subtract it from every later window.

        Call it when the model is on the device and nothing runs. An estimate counts busy seconds only, so
        there is nothing to subtract.

        Returns:
            Watts, or None where no counter is read or it did not advance in that time.
        """
        if not self.counts:
            return None
        self.idle_watts = None
        with self.window() as window:
            time.sleep(seconds)
        idle = window.energy
        if idle.joules is not None and idle.window_seconds > 0:
            self.idle_watts = idle.joules / idle.window_seconds
        return self.idle_watts

    @staticmethod
    def share(window: Energy, per_sample_seconds: Sequence[float]) -> list[float | None]:
        """Joules of each sample of a window: its share of the samples' time, evenly if they took none.

        All of the window's joules are shared out, the moments between samples included.
        """
        if window.joules is None:
            return [None] * len(per_sample_seconds)
        total = sum(per_sample_seconds)
        if total <= 0:
            return [window.joules / len(per_sample_seconds) for _ in per_sample_seconds]
        return [window.joules * seconds / total for seconds in per_sample_seconds]


def _counted(source: str | None, measurement: Any) -> float | None:
    """Joules that the counters of a source advanced by; None where nothing counted."""
    if measurement is None:
        return None
    counters = (
        [measurement.gpu_energy] if source == "nvml" else [measurement.cpu_energy, measurement.dram_energy]
    )
    joules = sum(sum(counter.values()) for counter in counters if counter)
    return float(joules) if joules > 0 else None


def _nvml(index: int) -> tuple[Any, str]:
    """A monitor of one GPU and what it reads, or None and why not."""
    try:
        from zeus.device import get_gpus
        from zeus.exception import ZeusBaseError
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, "Zeus is not installed"
    try:
        if index >= len(get_gpus()):
            return None, f"there is no GPU {index}"
        monitor = ZeusMonitor(gpu_indices=[index], cpu_indices=[])
    except (ZeusBaseError, ValueError, OSError):
        return None, "NVML cannot be read"
    return monitor, f"the NVML energy counter of GPU {index}, the board alone"


def _rapl() -> tuple[Any, str]:
    """A monitor of all CPU packages and what it reads, or None and why not."""
    try:
        from zeus.device import get_cpus
        from zeus.exception import ZeusBaseError
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, "Zeus is not installed"
    from zeus.device.cpu.common import ZeusCPUNoPermissionError

    try:
        cpus = get_cpus()
        packages = [i for i, cpu in enumerate(cpus.cpus) if _is_package(cpu)]
        if not packages:
            return None, "this CPU has no RAPL counters"
        monitor = ZeusMonitor(gpu_indices=[], cpu_indices=packages)
        # The first reading starts Zeus's helper process, which belongs in no window.
        with _main_not_imported():
            readings = [cpus.get_total_energy_consumption(i) for i in packages]
    except (ZeusCPUNoPermissionError, PermissionError):
        return None, "RAPL may be read by root only"
    except (ZeusBaseError, ValueError, OSError):
        return None, "this machine has no RAPL counters"
    memory = " and memory" if any(reading.dram_mj is not None for reading in readings) else ""
    plural = "s" if len(packages) > 1 else ""
    return (
        monitor,
        f"the RAPL counters of {len(packages)} CPU package{plural}{memory}, other programs included",
    )


def _is_package(cpu: Any) -> bool:
    """Not the zone of the whole platform (`psys`), which holds the packages and would count them twice."""
    zone = getattr(cpu, "rapl_file", None)
    return zone is None or zone.name.startswith("package")


@contextlib.contextmanager
def _main_not_imported() -> Iterator[None]:
    """Start helper processes that do not import the main script.

    A spawned process imports the main script again; without a `__name__` guard in it, which a workflow
    script or a notebook rarely has, the whole job would run once more. Zeus's helper does not need it.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        yield
    finally:
        vars(main).update(hidden)
