"""Energy: Zeus on a recorded GPU measurement and on a made-up RAPL tree, the estimate, and nothing at all."""

import time

import pytest

from greencode.energy import Energy, Meter
from greencode.errors import UserError


def window_of(meter: Meter, seconds: float = 0.0) -> Energy:
    with meter.window() as window:
        time.sleep(seconds)
    return window.energy


@pytest.fixture
def recorded(tmp_path):
    """A meter that replays windows of a GPU measurement, in the format Zeus logs them: seconds, joules."""
    testing = pytest.importorskip("zeus.utils.testing")

    def make(*windows: tuple[float, float], source: str = "nvml") -> Meter:
        log = tmp_path / "zeus.csv"
        rows = "".join(f"0.0,greencode,{seconds},{joules}\n" for seconds, joules in windows)
        log.write_text("start_time,window_name,elapsed_time,gpu0_energy\n" + rows)
        monitor = testing.ReplayZeusMonitor(log_file=log, ignore_sync_execution=True)
        return Meter(source, monitor, reads="the NVML energy counter of GPU 0")

    return make


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """A RAPL tree with one package, its memory, and the platform's own zone; counters in microjoules."""
    cpu = pytest.importorskip("zeus.device.cpu")
    from zeus.device.cpu import rapl as zeus_rapl

    class Tree:
        root = tmp_path / "intel-rapl"

        def zone(self, path: str, name: str, energy: int = 0) -> None:
            folder = self.root / path
            folder.mkdir(parents=True)
            (folder / "name").write_text(name + "\n")
            (folder / "max_energy_range_uj").write_text("262143328850\n")
            self.set(path, energy)

        def set(self, path: str, energy: int) -> None:
            (self.root / path / "energy_uj").write_text(f"{energy}\n")

    tree = Tree()
    tree.root.mkdir()
    monkeypatch.setattr(zeus_rapl, "RAPL_DIR", str(tree.root))
    monkeypatch.setattr(zeus_rapl, "CONTAINER_RAPL_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(cpu, "_cpus", None)
    zeus_rapl.rapl_is_available.cache_clear()
    yield tree
    if cpu._cpus is not None:
        for package in cpu._cpus.cpus:
            for zone in (package.rapl_file, package.dram):
                if zone is not None and zone._wraparound_tracker is not None:
                    zone._wraparound_tracker._stop()
    zeus_rapl.rapl_is_available.cache_clear()


# --- the estimate, and nothing --------------------------------------------------------------------------


def test_estimate_is_watts_times_cpu_seconds_and_says_so():
    meter = Meter.open("cpu", 15.0, allow=["estimate"])
    meter.begin()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    energy = meter.end()
    assert (energy.source, energy.idle_subtracted) == ("estimate", False)
    assert energy.cpu_seconds >= 0.05
    assert energy.joules == pytest.approx(15.0 * energy.cpu_seconds)
    assert energy.window_seconds == energy.seconds > 0
    assert meter.note == (
        "An estimate, not a measurement (RAPL is not among the allowed sources): 15 W x CPU seconds."
    )


def test_estimate_of_waiting_is_nearly_nothing():
    energy = window_of(Meter.open("cpu", 15.0, allow=["estimate"]), seconds=0.05)
    assert energy.seconds >= 0.05
    assert energy.joules < 15.0 * 0.04


def test_no_watts_no_joules():
    meter = Meter.open("cpu", None, allow=["estimate"])
    energy = window_of(meter)
    assert (energy.joules, energy.source, energy.idle_subtracted) == (None, None, False)
    assert meter.note == (
        "Energy was not measured: RAPL is not among the allowed sources and no CPU power is stated."
    )


def test_nothing_allowed_no_joules():
    meter = Meter.open("cpu", 15.0, allow=[])
    assert window_of(meter).joules is None
    assert "estimates are not allowed" in meter.note


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_gpu_work_is_never_estimated_from_cpu_seconds(device):
    meter = Meter.open(device, 15.0, allow=["rapl", "estimate"])
    assert meter.source is None
    assert window_of(meter).joules is None
    assert meter.note.startswith("Energy was not measured: ")


def test_without_any_counter_zeus_says_zero_and_the_meter_says_none(monkeypatch, tmp_path):
    gpu = pytest.importorskip("zeus.device.gpu")
    cpu = pytest.importorskip("zeus.device.cpu")
    from zeus.device.cpu import rapl as zeus_rapl
    from zeus.monitor import ZeusMonitor

    monkeypatch.setattr(zeus_rapl, "RAPL_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(zeus_rapl, "CONTAINER_RAPL_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(cpu, "_cpus", None)
    monkeypatch.setattr(gpu, "_gpus", None)
    monkeypatch.setattr(gpu, "nvml_is_available", lambda: False)
    monkeypatch.setattr(gpu, "amdsmi_is_available", lambda: False)
    zeus_rapl.rapl_is_available.cache_clear()

    monitor = ZeusMonitor()
    monitor.begin_window("silent")
    assert monitor.end_window("silent").total_energy == 0
    assert window_of(Meter("nvml", monitor)).joules is None

    assert Meter.open("cuda", 15.0).note == "Energy was not measured: NVML cannot be read."
    meter = Meter.open("cpu", 15.0)
    assert meter.source == "estimate"
    assert "this machine has no RAPL counters" in meter.note
    meter = Meter.open("cpu")
    assert (meter.source, window_of(meter).joules) == (None, None)
    zeus_rapl.rapl_is_available.cache_clear()


@pytest.mark.parametrize("watts", [0, -1.0, float("nan"), float("inf")])
def test_watts_must_be_positive(watts):
    with pytest.raises(UserError, match="CPU power"):
        Meter.open("cpu", watts)


def test_unknown_source():
    with pytest.raises(UserError, match="'solar'"):
        Meter.open("cpu", allow=["solar"])


# --- NVML, as recorded ----------------------------------------------------------------------------------


def test_recorded_gpu_window(recorded):
    meter = recorded((10.0, 1234.5))
    energy = window_of(meter)
    assert (energy.joules, energy.source, energy.window_seconds) == (1234.5, "nvml", 10.0)
    assert energy.seconds < 1  # the replay takes no time; the meter's clock is the recorded one
    assert meter.note == "Measured with Zeus: the NVML energy counter of GPU 0; idle power included."


def test_idle_power_is_subtracted_over_the_window(recorded):
    meter = recorded((2.0, 100.0), (10.0, 1200.0), (4.0, 190.0))
    assert meter.measure_idle(0) == 50.0
    energy = window_of(meter)
    assert (energy.joules, energy.idle_subtracted) == (1200.0 - 50.0 * 10.0, True)
    assert window_of(meter).joules == -10.0  # noise below idle is kept, so that means are not biased
    assert "idle power of 50.0 W subtracted" in meter.note


def test_counter_that_did_not_advance_is_none(recorded):
    meter = recorded((0.01, 0.0), (0.01, 0.0), (1.0, 70.0))
    assert meter.measure_idle(0) is None
    assert window_of(meter).joules is None
    energy = window_of(meter)
    assert (energy.joules, energy.idle_subtracted) == (70.0, False)


def test_failed_work_closes_the_window(recorded):
    meter = recorded((1.0, 10.0), (2.0, 20.0))

    def fail():
        with meter.window():
            raise ValueError("work failed")

    with pytest.raises(ValueError, match="work failed"):
        fail()
    assert window_of(meter).joules == 20.0


def test_windows_do_not_nest():
    meter = Meter.open("cpu", allow=[])
    with pytest.raises(RuntimeError):
        meter.end()
    meter.begin()
    with pytest.raises(RuntimeError):
        meter.begin()


@pytest.mark.gpu
def test_a_real_gpu_uses_joules():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    meter = Meter.open("cuda")
    assert meter.source == "nvml"
    assert meter.measure_idle(1.0) > 0
    square = torch.rand(4096, 4096, device="cuda")
    with meter.window() as window:
        until = time.perf_counter() + 1.0
        while time.perf_counter() < until:
            square @ square
            torch.cuda.synchronize()
    assert window.energy.joules > 0
    assert window.energy.idle_subtracted


# --- RAPL, on a made-up tree ----------------------------------------------------------------------------


def test_rapl_counts_package_and_memory_but_not_the_platform(rapl):
    rapl.zone("intel-rapl:0", "package-0", 5_000_000)
    rapl.zone("intel-rapl:0/intel-rapl:0:0", "dram", 1_000_000)
    rapl.zone("intel-rapl:1", "psys", 0)
    meter = Meter.open("cpu", 15.0)
    assert meter.source == "rapl"
    meter.begin()
    rapl.set("intel-rapl:0", 9_000_000)
    rapl.set("intel-rapl:0/intel-rapl:0:0", 1_500_000)
    rapl.set("intel-rapl:1", 99_000_000)
    energy = meter.end()
    assert energy.joules == pytest.approx(4.0 + 0.5)
    assert (energy.source, energy.idle_subtracted) == ("rapl", False)
    assert meter.note == (
        "Measured with Zeus: the RAPL counters of 1 CPU package and memory, other programs included; "
        "idle power included."
    )
    assert window_of(meter).joules is None  # nothing advanced


def test_rapl_for_root_only_falls_back_to_the_estimate(rapl, monkeypatch):
    from zeus.device.cpu import common
    from zeus.device.cpu import rapl as zeus_rapl

    def refuse(*_):
        raise common.ZeusCPUNoPermissionError("RAPL requires root privileges")

    rapl.zone("intel-rapl:0", "package-0")
    monkeypatch.setattr(zeus_rapl.RAPLCPU, "_get_powerzone", refuse)  # tests may run as root
    meter = Meter.open("cpu", 8.5)
    assert meter.source == "estimate"
    assert meter.note == (
        "An estimate, not a measurement (RAPL may be read by root only): 8.5 W x CPU seconds."
    )


def test_empty_rapl_tree_is_no_counter(rapl):
    meter = Meter.open("cpu")
    assert meter.source is None
    assert "this CPU has no RAPL counters" in meter.note


# --- sharing --------------------------------------------------------------------------------------------


def energy(joules: float | None) -> Energy:
    return Energy(10.0, 9.0, joules, "nvml", False, 10.0)


def test_share_by_time_hands_out_all_joules():
    assert Meter.share(energy(80.0), [1.0, 3.0, 4.0]) == [10.0, 30.0, 40.0]


def test_share_evenly_if_no_time_passed():
    assert Meter.share(energy(9.0), [0.0, 0.0, 0.0]) == [3.0, 3.0, 3.0]


def test_share_of_unknown_is_unknown_and_of_no_samples_nothing():
    assert Meter.share(energy(None), [1.0, 2.0]) == [None, None]
    assert Meter.share(energy(5.0), []) == []


def test_helper_processes_do_not_run_the_main_script_again():
    from multiprocessing.spawn import get_preparation_data

    from greencode.energy import _main_not_imported

    def imports():
        return {key for key in get_preparation_data("helper") if key.startswith("init_main_from")}

    before = imports()
    with _main_not_imported():
        assert not imports()
    assert imports() == before
