from jobs.pipeline import main

main("train_encoder", __name__)
