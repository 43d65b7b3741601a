"""Slates that are kept for days: as a server would make them, but by no rule that is meant for live answers alone."""

from __future__ import annotations

from jobs import pipeline
from jobs.steps import prepare
from jobs.steps.base import Results
from recsys.bundle.store import BundleStore
from recsys.pipeline.rules.boost import BoostRule
from recsys.pipeline.rules.exploration import ExplorationRule


def test_items_come_again_as_the_configuration_says(trained_job, published, tmp_path):
    dataset = Results.of(trained_job, prepare.STEP)[prepare.STEP].dataset()
    item_ids = dataset.items["item_id"].to_pylist()
    met = {item_ids[item] for item in dataset.everybody().seen.items(0).tolist()}

    def slate(days):
        publish = trained_job.publish.model_copy(update={"store": str(tmp_path / str(days))})
        settings = trained_job.pipeline.model_copy(update={"repeat_after_days": days})
        pipeline.run(trained_job.model_copy(update={"pipeline": settings, "publish": publish}))
        bundle = BundleStore(tmp_path / str(days)).open()
        user_id = dataset.users["user_id"][0].as_py()
        found = bundle.catalogue().id_map.take(bundle.slates().of(user_id).item_idx)
        return set(found)

    assert not met & slate(None)
    assert not met & slate(36_500.0)
    assert met & slate(0.0)


def test_rules_for_live_answers_alone_are_left_out(trained_job, published, tmp_path):
    """The steps before are complete: only slates and Bundles are made."""

    def slates(name, *rules):
        publish = trained_job.publish.model_copy(update={"store": str(tmp_path / name)})
        ruled = trained_job.pipeline.model_copy(update={"rules": rules})
        pipeline.run(trained_job.model_copy(update={"pipeline": ruled, "publish": publish}))
        of_everybody = BundleStore(tmp_path / name).open().slates()
        return {user: of_everybody.of(user).item_idx.tolist() for user in ("user-0", "user-1", "user-2")}

    usual = BundleStore(published).open().slates()
    boost = BoostRule(item_ids=tuple(f"item-{n}" for n in range(50)), amount=1.0)
    boosted = slates("boosted", boost)
    assert all(boosted.values())
    assert boosted == slates("explored", ExplorationRule(share=1.0), boost)
    assert boosted != {user: usual.of(user).item_idx.tolist() for user in boosted}
