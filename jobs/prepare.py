from jobs.pipeline import main

main("prepare", __name__)
