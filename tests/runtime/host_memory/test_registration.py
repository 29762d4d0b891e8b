"""Registration through the native library's words, and the survey of what a machine pins."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from krasis.formats.errors import ResourceError
from krasis.runtime.cli import pinned_memory
from krasis.runtime.cli.pinned_memory import pinned_memory_report
from krasis.runtime.host import environment, measure_gpu
from krasis.runtime.host_memory import survey, survey_to_text, this_driver
from krasis.runtime.host_memory.memory import anonymous, tensor_of
from krasis.runtime.host_memory.registrar import (
    CudaRegistrar,
    DoubleRegistrar,
    RegistrationError,
    registrar_of,
)
from krasis.runtime.host_memory.survey import survey_with

PAGE = 4096
# The package's attribute of that name is the function.
survey_module = sys.modules["krasis.runtime.host_memory.survey"]


class Function:
    """A native function of a library that is not there."""

    def __init__(self, status: int) -> None:
        self.status, self.calls = status, []

    def __call__(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.status


@pytest.fixture
def library(monkeypatch) -> SimpleNamespace:
    devices: list[object] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(devices.append(device)))
    return SimpleNamespace(
        krasis_cuda_host_register=Function(0),
        krasis_cuda_host_unregister=Function(0),
        krasis_cuda_last_error=lambda: b"cudaErrorNotSupported: operation not supported",
        devices=devices,
    )


def test_the_library_gets_address_size_and_flag_on_the_right_gpu(library):
    known: set[int] = set()
    registrar = CudaRegistrar(library, torch.device("cuda", 2), known)
    memory = tensor_of(anonymous(3 * PAGE))
    registrar.register(memory, read_only=True)
    registrar.register(memory[PAGE:], read_only=False)
    registrar.unregister(memory)
    assert library.krasis_cuda_host_register.calls == [
        (memory.data_ptr(), 3 * PAGE, 1),
        (memory.data_ptr() + PAGE, 2 * PAGE, 0),
    ]
    assert library.krasis_cuda_host_unregister.calls == [(memory.data_ptr(),)]
    assert library.devices == [torch.device("cuda", 2)] * 3
    assert known == {memory.data_ptr() + PAGE}  # a stream need not ask the driver about it


def test_a_refusal_has_cudas_words_and_the_limit_on_locked_memory(library, memlock):
    registrar, memory = CudaRegistrar(library, torch.device("cuda", 0)), tensor_of(anonymous(16 * PAGE))
    library.krasis_cuda_host_register.status = library.krasis_cuda_host_unregister.status = 100
    memlock(8 * PAGE)
    with pytest.raises(RegistrationError) as caught:
        registrar.register(memory, read_only=False)
    for part in ("cudaErrorNotSupported: operation not supported", "65536 bytes", "ulimit -l", "32768"):
        assert part in str(caught.value)
    memlock(-1)
    with pytest.raises(RegistrationError) as caught:
        registrar.unregister(memory)
    assert "ulimit" not in str(caught.value)


def test_the_double_is_told(device):
    assert isinstance(registrar_of(device), DoubleRegistrar)


def test_the_survey_reports_what_is_refused_and_why(device, make_ledger, tmp_path: Path):
    ledger = make_ledger(lambda _, read_only: read_only)
    trials = survey_with(ledger, torch.device("cpu"), [tmp_path], 3 * 2**20)
    assert ledger.held == {}
    anonymous_ = [trial for trial in trials if trial.method == "anonymous" and trial.place != "hugetlb"]
    assert len(anonymous_) == 2
    assert all(trial.ok and trial.register_gbps > 0 and trial.copy_gbps is None for trial in anonymous_)
    refused = [trial for trial in trials if trial.read_only]
    assert refused
    assert all(not trial.ok and "refused by the test" in trial.reason for trial in refused)
    assert {trial.num_bytes for trial in trials} == {2 * 2**20}
    record = json.loads(json.dumps([trial.to_json() for trial in trials]))
    assert record[0]["method"] == "anonymous"
    text = survey_to_text(trials)
    assert max(map(len, text.splitlines())) <= 110
    assert "refused by the test" in text


def test_the_survey_of_a_device_leaves_nothing_behind(device, tmp_path: Path):
    trials = survey(device, [tmp_path, tmp_path / "missing"], 2**21)
    assert any(trial.ok and trial.read_only for trial in trials)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_page_aligned_exact_and_kept_by_its_tensors():
    array = anonymous(5 * PAGE)
    assert array.ctypes.data % 2**21 == 0
    assert array.nbytes == 5 * PAGE
    tensor = tensor_of(array)
    del array
    tensor.fill_(7)
    read_only = np.arange(100, dtype=np.uint8).reshape(10, 10)
    read_only.flags.writeable = False
    view = tensor_of(read_only)
    del read_only
    assert view.shape == (10, 10)
    assert view.flatten().tolist() == list(range(100))


def test_a_files_pages_are_tried_in_place(make_ledger, tmp_path: Path, monkeypatch):
    file, ledger = tmp_path / "shard", make_ledger()
    file.write_bytes(bytes(3 * PAGE + 5))
    monkeypatch.setattr(this_driver, "driver_registrar", lambda index: ledger)
    assert this_driver.why_not_in_place(file) == ""
    assert [(size, read_only) for _, size, read_only in ledger.history] == [(3 * PAGE, True)]
    assert ledger.held == {}
    ledger.refuse = lambda *_: True
    assert "refused by the test" in this_driver.why_not_in_place(file)
    assert "No such file" in this_driver.why_not_in_place(tmp_path / "missing")
    file.write_bytes(b"")
    assert "too small" in this_driver.why_not_in_place(file)


def test_env_shows_the_survey_of_a_gpu_at_hand_and_a_sentence_without(make_ledger, monkeypatch):
    found = environment.probe_environment(with_torch=False)
    without = dataclasses.replace(
        found, libraries=dataclasses.replace(found.libraries, cuda_problem="no CUDA")
    )
    assert pinned_memory_report(without) == (
        {"problem": "no CUDA"},
        "Pinned host memory\n  not tried: no CUDA",
    )
    gpu = environment.Torch("2", "13", (environment.GpuInfo(0, "H100", 2**36, "9.0"),), "")
    libraries = dataclasses.replace(found.libraries, cuda_problem="")
    present = dataclasses.replace(found, libraries=libraries, torch=gpu)
    ledger = make_ledger(lambda _, read_only: read_only)
    monkeypatch.setattr(this_driver, "driver_registrar", lambda index: ledger)
    monkeypatch.setattr(survey_module, "_copy_rate", lambda *_: 54.3)
    monkeypatch.setattr(
        measure_gpu, "measure_gpu", lambda index: measure_gpu.GpuRates(55.0, 55.1, 2800.0, 610.0)
    )
    monkeypatch.setattr(pinned_memory, "SURVEY_BYTES", 2**21)
    record, text = pinned_memory_report(present)
    json.dumps(record)
    assert record["rates"]["d2h_gbps"] == 55.1
    assert any(trial["ok"] and trial["copy_gbps"] == 54.3 for trial in record["trials"])
    assert "[1]" in text
    assert "refused by the test" in text
    assert "55.0 GB/s from pinned memory" in text
    assert max(map(len, text.splitlines())) <= 112

    def fail(index: int) -> None:
        raise ResourceError("GPU cannot be measured", got="out of memory")

    monkeypatch.setattr(measure_gpu, "measure_gpu", fail)
    record, text = pinned_memory_report(present)
    assert "out of memory" in record["problem"]
    assert record["rates"] is None
    assert "refused by the test" in text


def test_without_a_gpu_nothing_is_measured():
    if torch.cuda.is_available():
        rates = measure_gpu.measure_gpu(0)
        assert min(dataclasses.astuple(rates)) > 0
    else:
        with pytest.raises(ResourceError, match="no CUDA device"):
            measure_gpu.measure_gpu(0)


def test_the_double_has_no_registration():
    """krasis_cuda_host_register is a driver's: whoever calls it on the double has made a mistake."""
    double = os.environ.get("KRASIS_CUDA_DOUBLE")
    if not double or not shutil.which("nm"):
        pytest.skip("KRASIS_CUDA_DOUBLE is not set, or there is no nm")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", double], capture_output=True, text=True, check=True
    )
    assert "krasis_cuda_moe_gemm" in symbols.stdout
    assert "krasis_cuda_host_register" not in symbols.stdout
