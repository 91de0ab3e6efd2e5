"""``misa reproduce``: the paper's experiments, one command each, rendered beside the paper's numbers.

paper.py            what the paper reports, each number with its source
hyperparameters.py  the settings of the packaged recipes, each with its source
experiments.py      the experiments as data: model x method x seed x setting
sources.py          data files, the command that gets each, and rows of tokens from them
toys.py             the same files and models in small, made on this machine
cases.py            one run: train, evaluate, account
scoring.py          the tasks after training, and answers written out for a judge
cost.py             GPU-hours and VRAM, computed before anything runs
results.py          runs -> tables, claims
page.py             the page, one HTML file that needs no network
command.py          misa reproduce
"""
