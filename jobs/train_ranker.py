from jobs.pipeline import main

main("train_ranker", __name__)
