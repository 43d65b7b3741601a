"""The ranker as it is served on a CPU: per-item projections as int8 rows, the rest as one compiled graph.

What an item contributes by itself (its query, key, value and first-layer terms) is computed once and stored as an
int8 row with a float32 scale (symmetric, per item). What is left per request, ``RankerNetwork.head``, is exported
to OpenVINO in the precision that the machine runs fastest among those whose ranking stays within the gate: ``int8``
(post-training static quantization, so that a score still depends on its own candidate only), ``bf16`` where the CPU
has it, or ``f32`` over the int8 rows. Where none passes, the fp32 network is served.
"""

from __future__ import annotations

import importlib.util
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from recsys.config import StrictConfig
from recsys.data.features import NUM_FEATURES, fixed_size_list, matrix
from recsys.errors import ModelError
from recsys.files import map_arrow, read_json, write_arrow, write_json
from recsys.libraries import installed
from recsys.models.rankers.attention_network import HOUR_MS, MASKED, NUM_AGE_BUCKETS, AttentionRanker
from recsys.models.rankers.base import Ranker
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import PADDING, RankingBatch, RankingCatalogue
from recsys.types import FloatArray, Int32Array

Precision = Literal["f32", "bf16", "int8"]


class ExportConfig(StrictConfig):
    """How the ranker is compressed and when the compressed form is served."""

    enabled: bool = Field(default=True, description="export a quantized form and serve it when it passes the gate")
    precisions: tuple[Precision, ...] = Field(
        default=(),
        description="precisions of the compiled graph to try (item rows are int8 in each); empty for those that this "
        "CPU has instructions for: f32, bf16 with AVX512-BF16 or AMX, int8 with VNNI or AMX",
    )
    max_ndcg_loss: float = Field(
        default=0.005, ge=0, description="gate: largest relative loss of NDCG@10 against fp32 on the holdout, share"
    )
    num_calibration: int = Field(default=128, ge=1, description="queries that calibrate int8 activations")
    num_timed: int = Field(default=100, ge=10, description="timed calls per precision at one query")


@dataclass(frozen=True)
class ItemRows:
    """The per-item terms as int8 rows: float value = ``codes * scales[item]``."""

    codes: NDArray[np.int8]
    """int8 [N, S]"""
    scales: FloatArray
    """float32 [N]"""

    @classmethod
    def quantize(cls, values: FloatArray) -> ItemRows:
        scales = np.maximum(np.abs(values).max(axis=1), 1e-12) / 127.0
        return cls(np.rint(values / scales[:, None]).astype(np.int8), scales.astype(np.float32))

    def gather(self, item_idx: Int32Array) -> FloatArray:
        """float32 [..., S]"""
        return self.codes[item_idx] * self.scales[item_idx][..., None]

    def gather_into(self, item_idx: Int32Array, first: FloatArray, second: FloatArray) -> None:
        """Write the two halves of the rows (a padded slot gets some row) into float32 [C, S1] and [C, S2]."""
        rows = np.maximum(item_idx, 0)
        codes, scales = self.codes[rows], self.scales[rows][:, None]
        np.multiply(codes[:, : first.shape[1]], scales, out=first)
        np.multiply(codes[:, first.shape[1] :], scales, out=second)

    def save(self, path: Path) -> None:
        write_arrow(path, pa.table({"codes": fixed_size_list(self.codes), "scale": self.scales}))

    @classmethod
    def load(cls, path: Path) -> ItemRows:
        table = map_arrow(path)
        return cls(matrix(table["codes"]).view(np.int8), table["scale"].to_numpy())


class _SingleQuery:
    """The graph for one query of at most ``num_candidates``, with fixed shapes and inputs in place.

    Handing OpenVINO six arrays of varying shape costs as much as computing; here it reads buffers that stay. One per
    thread.
    """

    def __init__(self, compiled: Any, num_candidates: int) -> None:
        import openvino as ov

        self.num_candidates = num_candidates
        self._request = compiled.create_infer_request()
        self.buffers = [np.zeros(tuple(port.shape), np.float32) for port in compiled.inputs]
        for number, buffer in enumerate(self.buffers):
            self._request.set_input_tensor(number, ov.Tensor(buffer, shared_memory=True))

    def infer(self) -> FloatArray:
        """float32 [1, num_candidates], a copy."""
        self._request.infer()
        return np.array(self._request.get_output_tensor(0).data)


