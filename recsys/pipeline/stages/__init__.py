"""Stages of the pipeline, one file each. All follow :class:`recsys.pipeline.stage.Stage`."""
