"""What a gin file runs: training, compression studies, and their plans.

Jobs are specs with `run(folder)` and `plan()`. Their modules are imported by name, because a
training run needs nothing of a study.
"""