class ExportedRanker(Ranker):
    """Serves an export. Everything but the graph itself is memory-mapped."""

    def __init__(
        self,
        reference: AttentionRanker,
        precision: Precision,
        candidate_rows: ItemRows,
        history_rows: ItemRows,
        graph: Any,
        num_candidates: int,
    ) -> None:
        """``num_candidates`` is the usual number: a single query of up to so many takes the fastest way."""
        self.config = reference.config
        self.items = reference.items
        self.max_history = reference.max_history
        self.uses_time = reference.uses_time
        self.history = reference.history
        self.precision: Precision = precision
        self.reference = reference
        self._candidate_rows = candidate_rows
        self._history_rows = history_rows
        network = reference.network
        self._dim = network.dim
        self._rank_bias = network.rank_bias.detach().numpy()
        self._age_bias = network.age_bias.detach().numpy()
        self._null = np.concatenate([network.null_key.detach().numpy(), network.null_value.detach().numpy()])
        self._graph = graph
        self._compiled = _compile(graph, precision)
        self.num_candidates = num_candidates
        fixed = graph.clone()
        shapes = [port.partial_shape for port in fixed.inputs]
        fixed.reshape(
            {
                number: [1, num_candidates if shape[1].is_dynamic else shape[1].get_length(), shape[2].get_length()]
                for number, shape in enumerate(shapes)
            }
        )
        self._compiled_single = _compile(fixed, precision)
        self._local = threading.local()

    def inputs(self, batch: RankingBatch) -> list[FloatArray]:
        """The graph's arguments: gathered int8 rows as float32, the null entry first, biases and features."""
        dim, (num_queries, length) = self._dim, batch.history_item_idx.shape
        candidate = self._candidate_rows.gather(np.maximum(batch.candidate_item_idx, 0))
        history = np.empty((num_queries, length + 1, 2 * dim), np.float32)
        history[:, 0] = self._null
        history[:, 1:] = self._history_rows.gather(np.maximum(batch.history_item_idx, 0))
        bias = np.zeros((num_queries, length + 1, self._rank_bias.shape[1]), np.float32)
        bias[:, 1:] = self._bias(batch.history_age_ms, batch.history_item_idx)
        parts = [
            candidate[..., :dim],
            candidate[..., dim:],
            history[..., :dim],
            history[..., dim:],
            bias,
            batch.features,
        ]
        return [np.ascontiguousarray(part) for part in parts]

    def score(self, batch: RankingBatch) -> FloatArray:
        num_queries, num_candidates = batch.candidate_item_idx.shape
        if num_queries == 1 and num_candidates <= self.num_candidates:
            return self._score_single(batch)
        # One request object per thread: a stage may be called from several at once.
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        return np.array(self._local.request.infer(self.inputs(batch), share_inputs=True)[0])

    def _score_single(self, batch: RankingBatch) -> FloatArray:
        if not hasattr(self._local, "single"):
            self._local.single = _SingleQuery(self._compiled_single, self.num_candidates)
        single: _SingleQuery = self._local.single
        query, candidate, key, value, bias, features = (buffer[0] for buffer in single.buffers)
        count = batch.candidate_item_idx.shape[1]
        self._candidate_rows.gather_into(batch.candidate_item_idx[0], query[:count], candidate[:count])
        self._history_rows.gather_into(batch.history_item_idx[0], key[1:], value[1:])
        key[0], value[0] = np.split(self._null, 2)
        bias[1:] = self._bias(batch.history_age_ms[0], batch.history_item_idx[0])
        features[:count] = batch.features[0]
        return single.infer()[:, :count]

    def _bias(self, age_ms: FloatArray, history_item_idx: Int32Array) -> FloatArray:
        """float32 [..., L, H]: see :meth:`RankerNetwork.history_bias`."""
        bucket = np.minimum(np.log2(age_ms / HOUR_MS + 1.0).astype(np.int64), NUM_AGE_BUCKETS - 1)
        bias = self._rank_bias + self._age_bias[bucket]
        bias[history_item_idx == PADDING] = MASKED
        return bias

    def with_items(self, catalogue: RankingCatalogue) -> ExportedRanker:
        reference = self.reference.with_items(catalogue)
        rows = _item_rows(reference)
        return ExportedRanker(reference, self.precision, *rows, graph=self._graph, num_candidates=self.num_candidates)

    def save(self, folder: str | Path) -> None:
        """Write the fp32 ranker and, below ``export/``, what serving needs on top."""
        import openvino as ov

        folder = Path(folder)
        self.reference.save(folder)
        export = folder / "export"
        export.mkdir(exist_ok=True)
        self._candidate_rows.save(export / "candidate_rows.arrow")
        self._history_rows.save(export / "history_rows.arrow")
        ov.save_model(self._graph, str(export / "graph.xml"), compress_to_fp16=False)
        record = {"precision": self.precision, "num_candidates": self.num_candidates, "openvino": ov.__version__}
        write_json(export / "export.json", record)

    @classmethod
    def load(cls, folder: Path, reference: AttentionRanker) -> ExportedRanker:
        import openvino as ov

        export = folder / "export"
        graph = ov.Core().read_model(str(export / "graph.xml"))
        record = read_json(export / "export.json")
        rows = (ItemRows.load(export / f"{name}_rows.arrow") for name in ("candidate", "history"))
        return cls(reference, record["precision"], *rows, graph=graph, num_candidates=record["num_candidates"])


