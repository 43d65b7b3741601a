"""The step ``train_encoder``: the text encoder, fine-tuned on items consumed together, as a Hugging Face folder."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file as load_arrays
from safetensors.torch import save_file

from jobs._ray import FitResult, discard, fit_distributed
from jobs.artifacts import Prepared, TrainedEncoder
from jobs.config import JobConfig
from jobs.steps import prepare
from jobs.steps.base import Step
from recsys.files import file_sha256, link_or_copy, read_json, write_json
from recsys.models.text.contrastive import Finetuned, PairData, Weights, finetune
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, item_texts
from recsys.models.text.masked_lm import pretrain
from recsys.training.runtime import Runtime

logger = logging.getLogger(__name__)


def run(config: JobConfig, prepared: Prepared) -> TrainedEncoder:
    """Continue the pretraining of ``config.encoder`` on the catalogue's texts and fine-tune it on the train split of
    ``prepared``; each where it has epochs, and without any it is copied.
    """
    encoder = config.encoder
    assert encoder is not None, "the pipeline skips this step for data without text"
    source = encoder.model_folder()
    settings: dict[str, Any] = {
        "encoder": encoder.model_dump(mode="json"),
        "files": {
            str(path.relative_to(source)): file_sha256(path)
            for path in sorted(source.rglob("*"))
            if path.suffix in {".safetensors", ".json", ".txt", ".model"}
        },
    }
    learns = encoder.train.epochs or encoder.pretrain.epochs
    if learns:
        settings |= {"seed": config.seed, "num_workers": max(1, config.compute.num_workers)}

    def make(folder: Path) -> dict[str, Any]:
        if not learns:
            logger.info("the encoder stays as it is: encoder.train.epochs and encoder.pretrain.epochs are 0")
            TextEncoder.load(encoder).save(folder / TrainedEncoder.FOLDER)
            return {"epochs": 0}
        dataset = prepared.dataset()
        texts = item_texts(dataset.items, encoder)
        pretrained: Weights | None = None
        done: list[FitResult] = []
        pretraining: dict[str, Any] = {}
        if encoder.pretrain.epochs:
            logger.info("continuing pretraining on %d texts", len(texts))
            fit = fit_distributed(
                pretrain_worker,
                (encoder, texts, config.seed),
                compute=config.compute,
                name=f"pretrain-{folder.name}",
                storage=folder / "fit",
            )
            pretrained = load_arrays(fit.path / "weights.safetensors")
            pretraining = {"pretraining": read_json(fit.path / "history.json")["curve"]}
            done.append(fit)
        data = PairData.of(dataset, texts, encoder.train.window, seed=config.seed)
        logger.info("fine-tuning on %d pairs of items consumed together", len(data.pairs))
        fit = fit_distributed(
            train_worker,
            (encoder, data, pretrained),
            compute=config.compute,
            name=f"encoder-{folder.name}",
            storage=folder / "fit",
        )
        model = folder / TrainedEncoder.FOLDER
        shutil.rmtree(model, ignore_errors=True)
        link_or_copy(fit.path, model)
        for result in (*done, fit):
            discard(result)
        (model / "history.json").rename(folder / "history.json")
        history = read_json(folder / "history.json")
        logger.info(
            "partners of held-out pairs: MRR %.4f before, %.4f after; %s",
            history["held_out_mrr_before"],
            history["held_out_mrr_after"],
            "kept" if history["kept"] else "no better, so the encoder stays as it was",
        )
        return {**history, **pretraining, "num_pairs": len(data.pairs)}

    return STEP.build(config, settings, (prepared,), make)


def pretrain_worker(payload: tuple[TextEncoderConfig, list[str], int], runtime: Runtime) -> Callable[[Path], None]:
    """What one worker does of continued pretraining."""
    config, texts, seed = payload
    encoder, curve = pretrain(config, texts, runtime, seed=seed)

    def save(folder: Path) -> None:
        save_file(dict(encoder.module.transformer.state_dict()), folder / "weights.safetensors")
        write_json(folder / "history.json", {"curve": curve})

    return save


def train_worker(
    payload: tuple[TextEncoderConfig, PairData, Weights | None], runtime: Runtime
) -> Callable[[Path], None]:
    """What one worker does of the fine-tuning."""
    config, data, pretrained = payload
    return functools.partial(_save, finetune(config, data, runtime, pretrained))


def _save(result: Finetuned, folder: Path) -> None:
    result.encoder.save(folder)
    write_json(folder / "history.json", {"curve": result.curve, **result.metrics})


STEP = Step(
    "train_encoder",
    "Fine-tune the text encoder on items consumed together.",
    TrainedEncoder,
    run,
    reads=(prepare.STEP,),
    section="encoder",
    left_out=lambda config: config.encoder is None,
)
