from jobs.pipeline import main

main("train_retriever", __name__)
