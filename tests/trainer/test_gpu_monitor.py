"""The GPU's own numbers, from an NVML that is played by the test; a real one needs a GPU."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import Tiny

from engine.trainer import logbook
from engine.trainer.gpu_monitor import GpuMonitor

CUDA = torch.device("cuda", 0)
UUID = "01234567-89ab-cdef-0123-456789abcdef"


class FakeNvml:
    """Two GPUs of which torch's is the second; every quantity is as its attribute says."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, kind: str = "GPU") -> None:
        self.handles = {f"GPU-other-{UUID}": "other", f"{kind}-{UUID}": "ours"}
        self.memory = self.utilization = self.clock = self.power = 0
        self.energy: int | None = 0
        self.open = 0
        self.lost = False

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.handles:
            raise self.NVMLError("Not Found")
        return self.handles[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self._of(handle, self.memory))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self._of(handle, self.utilization))

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        return self._of(handle, self.clock)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return self._of(handle, self.power)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return self._of(handle, self.energy)

    def _of(self, handle: str, value: int) -> int:
        assert handle == "ours"
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return value


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def monitor(seconds_between_samples: float = 1e6) -> GpuMonitor:
    return GpuMonitor(CUDA, seconds_between_samples=seconds_between_samples)


def test_units_and_means_since_the_last_reading(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    nvml.energy = 5000  # mJ, from before
    watching = monitor()
    nvml.memory, nvml.utilization, nvml.clock = 8 * 10**9, 50, 1000
    watching._sample()
    nvml.memory, nvml.utilization, nvml.clock = 6 * 10**9, 100, 1600
    nvml.energy, now = 5000 + 1_400_000, 104.0
    assert watching.read() == {
        "gpu_memory_MB": 8000,
        "gpu_utilization": 0.75,
        "gpu_clock_MHz": 1300,
        "gpu_power_W": 350,
    }
    nvml.energy, now = nvml.energy + 100_000, 105.0
    later = watching.read()
    assert (later["gpu_memory_MB"], later["gpu_power_W"]) == (6000, 100)
    watching.close()
    assert nvml.open == 0
    assert watching.read() == {}


def test_power_is_sampled_where_energy_is_not_counted(nvml: FakeNvml) -> None:
    nvml.energy = None
    watching = monitor()
    for nvml.power in (100_000, 300_000):
        watching._sample()
    assert watching.read()["gpu_power_W"] == pytest.approx((100 + 300 + 300) / 3)
    watching.close()


def test_it_samples_in_the_background(nvml: FakeNvml) -> None:
    nvml.memory = 3 * 10**6
    watching = monitor(seconds_between_samples=0.001)
    deadline = time.monotonic() + 60
    while not watching._samples["gpu_memory_MB"] and time.monotonic() < deadline:
        time.sleep(0.01)
    nvml.memory = 10**6
    assert watching.read()["gpu_memory_MB"] == 3
    watching.close()


def test_a_mig_instance_is_found_and_a_lost_device_is_no_error(nvml: FakeNvml) -> None:
    nvml.handles = FakeNvml("MIG").handles
    watching = monitor()
    nvml.memory = 10**6
    assert watching.read()["gpu_memory_MB"] == 1
    nvml.lost = True
    assert watching.read() == {}
    watching.close()


@pytest.mark.parametrize("missing", ["GPU", "module", "driver", "device"])
def test_absence_is_quiet(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "module":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    if missing == "driver":

        def fail() -> None:
            raise nvml.NVMLError("Driver Not Loaded")

        monkeypatch.setattr(nvml, "nvmlInit", fail)
    if missing == "device":
        nvml.handles = {}
    watching = GpuMonitor(torch.device("cpu")) if missing == "GPU" else monitor()
    assert watching.read() == {}
    watching.close()
    assert nvml.open == 0


def test_the_log_has_it_where_there_is_a_gpu_and_no_key_elsewhere(
    tiny: Tiny, tmp_path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(out: Path) -> list[dict[str, float]]:
        tiny.trained(1, out, "--max-steps", "2")
        return [json.loads(line) for line in (out / "stage1/log.jsonl").read_text().splitlines()]

    if not torch.cuda.is_available():
        assert not any(key.startswith("gpu_") for line in lines(tmp_path / "cpu") for key in line)
    monkeypatch.setattr(logbook, "GpuMonitor", lambda device: GpuMonitor(CUDA))
    nvml.memory = 7 * 10**6
    logged = lines(tmp_path / "gpu")
    assert [line["gpu_memory_MB"] for line in logged] == [7, 7]
    assert all("gpu_power_W" in line for line in logged)
    assert nvml.open == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu(tmp_path: Path) -> None:
    pytest.importorskip("pynvml")
    held = torch.zeros(1 << 28, dtype=torch.uint8, device=CUDA)
    watching = GpuMonitor(CUDA)
    values = watching.read()
    watching.close()
    if values:  # there may be no NVML in a container
        assert values["gpu_memory_MB"] >= held.nbytes / 1e6
