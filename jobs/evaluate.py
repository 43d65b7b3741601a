from jobs.pipeline import main

main("evaluate", __name__)
