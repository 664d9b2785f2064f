"""The GPU's own readings while training runs: memory, utilisation, power, clock (NVML).

They are of the whole device, whoever uses it. Their memory includes that of CUDA and of other
processes; `memory_MB` of the log does not.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

SECONDS_BETWEEN_SAMPLES = 1.0


class GpuMonitor:
    """Samples one GPU in the background. Where there is no GPU or no NVML, reads nothing.

    What a device does not tell (a MIG instance its power, say) is left out.
    """

    def __init__(
        self, device: torch.device, *, seconds_between_samples: float = SECONDS_BETWEEN_SAMPLES
    ) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._gauges: dict[str, Callable[[], float]] = {}
        self._energy: Callable[[], float] | None = None
        self._nvml, self._handle = _open(device)
        if self._nvml is None:
            return
        nvml, handle = self._nvml, self._handle
        self._gauges = {
            "gpu_memory_MB": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6,
            "gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "gpu_clock_MHz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        }
        # The counter of energy gives the true mean power; its samples are the next best.
        with self._whatever_nvml_says():
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._energy = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        if self._energy is None:
            self._gauges["gpu_power_W"] = lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        self._energy_before = self._joules_and_time()
        self._seconds_between_samples = seconds_between_samples
        self._thread = threading.Thread(target=self._sample_until_closed, daemon=True)
        self._thread.start()

    def read(self) -> dict[str, float]:
        """Since the last reading: the most memory (MB), and the means of utilisation (0 to 1),
        SM clock (MHz) and power (W)."""
        if self._nvml is None:
            return {}
        self._sample()  # so that there is one, however short the time
        with self._lock:
            samples, self._samples = self._samples, defaultdict(list)
        values = {
            name: max(taken) if name == "gpu_memory_MB" else sum(taken) / len(taken)
            for name, taken in samples.items()
        }
        before, self._energy_before = self._energy_before, self._joules_and_time()
        if before is not None and self._energy_before is not None:
            (joules, began), (joules_now, now) = before, self._energy_before
            values["gpu_power_W"] = (joules_now - joules) / (now - began)
        return values

    def close(self) -> None:
        """Stop sampling."""
        if self._nvml is not None:
            self._closed.set()
            self._thread.join()
            with self._whatever_nvml_says():
                self._nvml.nvmlShutdown()
            self._nvml = None

    def _sample_until_closed(self) -> None:
        while not self._closed.wait(self._seconds_between_samples):
            self._sample()

    def _sample(self) -> None:
        for name, gauge in self._gauges.items():
            with self._whatever_nvml_says():
                value = float(gauge())
                with self._lock:
                    self._samples[name].append(value)

    def _joules_and_time(self) -> tuple[float, float] | None:
        if self._energy is not None:
            with self._whatever_nvml_says():
                return self._energy(), time.monotonic()
        return None

    @contextlib.contextmanager
    def _whatever_nvml_says(self) -> Iterator[None]:
        """Measuring must not stop what is measured: not even when a GPU falls off the bus."""
        assert self._nvml is not None
        with contextlib.suppress(self._nvml.NVMLError):
            yield


def _open(device: torch.device) -> tuple[Any, Any]:
    """NVML and its handle of torch's device, or nothing twice.

    Found by UUID: NVML numbers the machine's GPUs, torch those in CUDA_VISIBLE_DEVICES.
    """
    if device.type != "cuda":
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None
    for kind in ("GPU", "MIG"):
        with contextlib.suppress(pynvml.NVMLError):
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
    pynvml.nvmlShutdown()
    return None, None
