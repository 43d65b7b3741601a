"""Proves that a change of the code's shape changed nothing that it does: ``make same-behaviour AGAINST=REV``.

Two checkouts train, judge, publish and answer the same tiny things (``same_behaviour.yaml``), and all figures are
compared to the last bit: learning curves, weights, reports, golden queries, slates. One side can be kept::

    python tests/benchmarks/same_behaviour.py record FOLDER     # of the checkout in the current folder
    python tests/benchmarks/same_behaviour.py compare OLD NEW   # and open OLD's Bundles with the current checkout

Modules and files may move, so only what stays is used: the jobs' command lines, ``artifact.json``, ``Recommender``.
What a step wrote is what was not there before it; the same values under other names are ``renamed``, which is no
difference. A figure that is ``differs`` on another machine or with other libraries proves nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

SETTINGS: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
RULES = SETTINGS["reranking"]
RERANKING_SPELLINGS: tuple[dict[str, Any], ...] = (
    {"reranking": {name: RULES[name] for name in ("diversity", "max_per_creator", "pins", "boosts", "buries")}},
    {
        "rules": [
            *({"kind": "pin", **pin} for pin in RULES["pins"]),
            *({"kind": "boost", **boost} for boost in RULES["boosts"]),
            *({"kind": "bury", **bury} for bury in RULES["buries"]),
            {"kind": "creator_cap", "num_items": RULES["max_per_creator"]},
            {"kind": "diversity", "strength": RULES["diversity"]},
        ]
    },
)
"""The same rules as settings of ``pipeline``, the oldest spelling first; a tree gets the first one that it takes."""
NOW_MS = 1_735_830_000_000

MACHINE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LIBRARIES = ("torch._dynamo", "transformers.models.bert.modeling_bert", "openvino", "nncf", "pandas", "peft")
"""slow to import: loaded once, before each job gets a process of its own"""
VOLATILE = re.compile(r"seconds|per_s$|p\d+_ms|speedup|fingerprint|bundle_id|^store$|num_bytes|^config$")
"""what depends on the clock, on the place, or on how settings are spelled"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
started = time.monotonic()
Thing = dict[str, Any]
"""``numbers``, ``weights`` and ``answers``, each a flat dictionary; or why it ``failed``, or was ``refused``"""


def say(text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)


def load_tree() -> None:
    """Import the jobs of the checkout in the current folder, on one core and one thread."""
    os.environ.update(MACHINE)
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    sys.path[0] = str(Path.cwd())
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    for name in ("jobs.pipeline", "jobs.benchmark_ratings", *LIBRARIES):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    source = importlib.import_module("recsys").__file__ or ""
    if not Path(source).is_relative_to(Path.cwd()):
        raise typer.BadParameter(f"recsys comes from {source}: run this at the top of a checkout")


def apart(log: Path, function: Callable[..., Any], *arguments: Any) -> bool:
    """Call ``function`` in a process of its own that writes to ``log``; whether it went well."""
    if process := os.fork():
        return os.waitpid(process, 0)[1] == 0
    code: Any = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - nothing after a fork may return to the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(log: Path) -> str:
    """The last error in it."""
    return " ".join(re.split(r"\n(?=\w+Error: )", log.read_text())[-1][-500:].split())


def job(step: str, arguments: list[str]) -> None:
    """``python -m jobs.STEP ARGUMENTS``, with what is imported already."""
    sys.argv = [step, *arguments]
    time.perf_counter = time.thread_time  # a ranker is served in its fastest form: let no other process choose it
    runpy.run_module(f"jobs.{step}", run_name="__main__", alter_sys=True)


# --- what was left ----------------------------------------------------------------------------------------------------


