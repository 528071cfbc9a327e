"""Rescaling of hyper-parameters to another batch size, and the gradient noise scale. Imports no torch.

rules            the scaling rules, with their papers
hyperparameters  apply a rule to an optimizer and its schedulers
noise_scale      estimate the gradient noise scale
"""

from bigbatch.scaling.hyperparameters import Change as Change
from bigbatch.scaling.hyperparameters import changes as changes
from bigbatch.scaling.hyperparameters import rescale as rescale
