from jobs.pipeline import main

main("embed", __name__)
