"""Thousands of requests of every kind to a running server: no 5xx, and every answer is as its description says."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from recsys.testing.tiny_bundle import make_bundle
from serve.fastpath import free_ports

ROOT = Path(__file__).resolve().parents[2]
CASES = 200
"""of each operation, once with what fits its description and once with what does not"""


@contextmanager
def server(bundle, folder):
    """A running ``python -m serve.run``; the URL and the first key."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "serve.run", "--bundle", str(bundle.path), "--topology", "fused"]
    command += ["--port", str(port), "--events", str(folder / "events.sqlite"), "--num-cpus", "2"]
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 150
        while "ready: " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        (key,) = re.findall(r"^rk_\S+$", log.read_text(), re.MULTILINE)
        yield f"http://127.0.0.1:{port}", key
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0, log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_cases(tmp_path):
    sent = {}
    with server(make_bundle(tmp_path), tmp_path) as (url, key):
        headers = {"Authorization": f"Bearer {key}"}
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
        for operation in (found.ok() for found in schema.get_all_operations()):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters:
                    sent[operation.path, mode.name] = try_out(operation, mode, headers)
    print(sent)
    assert sum(sent.values()) >= 2000


def try_out(operation, mode, headers):
    """How many cases were sent, all of them answered as described."""
    num_cases = 0

    @settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case):
        nonlocal num_cases
        num_cases += 1
        # What fits may still be refused: limits of the Bundle and the clock are no part of the description.
        case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

    answers()
    return num_cases