def load_exported(folder: Path, reference: AttentionRanker) -> Ranker:
    """The export in ``folder`` if there is one and this machine can run it, else the fp32 ``reference``."""
    if (folder / "export" / "export.json").exists() and installed("openvino"):
        return ExportedRanker.load(folder, reference)
    return reference


def export_ranker(ranker: AttentionRanker, config: ExportConfig, calibration: RankingBatch) -> list[ExportedRanker]:
    """One exported ranker per precision that this machine can make and run; none without OpenVINO.

    ``calibration`` has the usual number of candidates.
    """
    if not config.enabled or not installed("openvino"):
        return []
    num_candidates = max(1, calibration.candidate_item_idx.shape[1])
    candidate_rows, history_rows = _item_rows(ranker)
    graph = _graph(ranker)
    exported: list[ExportedRanker] = []
    for precision in config.precisions or _fast_precisions():
        form = "f32" if precision == "int8" else precision
        one = ExportedRanker(ranker, form, candidate_rows, history_rows, graph, num_candidates)
        if precision == "int8":
            if importlib.util.find_spec("nncf") is None:
                continue
            quantized = _quantize(graph, one, calibration[: config.num_calibration])
            one = ExportedRanker(ranker, "int8", candidate_rows, history_rows, quantized, num_candidates)
        exported.append(one)
    return exported


def choose_export(
    ranker: AttentionRanker, exported: list[ExportedRanker], holdout: RankingExamples, config: ExportConfig
) -> tuple[Ranker, dict[str, Any]]:
    """The fastest form that passes the gate, and the record of all that were tried.

    Times are p50 at one query with the widest candidate list of the holdout, interleaved with the fp32 network.
    """
    if len(holdout) == 0:
        return ranker, {"served": "fp32", "reason": "no holdout query to judge an export on"}
    reference_ndcg = holdout.ndcg10(_in_batches(ranker.score, holdout.batch))
    single = holdout.batch[:1]
    forms: dict[str, Callable[[RankingBatch], FloatArray]] = {"fp32": ranker.score}
    forms.update({form.precision: form.score for form in exported})
    p50_ms = interleaved_p50_ms(
        {name: lambda call=call: call(single) for name, call in forms.items()}, config.num_timed
    )
    record: dict[str, Any] = {"fp32": {"p50_ms": p50_ms["fp32"], "ndcg@10": float(reference_ndcg.mean())}}
    served, best = ranker, p50_ms["fp32"]
    for form in exported:
        ndcg = holdout.ndcg10(_in_batches(form.score, holdout.batch))
        loss = 1.0 - float(ndcg.mean()) / max(float(reference_ndcg.mean()), 1e-12)
        passes = loss <= config.max_ndcg_loss
        record[form.precision] = {
            "p50_ms": p50_ms[form.precision],
            "speedup": p50_ms["fp32"] / p50_ms[form.precision],
            "ndcg@10": float(ndcg.mean()),
            "ndcg_loss": loss,
            "passes_gate": passes,
        }
        if passes and p50_ms[form.precision] < best:
            served, best = form, p50_ms[form.precision]
    record["served"] = served.precision if isinstance(served, ExportedRanker) else "fp32"
    record["num_candidates"] = int(single.candidate_item_idx.shape[1])
    return served, record


def interleaved_p50_ms(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median wall milliseconds of each call, taken in turns so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 10):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repeat >= 10:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def _in_batches(score: Callable[[RankingBatch], FloatArray], batch: RankingBatch, size: int = 64) -> FloatArray:
    return np.concatenate([score(batch[start : start + size]) for start in range(0, len(batch), size)])


@torch.inference_mode()
def _item_rows(ranker: AttentionRanker, chunk: int = 65536) -> tuple[ItemRows, ItemRows]:
    network = ranker.network
    candidate: list[Tensor] = []
    history: list[Tensor] = []
    for start in range(0, len(ranker.projected), chunk):
        item = torch.tensor(ranker.projected[start : start + chunk])
        candidate.append(torch.cat([network.query(item), network.candidate(item)], 1))
        history.append(torch.cat([network.key(item), network.value(item)], 1))
    return ItemRows.quantize(torch.cat(candidate).numpy()), ItemRows.quantize(torch.cat(history).numpy())


