"""Batch size against learning rate, betas and gradient noise. Imports no torch.

rules            the equations, with their papers
hyperparameters  the settings of an optimizer for another batch size
noise_scale      the gradient noise scale
"""

from bigbatch.scaling.hyperparameters import Change as Change
from bigbatch.scaling.hyperparameters import changes as changes
from bigbatch.scaling.hyperparameters import rescale as rescale
