"""Models: one file per family. A new family is a file, and its configuration's name in the tuple of its sort."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recsys.config import parse, union
from recsys.errors import ModelError
from recsys.files import read_json
from recsys.models.base import Retriever, RetrieverConfig
from recsys.models.rankers.attention import AttentionRanker, AttentionRankerConfig
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.causal_lm import CausalLMConfig
from recsys.models.rankers.cross_encoder import CrossEncoderConfig
from recsys.models.rankers.export import load_exported
from recsys.models.retrievers.blend import Blend
from recsys.models.retrievers.matrices.als import ALS
from recsys.models.retrievers.matrices.bpr import BPR
from recsys.models.retrievers.matrices.ease import EASE
from recsys.models.retrievers.matrices.svd import SVD
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.neighbours.tfidf import TfIdf
from recsys.models.retrievers.neighbours.user_knn import UserKNN
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.bert4rec import BERT4Rec
from recsys.models.retrievers.sequences.caser import Caser
from recsys.models.retrievers.sequences.cnn_lstm import CNNLSTM
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.retrievers.sequences.gru4rec import GRU4Rec
from recsys.models.retrievers.sequences.hstu import HSTU
from recsys.models.retrievers.sequences.lstm import LSTM
from recsys.models.retrievers.sequences.sasrec import SASRec
from recsys.models.retrievers.towers.mind import MIND
from recsys.models.retrievers.towers.neumf import NeuMF
from recsys.models.retrievers.towers.text_two_tower import TextTwoTower

KINDS: tuple[type[RetrieverConfig], ...] = (
    Popularity,
    ItemKNN,
    UserKNN,
    TfIdf,
    SVD,
    ALS,
    BPR,
    EASE,
    NeuMF,
    GRU4Rec,
    LSTM,
    Caser,
    CNNLSTM,
    SASRec,
    BERT4Rec,
    ESASRec,
    HSTU,
    MIND,
    TextTwoTower,
    Blend,
)

RANKER_KINDS: tuple[type[RankerConfig], ...] = (AttentionRankerConfig, CrossEncoderConfig, CausalLMConfig)

if TYPE_CHECKING:
    AnyRetriever = RetrieverConfig
    AnyRanker = RankerConfig
else:
    AnyRetriever = union("retrievers", KINDS)
    AnyRanker = union("rankers", RANKER_KINDS)


def load_retriever(folder: str | Path) -> Retriever:
    """The retriever that :meth:`recsys.models.base.Retriever.save` wrote into ``folder``, whatever its kind."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no saved retriever here (config.json is missing)", path=str(folder))
    config: RetrieverConfig = parse(AnyRetriever, read_json(path), where=str(path))
    return config.load(Path(folder))


def load_ranker(folder: str | Path) -> Ranker:
    """The ranker in ``folder``: its compressed form where one was exported and this machine can run it."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no saved ranker here (config.json is missing)", path=str(folder))
    config: RankerConfig = parse(AnyRanker, read_json(path), where=str(path))
    ranker = config.load(Path(folder))
    return load_exported(Path(folder), ranker) if isinstance(ranker, AttentionRanker) else ranker
