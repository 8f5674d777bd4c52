"""The clock and the power of an NVIDIA GPU, by NVML; what power.py and product_power.py share."""

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# NVML's clock event reasons, those that are no choice of the user's.
REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "temperature, by the driver",
    0x40: "temperature, by the hardware",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Sample:
    """One look at the GPU: when, MHz of the multiprocessors, watts, NVML's reasons."""

    seconds: float
    clock: int
    watts: float
    reasons: int


class Sampler:
    """Looks at the GPU every ten milliseconds, in a thread of its own, while it is open."""

    def __init__(self, nvml: ModuleType, gpu: int):
        self._nvml = nvml
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        self._samples: list[Sample] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._nvml.nvmlShutdown()

    def look(self) -> Sample:
        """One sample, now."""
        nvml, handle = self._nvml, self._handle
        return Sample(
            time.perf_counter(),
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        )

    def between(self, start: float, end: float) -> list[Sample]:
        """What was seen; the nearest sample where the time was too short for one."""
        samples = self._samples or [self.look()]
        inside = [each for each in samples if start <= each.seconds <= end]
        return inside or [min(samples, key=lambda each: abs(each.seconds - end))]

    def _run(self) -> None:
        while not self._ended.wait(0.01):
            self._samples.append(self.look())


def opened(program: str, gpu: int) -> Sampler:
    """A sampler of the GPU that NVML has under this number, or an error that names the program."""
    try:
        import pynvml
    except ImportError:
        raise SystemExit(f"{program} asks NVML for the clock: pip install nvidia-ml-py.") from None
    try:
        return Sampler(pynvml, gpu)
    except pynvml.NVMLError as error:
        raise SystemExit(
            f"{program} looks at an NVIDIA GPU, number {gpu} of NVML's: {error}."
        ) from None


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Clock in MHz, power in watts, and by name what held the clock back at any time."""
    clocks = [each.clock for each in samples]
    seen = {bit for each in samples for bit in REASONS if each.reasons & bit}
    return {
        "clock": round(statistics.fmean(clocks)),
        "least_clock": min(clocks),
        "most_clock": max(clocks),
        "watts": round(statistics.fmean(each.watts for each in samples)),
        "held_back_by": [REASONS[bit] for bit in sorted(seen)],
    }
