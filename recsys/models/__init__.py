"""Models: one file per family. A new family is a file, and its configuration's name in the tuple of its sort."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recsys.config import parse, union
from recsys.errors import ModelError
from recsys.files import read_json
from recsys.models.als import ALS
from recsys.models.attention_ranker import AttentionRanker, AttentionRankerConfig
from recsys.models.base import Retriever, RetrieverConfig
from recsys.models.bert4rec import BERT4Rec
from recsys.models.blend import Blend
from recsys.models.bpr import BPR
from recsys.models.caser import Caser
from recsys.models.causal_lm import CausalLMConfig
from recsys.models.cnn_lstm import CNNLSTM
from recsys.models.cross_encoder import CrossEncoderConfig
from recsys.models.ease import EASE
from recsys.models.esasrec import ESASRec
from recsys.models.gru4rec import GRU4Rec
from recsys.models.hstu import HSTU
from recsys.models.item_knn import ItemKNN
from recsys.models.lstm import LSTM
from recsys.models.mind import MIND
from recsys.models.neumf import NeuMF
from recsys.models.popularity import Popularity
from recsys.models.ranker_export import load_exported
from recsys.models.ranking import Ranker, RankerConfig
from recsys.models.sasrec import SASRec
from recsys.models.svd import SVD
from recsys.models.text_two_tower import TextTwoTower
from recsys.models.tfidf import TfIdf
from recsys.models.user_knn import UserKNN

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