def _graph(ranker: AttentionRanker) -> Any:
    """:meth:`RankerNetwork.head` as an OpenVINO graph over any number of queries and candidates.

    Written out rather than traced: it takes milliseconds, constants are folded (feature scaling into the first layer,
    the attention scale into the query) and the null entry comes with the inputs.
    """
    import openvino as ov
    from openvino import opset13 as ops

    network = ranker.network
    dim, heads, length = network.dim, network.num_heads, ranker.max_history + 1
    weight = {name: value.detach().double().numpy() for name, value in network.named_parameters()}
    scale, mean = network.feature_scale.double().numpy(), network.feature_mean.double().numpy()
    features = weight["features.weight"] * scale

    def constant(values: NDArray[Any]) -> Any:
        return ops.constant(np.ascontiguousarray(values, np.float32))

    def linear(x: Any, matrix_OI: NDArray[Any]) -> Any:
        return ops.matmul(x, constant(matrix_OI), False, True)

    def split(x: Any) -> Any:
        split_BSHD = ops.reshape(x, ops.constant(np.array([0, 0, heads, dim // heads])), True)
        return ops.transpose(split_BSHD, ops.constant(np.array([0, 2, 1, 3])))

    shapes = [[-1, -1, dim], [-1, -1, network.hidden], [-1, length, dim], [-1, length, dim]]
    shapes += [[-1, length, heads], [-1, -1, NUM_FEATURES]]
    inputs = [ops.parameter(ov.PartialShape(shape), np.float32) for shape in shapes]
    query, candidate, key, value, bias, x = inputs
    query_BHCD = split(ops.multiply(query, constant(np.array((dim // heads) ** -0.5))))
    bias_BHK = ops.transpose(bias, ops.constant(np.array([0, 2, 1])))
    logits = ops.add(
        ops.matmul(query_BHCD, split(key), False, True), ops.unsqueeze(bias_BHK, ops.constant(np.array([2])))
    )
    attended_BHCD = ops.matmul(ops.softmax(logits, -1), split(value), False, False)
    attended_BCHD = ops.transpose(attended_BHCD, ops.constant(np.array([0, 2, 1, 3])))
    attended_BCD = ops.reshape(attended_BCHD, ops.constant(np.array([0, 0, dim])), True)
    hidden = ops.add(candidate, linear(attended_BCD, weight["attended.weight"]))
    hidden = ops.add(hidden, linear(x, features))
    hidden = ops.relu(ops.add(hidden, constant(weight["features.bias"] - features @ mean)))
    hidden = ops.relu(ops.add(linear(hidden, weight["middle.weight"]), constant(weight["middle.bias"])))
    retrieval = np.zeros((1, NUM_FEATURES))
    retrieval[0, 0] = weight["retrieval_weight"]
    score = ops.add(linear(hidden, weight["out.weight"]), linear(x, retrieval))
    score = ops.squeeze(ops.add(score, constant(weight["out.bias"])), ops.constant(np.array([2])))
    return ov.Model([score], inputs, "ranker")  # pyright: ignore[reportCallIssue, reportArgumentType, reportGeneralTypeIssues]


@contextmanager
def _quiet() -> Generator[None]:
    """The converters call what their own libraries have deprecated; that is no news for our callers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _compile(graph: Any, precision: Precision) -> Any:
    import openvino as ov

    return ov.Core().compile_model(
        graph,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        },
    )


def _quantize(graph: Any, float_form: ExportedRanker, calibration: RankingBatch) -> Any:
    import nncf

    if len(calibration) == 0:
        raise ModelError("int8 export needs at least one calibration query; lower ranker.export.precisions to f32")
    rows = [float_form.inputs(calibration[row : row + 1]) for row in range(len(calibration))]
    with _quiet():
        return nncf.quantize(graph.clone(), nncf.Dataset(rows), subset_size=len(rows))


def _fast_precisions() -> tuple[Precision, ...]:
    """Without its own instructions a precision is slower than f32: int8 on AVX2 by a third, measured."""
    has = torch.cpu.get_capabilities()
    fast: list[Precision] = ["f32"]
    if has.get("avx512_bf16") or has.get("amx_bf16"):
        fast.append("bf16")
    if has.get("avx512_vnni") or has.get("avx_vnni") or has.get("amx_int8"):
        fast.append("int8")
    return tuple(fast)