def flat(tree: Any, place: str) -> dict[str, Any]:
    """One entry per leaf of a JSON value."""
    if isinstance(tree, dict):
        return {k: v for key in tree if not VOLATILE.search(key) for k, v in flat(tree[key], f"{place}.{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for row, value in enumerate(tree) for k, v in flat(value, f"{place}.{row}").items()}
    return {place: tree}


def found_in(folder: Path, *keys: str) -> list[dict[str, Any]]:
    """The JSON objects in ``folder`` that have these keys."""
    trees = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    return [tree for tree in trees if isinstance(tree, dict) and set(keys) <= tree.keys()]


def inside(folder: Path, path: Path) -> list[str]:
    """Where ``path`` lies in ``folder``, without parts that are hashes of what is in them."""
    return [part for part in path.relative_to(folder).parts if not re.fullmatch(r"[0-9a-f]{16,}", part)]


def numbers(folder: Path) -> dict[str, Any]:
    """What a step reports of itself, and the learning curves in its files."""
    found = flat(json.loads((folder / "artifact.json").read_text())["metrics"], "reported")
    for path in sorted(set(folder.rglob("*.json")) - {folder / "artifact.json"}):
        for place, rows in curves(json.loads(path.read_text()), inside(folder, path.parent)):
            found |= flat(rows, place)
    return found


def curves(tree: Any, place: list[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, list) and tree and isinstance(tree[0], dict) and "epoch" in tree[0]:
        yield ".".join(place), tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from curves(value, [*place, key])


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor, of each column of a table, and of each other file that is no text."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in {".json", ".md", ".txt", ".yaml"}:
            place = "/".join(inside(folder, path))
            found |= {f"{place}:{name}": hashlib.sha256(data).hexdigest() for name, data in parts(path)}
    return found


def parts(path: Path) -> Iterator[tuple[str, bytes]]:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, tensor in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                yield name, f"{tensor['dtype']} {tensor['shape']} ".encode() + data[begin + first : begin + last]
    elif path.suffix in {".arrow", ".parquet"}:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(pa.BufferReader(data)).read_all()
        for name in table.column_names:
            yield name, f"{table[name].type} {table[name].to_pylist()}".encode()
    else:
        yield "", data


# --- what a Bundle answers --------------------------------------------------------------------------------------------


def answers(store: Path, target: Path) -> None:
    """Write what the current Bundle of ``store`` answers, or why it was refused, to ``target``."""
    from recsys import Recommender

    try:
        recommender = Recommender.load(str(store))
    except Exception as error:
        if "RecsysError" not in {cls.__name__ for cls in type(error).__mro__}:
            raise
        target.write_text(json.dumps({"refused": f"{type(error).__name__}: {error}"}))
        return

    def made(name: str, fields: dict[str, Any]) -> Any:
        """An object of a class of the library, wherever it is."""
        return class_of(name)(**fields)

    def class_of(name: str) -> Any:
        found = (vars(m)[name] for k, m in sys.modules.items() if k.startswith("recsys.") and name in vars(m))
        return next(found, None)

    def filtered(filters: dict[str, Any]) -> dict[str, Any]:
        """Fields of a request: excluded items were a filter once."""
        if class_of("RequestFilters"):
            return {"filters": made("RequestFilters", filters)}
        rest = {name: value for name, value in filters.items() if name != "exclude_items"}
        return {"filters": made("Filters", rest), "exclude_items": filters.get("exclude_items", ())}

    def recommend(fields: dict[str, Any]) -> Any:
        history = [made("HistoryItem", event) for event in fields.get("history", ())]
        asked = {"request_id": "same", **fields, "history": history, **filtered(fields.get("filters", {}))}
        request = made("RecommendRequest", asked)
        return asyncio.run(recommender.arecommend(request, now_ms=NOW_MS))

    def shown(ask: Callable[[Any], Any], question: Any) -> dict[str, Any]:
        try:
            found = ask(question)
        except Exception as error:  # noqa: BLE001 - a refusal is an answer, too
            return {"error": f"{type(error).__name__}: {error}".replace(recommender.bundle_id, "BUNDLE")}
        fields = ("item_id", "title", "score", "sources", "stage_scores", "reasons")
        items = [{name: getattr(item, name) for name in fields} for item in found.items]
        return {"items": items, "degraded": found.degraded, "unknown_items": found.unknown_items}

    questions = {f"user {number}": {"user_id": f"user-{number}"} for number in range(SETTINGS["num_users"])}
    asked = {name: shown(recommend, fields) for name, fields in {**questions, **SETTINGS["recommend"]}.items()}
    asked |= {f"similar to {item}": shown(recommender.similar, item) for item in SETTINGS["similar"]}
    asked |= {f"search for {words}": shown(recommender.search, words) for words in SETTINGS["search"]}
    cheap = made("SearchRequest", {"query": "river", **filtered({"price_max": 20.0})})
    asked["search for cheap"] = shown(recommender.search, cheap)
    asked["items"] = {item: repr(recommender.item(item)) for item in SETTINGS["similar"]}
    recommender.close()
    target.write_text(json.dumps({"answers": flat(asked, "asked")}))


def ask(store: Path, scratch: Path) -> Thing:
    """What the Bundle in ``store`` answers in the checkout that is loaded."""
    target, log = scratch / f"answers of {store.name}.json", scratch / f"answers of {store.name}.log"
    if not apart(log, answers, store, target):
        return {"failed": end_of(log)}
    return json.loads(target.read_text())


# --- recording --------------------------------------------------------------------------------------------------------


class Recording:
    """What one checkout does, in a folder: ``behaviour.json``, Bundles, the runs they came from, logs."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and any(folder.iterdir()):
            raise typer.BadParameter(f"{folder} is not empty: what lies there would be taken for what this tree does")
        self.folder, self.runs, self.logs, self.encoder = (folder / name for name in ("", "runs", "logs", "encoder"))
        self.logs.mkdir(parents=True)
        self.things: dict[str, Thing] = {}

    def keep(self, name: str, thing: Thing) -> None:
        say(f"{name}: {thing['failed']}" if "failed" in thing else name)
        self.things[name] = thing
        commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
        tree = {"commit": commit, "torch": str(importlib.import_module("torch").__version__)}
        (self.folder / "behaviour.json").write_text(json.dumps({"tree": tree, "things": self.things}, indent=1))

    def run(self, name: str, step: str, config: dict[str, Any], *, option: str = "--config") -> list[Path] | None:
        """The folders of the artefacts that the job made, or None where it failed."""
        before = set(self.runs.rglob("artifact.json"))
        path = self.logs / f"{name}.yaml"
        path.write_text(json.dumps(config, indent=1).replace("ENCODER", str(self.encoder)))
        settings = [f"workdir={self.runs}", "seed=1", *(["compute.num_workers=0"] if option == "--config" else [])]
        arguments = [option, str(path), *(part for setting in settings for part in ("--set", setting))]
        if not apart(path.with_suffix(".log"), job, step, arguments):
            return None
        return [found.parent for found in sorted(set(self.runs.rglob("artifact.json")) - before)]

    def step(self, name: str, step: str, config: dict[str, Any]) -> bool:
        """Keep the one artefact that a job makes on top of those that are there; whether it did."""
        made = self.run(name, step, config)
        if made is None or len(made) != 1:
            self.keep(name, {"failed": end_of(self.logs / f"{name}.log") if made is None else f"left {made}, not one"})
            return False
        self.keep(name, {"numbers": numbers(made[0]), "weights": weights(made[0])})
        return True

    def bundle(self, name: str, config: dict[str, Any]) -> None:
        """Keep all steps up to a published Bundle, and what the Bundle answers."""
        store = self.folder / "bundles" / name
        config = {**config, "name": name, "publish": {"store": str(store)}}
        steps = ("train_retriever", "train_ranker", "evaluate", "recommend", "publish")
        if all(self.step(f"{name} {step}", step, config) for step in steps):
            again = self.run(f"{name} pipeline", "pipeline", config)
            self.keep(f"{name} pipeline reuses all", {"numbers": {"ran again": again if again is None else len(again)}})
            self.keep(f"{name} golden query", {"answers": flat(found_in(store, "item_ids", "scores"), "golden")})
            self.keep(f"{name} answers", ask(store, self.logs))


def make_encoder(folder: Path) -> None:
    """A small BERT of random weights."""
    import torch
    import transformers

    library: Any = transformers  # it names some of its classes at run time only
    words = "the part studio amber bright calm deep early fresh golden hidden river 0 1 2 3 4 5 6 7 8 9"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = library.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)
    library.BertModel(config).save_pretrained(folder)
    tokens = {word: row for row, word in enumerate(vocabulary)}
    library.BertTokenizerFast(vocab=tokens, model_max_length=64).save_pretrained(folder)


@app.command()
def record(folder: Path) -> None:
    """Record what the checkout in the current folder does into a new FOLDER."""
    load_tree()
    recording = Recording(folder.absolute())
    apart(recording.logs / "encoder.log", make_encoder, recording.encoder)
    base = {"name": "same", **SETTINGS["base"]}
    rules, blend = ({**base, **SETTINGS["bundles"][name]} for name in ("rules", "blend"))
    recording.step("prepare", "prepare", base)
    for name, encoder in SETTINGS["encoders"].items():
        recording.step(f"encoder {name}", "train_encoder", {**base, "encoder": encoder})
    recording.step("embed", "embed", rules)
    for spelling in RERANKING_SPELLINGS:
        rules["pipeline"] = {**base["pipeline"], **spelling}
        if recording.run("spelling", "prepare", rules) is not None:
            break
    else:
        raise typer.BadParameter(f"this tree spells reranking otherwise: {end_of(recording.logs / 'spelling.log')}")
    recording.bundle("rules", rules)
    recording.bundle("blend", blend)
    for config, group in ((base, "retrievers"), ({**base, "encoder": rules["encoder"]}, "retrievers_of_texts")):
        for name, model in SETTINGS[group].items():
            recording.step(f"retriever {name}", "train_retriever", {**config, "retriever": {"kind": name, **model}})
    base["retriever"] = {"kind": "popularity"}
    for name, model in SETTINGS["rankers"].items():
        ranking = {**base["ranking"], "model": {"kind": name, **model}, "num_candidates": 60}
        recording.step(f"ranker {name}", "train_ranker", {**base, "ranking": ranking})
    if recording.run("ratings", "benchmark_ratings", SETTINGS["ratings"], option="--suite") is None:
        recording.keep("ratings", {"failed": end_of(recording.logs / "ratings.log")})
    for report in found_in(recording.runs, "suite", "models"):
        for model in report["models"]:  # their weights are saved nowhere
            recording.keep(f"ratings {model['name']}", {"numbers": flat(model, "reported")})
    say(f"{len(recording.things)} things recorded in {folder}")


# --- comparing --------------------------------------------------------------------------------------------------------


def judge(old: Thing | None, new: Thing | None) -> tuple[str, str]:
    """``equal``, ``renamed``, ``not recorded`` or ``differs``, and why."""
    if old is None or new is None:
        return "differs", f"only the {'new' if old is None else 'old'} tree has it"
    if "failed" in old and "failed" in new:
        return "not recorded", f"it fails in both: {old['failed']}"
    if old.keys() != new.keys():
        return "differs", " became ".join(side.get("failed") or side.get("refused") or "fine" for side in (old, new))
    renamed: list[str] = []
    for aspect, before in old.items():
        after = new[aspect]
        changed = [key for key in before if key in after and repr(before[key]) != repr(after[key])]
        lost, added = [key for key in before if key not in after], [key for key in after if key not in before]
        if changed:
            first = f"{changed[0]}: {before[changed[0]]!r} became {after[changed[0]]!r}"
            return "differs", f"{first}; {len(changed)} of {len(before)} {aspect} differ"
        if sorted(repr(before[key]) for key in lost) != sorted(repr(after[key]) for key in added):
            first = f"{lost[0]} is only in the old tree" if lost else f"{added[0]} is only in the new tree"
            return "differs", f"{first}; {len(lost)} and {len(added)} {aspect} are in one of them alone"
        renamed += [f"{lost[0]} is called {added[0]}; {len(lost)} {aspect} have other names"] if lost else []
    return ("renamed", "; ".join(renamed)) if renamed else ("equal", ", ".join(f"{len(old[a])} {a}" for a in old))


@app.command()
def compare(old_folder: Path, new_folder: Path) -> None:
    """Compare two recorded folders, and open the old one's Bundles with the checkout in the current folder."""
    load_tree()
    old, new = (json.loads((folder / "behaviour.json").read_text()) for folder in (old_folder, new_folder))
    things = [side["things"] for side in (old, new)]
    rows = {name: judge(*(side.get(name) for side in things)) for name in {**things[0], **things[1]}}
    with tempfile.TemporaryDirectory() as scratch:
        for name in SETTINGS["bundles"]:
            say(f"opening the old Bundle {name} with this tree")
            found = ask(old_folder.absolute() / "bundles" / name, Path(scratch))
            judged = judge(old["things"].get(f"{name} answers"), found)
            rows[f"old Bundle {name} in this tree"] = ("refused", found["refused"]) if "refused" in found else judged
    print(f"\n{old['tree']} against {new['tree']}")
    for name, (verdict, what) in rows.items():
        print(f"{name:32}{verdict:14}{what}")
    different = [name for name, (verdict, _) in rows.items() if verdict == "differs"]
    print(f"{len(different)} of {len(rows)} differ: {', '.join(different)}" if different else "nothing differs")
    raise typer.Exit(1 if different else 0)


@app.callback(invoke_without_command=True, no_args_is_help=True)
def main(against: str | None = None) -> None:
    """Hold the checkout in the current folder against a revision of it, to the last bit."""
    if against is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        tree, old, new = (Path(scratch) / name for name in ("tree", "old", "new"))
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), against], check=True)
        try:
            for folder, where in ((old, tree), (new, Path.cwd())):
                say(f"recording the {folder.name} tree")
                subprocess.run([sys.executable, __file__, "record", str(folder)], cwd=where, check=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
        compare(old, new)


if __name__ == "__main__":
    app()
