"""Import it where runs are trained: a sample of their text then has 3 new tokens instead of 64.

The 64 took half of the computing time of a run of four updates. Their number does not change the training, but runs are
compared with their samples, so every process of a test imports this: the test's own, its forks, and ranks of torchrun.
"""

from bigbatch.lm.training import text_sample

text_sample.SAMPLE_TOKENS = 3
