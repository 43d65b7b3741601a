"""What computes a sentence encoder's forward pass: a function from token ids of one length to unit vectors.

A forward pass here uses one thread, and several of them run side by side on different batches: that scales better than
many threads inside one pass, which wait for each other at every operator (far better when the machine is busy).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from recsys.errors import ConfigError
from recsys.libraries import installed, library
from recsys.types import FloatArray, Int64Array

BackendName = Literal["auto", "torch", "openvino"]


class Backend(ABC):
    """Computes batches, ``threads`` of them at a time."""

    threads: int

    @abstractmethod
    def forward(self, ids_BL: Int64Array) -> FloatArray:
        """float32 [B, D] of int64 [B, L], on the calling thread."""

    def run(self, batches: Iterable[Int64Array]) -> Iterator[FloatArray]:
        """The vectors of each batch, in order."""
        if self.threads == 1:
            yield from map(self.forward, batches)
            return
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield from pool.map(self.forward, batches)
        finally:
            # Set by a pool's thread, it would become the default of threads that are started later.
            torch.set_num_threads(before)


class TorchBackend(Backend):
    """Plain torch: float32 on the CPU, bfloat16 on a GPU."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type != "cpu"
        self._module = module.to(self._device)
        self.threads = 1 if self._on_gpu else torch.get_num_threads()

    def forward(self, ids_BL: Int64Array) -> FloatArray:
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._on_gpu):
            return self._module(torch.from_numpy(ids_BL).to(self._device)).float().cpu().numpy()


class OpenVinoBackend(Backend):
    """OpenVINO on the CPU, in the precision that it takes for the fastest there: bfloat16 where the CPU computes it,
    else float32. Converting a model of six layers takes some ten seconds.
    """

    def __init__(self, module: nn.Module) -> None:
        ov = library("openvino", "encoder.backend: openvino", extra="export")
        self.threads = torch.get_num_threads()
        free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        program = torch.export.export(module, (torch.ones((2, 7), dtype=torch.long),), dynamic_shapes=(free,))
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": self.threads}
        self._model = ov.Core().compile_model(ov.convert_model(program), "CPU", properties)
        self._local = threading.local()

    def forward(self, ids_BL: Int64Array) -> FloatArray:
        if not hasattr(self._local, "request"):
            self._local.request = self._model.create_infer_request()
        # Copied: the request owns its output and overwrites it in the next call.
        return np.array(self._local.request.infer([ids_BL])[0])


def choose_backend(name: BackendName, module: nn.Module, device: str) -> Backend:
    """The backend called ``name`` for ``module`` on ``device``.

    ``auto`` is torch on a GPU; on a CPU that computes bfloat16 it is OpenVINO where that is installed; else torch,
    whose float32 is nearly as fast and needs no conversion.
    """
    if device != "cpu":
        if name == "openvino":
            raise ConfigError("encoder.backend: openvino computes on the CPU; use torch or auto on a GPU")
        return TorchBackend(module, device)
    if name == "openvino" or (name == "auto" and _cpu_has_bfloat16() and installed("openvino")):
        return OpenVinoBackend(module)
    return TorchBackend(module, device)


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
