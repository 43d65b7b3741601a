from jobs.pipeline import main

main("recommend", __name__)
