"""Numbers that MiniLM must keep giving."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.models.text.encoder import TextEncoder, TextEncoderConfig

TEXTS = ["Toy Story. Adventure, Animation, Children", "Heat. Action, Crime, Thriller"]
GOLDEN = [
    [-0.001954, 0.030621, 0.069987, 0.043238, -0.061686, 0.023252],
    [-0.033076, -0.045085, -0.062586, 0.062985, 0.024170, 0.093834],
]
"""first six dimensions, computed by the library sentence-transformers"""
GOLDEN_COSINE = 0.360205


@pytest.mark.parametrize(("backend", "tolerance"), [("torch", 1e-4), ("openvino", 0.02)])
def test_minilm_vectors(backend, tolerance):
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed on this platform")
    vectors = TextEncoder.load(TextEncoderConfig(backend=backend)).encode(TEXTS)
    assert vectors.shape == (2, 384)
    np.testing.assert_allclose(vectors[:, :6], GOLDEN, atol=tolerance)
    assert vectors[0] @ vectors[1] == pytest.approx(GOLDEN_COSINE, abs=tolerance)
