"""Retrievers: who find candidates among all items, by family."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recsys.errors import ModelError
from recsys.files import read_json
from recsys.kinds import Kinds
from recsys.models.base import Retriever, RetrieverConfig

KINDS: Kinds[RetrieverConfig] = Kinds(
    "retrievers",
    {
        "popularity": "recsys.models.retrievers.popularity:Popularity",
        "item_knn": "recsys.models.retrievers.neighbours.item_knn:ItemKNN",
        "user_knn": "recsys.models.retrievers.neighbours.user_knn:UserKNN",
        "tfidf": "recsys.models.retrievers.neighbours.tfidf:TfIdf",
        "svd": "recsys.models.retrievers.matrices.svd:SVD",
        "als": "recsys.models.retrievers.matrices.als:ALS",
        "bpr": "recsys.models.retrievers.matrices.bpr:BPR",
        "ease": "recsys.models.retrievers.matrices.ease:EASE",
        "neumf": "recsys.models.retrievers.towers.neumf:NeuMF",
        "gru4rec": "recsys.models.retrievers.sequences.gru4rec:GRU4Rec",
        "lstm": "recsys.models.retrievers.sequences.lstm:LSTM",
        "caser": "recsys.models.retrievers.sequences.caser:Caser",
        "cnn_lstm": "recsys.models.retrievers.sequences.cnn_lstm:CNNLSTM",
        "sasrec": "recsys.models.retrievers.sequences.sasrec:SASRec",
        "bert4rec": "recsys.models.retrievers.sequences.bert4rec:BERT4Rec",
        "esasrec": "recsys.models.retrievers.sequences.esasrec:ESASRec",
        "hstu": "recsys.models.retrievers.sequences.hstu:HSTU",
        "mind": "recsys.models.retrievers.towers.mind:MIND",
        "text_two_tower": "recsys.models.retrievers.sequences.text_two_tower:TextTwoTower",
        "blend": "recsys.models.retrievers.blend:Blend",
    },
)
AnyRetriever = Annotated[RetrieverConfig, KINDS]

__all__ = ["KINDS", "AnyRetriever", "Retriever", "RetrieverConfig", "load_retriever"]


def load_retriever(folder: str | Path) -> Retriever:
    """The retriever that :meth:`recsys.models.base.Retriever.save` wrote into ``folder``, whatever its kind."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no saved retriever here (config.json is missing)", path=str(folder))
    return KINDS.parse(read_json(path), where=str(path)).load(Path(folder))
