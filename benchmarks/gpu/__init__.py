"""What one GPU can tell, each figure beside its ideal from the same run: the same tiles as bare kernel calls.

The cases run in order of value, within seconds of their own and a total, and the JSON is written anew after every row:
a run that is cut off keeps what it has. Random data, bf16, 32 heads over 8 of 128; both sides of a figure take turns,
and its ratio is the median of the rounds' ratios. A time is that of one of several runs in a row without a wait in
between, as a training step makes them, so that a host that cannot keep up shows.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --only ranks --only overlap
    python -m benchmarks.gpu --dry  # the same code at tiny sizes on any machine: whether it runs, no figures
"""
